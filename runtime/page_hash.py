"""Names for the contents of KV pages: equal names mean that attention left equal rows in them.

A page's rows depend on every token before them, so its hash covers the hash of the page before it: a chain. What else
decides the rows goes in as well: the adapter, the media that placeholder tokens stand for, and a salt that keeps
tenants apart. Adapter and salt stand at the root and reach every page by the chain.
"""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections.abc import Sequence
from typing import NamedTuple


class LoRAKey(NamedTuple):
    """Identity of an adapter: its name and the version (or path) of its weights."""

    name: str
    version: str


class MediaKey(NamedTuple):
    """Identity of a media item: hash of its content, and the placeholder tokens ``offset:offset + length``."""

    content_hash: str
    offset: int
    length: int


@dataclasses.dataclass(frozen=True)
class CacheKeys:
    """What decides a request's KV rows besides its tokens; ``media`` in order of offset."""

    salt: str | None = None
    lora: LoRAKey | None = None
    media: tuple[MediaKey, ...] = ()

    def root(self) -> bytes:
        """The hash that stands before the first page."""
        # The repr of a tuple of strings and None can be read back, so two different ones never print alike.
        return _digest(repr((self.salt, self.lora and tuple(self.lora))).encode())

    def extend(self, hashes: list[bytes], token_ids: Sequence[int], num_tokens: int, page_size: int) -> None:
        """Appends to ``hashes`` those of further pages that the first ``num_tokens`` tokens fill."""
        parent = hashes[-1] if hashes else self.root()
        for start in range(len(hashes) * page_size, num_tokens - page_size + 1, page_size):
            parent = self._page_hash(parent, token_ids[start : start + page_size], start)
            hashes.append(parent)

    def _page_hash(self, parent: bytes, token_ids: Sequence[int], start: int) -> bytes:
        content = parent + array("i", token_ids).tobytes()
        if self.media:
            end = start + len(token_ids)
            # Offsets count from the page, negative for an item that began before it: a shifted item differs.
            touching = [
                (m.content_hash, m.offset - start) for m in self.media if m.offset < end and start < m.offset + m.length
            ]
            if touching:
                content += repr(touching).encode()
        return _digest(content)


def _digest(content: bytes) -> bytes:
    """32 bytes that nobody can make collide, because a collision would hand out another request's rows."""
    return hashlib.blake2b(content, digest_size=32).digest()
