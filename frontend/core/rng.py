"""Random keys by path: a key, and the names and counts that are folded into it when a number is drawn.

A stream (``params``, ``dropout``, …) starts at the key that the user gave. Each submodule appends its name and each
draw its number; ``as_jax_rng`` folds the whole path in at once, as the first four bytes of its SHA-1 hash. The values
are those that Flax gives for the same key and path, so parameters initialise equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from distaff.frontend import struct
from distaff.frontend.configurations import config

PRNGKey: TypeAlias = jax.Array


@struct.dataclass
class LazyRng:
    """A key with a path that is still to be folded in."""

    rng: PRNGKey
    suffix: tuple[str | int, ...] = struct.field(default=(), pytree_node=False)

    @classmethod
    def create(cls, rng: LazyRng | PRNGKey, *suffix: str | int) -> LazyRng:
        """``rng`` with ``suffix`` appended to its path."""
        if isinstance(rng, LazyRng):
            return cls(rng.rng, rng.suffix + suffix)
        return cls(rng, suffix)

    def clear_suffix(self) -> LazyRng:
        """The same key without a path."""
        return LazyRng(self.rng)

    def as_jax_rng(self) -> PRNGKey:
        """The key with its path folded in."""
        if not self.suffix:
            return self.rng
        return jax.random.fold_in(self.rng, np.uint32(_path_hash(self.suffix)))


def _path_hash(path: tuple[str | int, ...]) -> int:
    digest = hashlib.sha1(usedforsecurity=False)
    for part in path:
        if config.flax_fix_rng_separator:
            digest.update(b"\0")
        if isinstance(part, str):
            digest.update(part.encode())
        else:
            digest.update(part.to_bytes((part.bit_length() + 7) // 8, "big"))
    return int.from_bytes(digest.digest()[:4], "big")


class KeyCounters:
    """How many keys were drawn from each stream in one scope, and in its children by name."""

    __slots__ = ("children", "drawn")

    def __init__(self) -> None:
        self.drawn: dict[str, int] = {}
        self.children: dict[str, KeyCounters] = {}

    def next(self, stream: str) -> int:
        """Count one more draw and return its number, from 1."""
        count = self.drawn[stream] = self.drawn.get(stream, 0) + 1
        return count

    def child(self, name: str) -> KeyCounters:
        """The counters of the child scope ``name``, the same ones at each call."""
        return self.children.setdefault(name, KeyCounters())

    def flat(self) -> dict[tuple[str, ...], int]:
        """The counts by path: the names of the children, then the stream."""
        counts: dict[tuple[str, ...], int] = {(stream,): count for stream, count in self.drawn.items()}
        for name, child in self.children.items():
            counts.update({(name, *path): count for path, count in child.flat().items()})
        return counts

    def set_flat(self, counts: Mapping[tuple[str, ...], int]) -> None:
        """Set the counts at these paths."""
        for (*names, stream), count in counts.items():
            counters = self
            for name in names:
                counters = counters.child(name)
            counters.drawn[stream] = count


def is_valid_rng(rng: Any) -> bool:
    """Whether ``rng`` is one random key, of the typed or of the raw uint32 kind."""
    if isinstance(rng, LazyRng):
        return True
    if not isinstance(rng, np.ndarray | jax.Array):
        return False
    if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        return rng.shape == ()
    raw = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    return (rng.shape, rng.dtype) == (raw.shape, raw.dtype)


def is_valid_rngs(rngs: Any) -> bool:
    """Whether ``rngs`` is a mapping of stream names to keys."""
    return isinstance(rngs, Mapping) and all(isinstance(name, str) and is_valid_rng(rng) for name, rng in rngs.items())
