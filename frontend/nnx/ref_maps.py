"""Which number an object has in a definition, and which object a number stands for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any


class RefMap(MutableMapping[Any, int]):
    """Numbers of objects, which are told apart by identity."""

    def __init__(self, items: Mapping[Any, int] | Iterable[tuple[Any, int]] = ()) -> None:
        self._entries: dict[int, tuple[Any, int]] = {}
        self.update(items)

    @classmethod
    def from_indexmap(cls, indexmap: Mapping[int, Any]) -> RefMap:
        """The inverse of an ``IndexMap``."""
        return cls((x, number) for number, x in indexmap.items())

    def __getitem__(self, key: Any) -> int:
        return self._entries[id(key)][1]

    def __setitem__(self, key: Any, value: int) -> None:
        self._entries[id(key)] = key, value

    def __delitem__(self, key: Any) -> None:
        del self._entries[id(key)]

    def __contains__(self, key: object) -> bool:
        return id(key) in self._entries

    def __iter__(self) -> Iterator[Any]:
        return (x for x, _ in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)


class IndexMap(dict[int, Any]):
    """Objects by number."""

    @classmethod
    def from_refmap(cls, refmap: Mapping[Any, int]) -> IndexMap:
        """The inverse of a ``RefMap``."""
        return cls((number, x) for x, number in refmap.items())
