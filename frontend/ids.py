"""Identities of modules: unlike those of ``id()`` never given out twice, and not shared by copies."""

from __future__ import annotations

import itertools


class FlaxId:
    """An identity, equal to itself alone; a copy of it is a new one."""

    __slots__ = ("id",)

    def __init__(self, rawid: int) -> None:
        self.id = rawid

    def __repr__(self) -> str:
        return f"FlaxId({self.id})"

    def __copy__(self) -> FlaxId:
        return uuid()

    def __deepcopy__(self, memo: object) -> FlaxId:
        return uuid()


class UUIDManager:
    """Gives out identities, each once; in any thread."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def __call__(self) -> FlaxId:
        """A new identity."""
        return FlaxId(next(self._numbers))


uuid = UUIDManager()
