"""Filters: which variables something applies to, by type, tag, path or any predicate ``(path, value) -> bool``.

What is accepted as a filter: a predicate; a type (matches its variables and what ``type`` says it is); a string (the
variable's ``tag``); ``...`` or True (all); None or False (none); a list or tuple (any of these).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any as Anything
from typing import TypeAlias

Key: TypeAlias = Anything  # str or int, mostly
PathParts: TypeAlias = tuple[Key, ...]
Predicate: TypeAlias = Callable[[PathParts, Anything], bool]
Filter: TypeAlias = Anything


def to_predicate(filter: Filter) -> Predicate:
    """The filter as a predicate.

    Raises:
        TypeError: it is not a filter.
    """
    if isinstance(filter, str):
        return WithTag(filter)
    if isinstance(filter, type):
        return OfType(filter)
    if filter is Ellipsis or filter is True:
        return Everything()
    if filter is None or filter is False:
        return Nothing()
    if isinstance(filter, list | tuple):
        return Any(*filter)
    if callable(filter):
        return filter  # type: ignore[no-any-return]
    raise TypeError(
        f"Invalid filter {filter!r}: pass a type, a tag (str), ..., True, False, None, a list of filters, or a "
        "function of a path and a value."
    )


@dataclasses.dataclass(frozen=True)
class WithTag:
    """Matches variables whose metadata ``tag`` is this one."""

    tag: str

    def __call__(self, path: PathParts, x: Anything) -> bool:
        """Whether ``x`` matches."""
        return hasattr(x, "tag") and bool(x.tag == self.tag)


@dataclasses.dataclass(frozen=True)
class PathContains:
    """Matches what has ``key`` in its path; without ``exact``, in a part of it."""

    key: Key
    exact: bool = True

    def __call__(self, path: PathParts, x: Anything) -> bool:
        """Whether ``path`` matches."""
        if self.exact:
            return self.key in path
        return any(str(self.key) in str(part) for part in path)


class PathIn:
    """Matches what stands at one of some paths."""

    def __init__(self, *paths: PathParts) -> None:
        self.paths = frozenset(paths)

    def __call__(self, path: PathParts, x: Anything) -> bool:
        """Whether ``path`` is one of them."""
        return path in self.paths

    def __repr__(self) -> str:
        return f"PathIn({', '.join(map(repr, self.paths))})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PathIn) and self.paths == other.paths

    def __hash__(self) -> int:
        return hash(self.paths)


@dataclasses.dataclass(frozen=True)
class OfType:
    """Matches instances of a type, and what says of itself (``x.type``) that it stands for one."""

    type: type

    def __call__(self, path: PathParts, x: Anything) -> bool:
        """Whether ``x`` matches."""
        if isinstance(x, self.type):
            return True
        stands_for = getattr(type(x), "type", None) and x.type
        return isinstance(stands_for, type) and issubclass(stands_for, self.type)


class _Combined:
    def __init__(self, *filters: Filter) -> None:
        self.predicates = tuple(map(to_predicate, filters))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.predicates))})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.predicates == other.predicates

    def __hash__(self) -> int:
        return hash((type(self), self.predicates))


class Any(_Combined):
    """Matches what any of the filters matches."""

    def __call__(self, path: PathParts, x: Anything) -> bool:
        """Whether ``x`` matches."""
        return any(predicate(path, x) for predicate in self.predicates)


class All(_Combined):
    """Matches what all of the filters match."""

    def __call__(self, path: PathParts, x: Anything) -> bool:
        """Whether ``x`` matches."""
        return all(predicate(path, x) for predicate in self.predicates)


class Not(_Combined):
    """Matches what the filter does not match."""

    def __init__(self, collection_filter: Filter, /) -> None:
        super().__init__(collection_filter)

    def __call__(self, path: PathParts, x: Anything) -> bool:
        """Whether ``x`` matches."""
        return not self.predicates[0](path, x)


class Everything(_Combined):
    """Matches all."""

    def __init__(self) -> None:
        super().__init__()

    def __call__(self, path: PathParts, x: Anything) -> bool:
        """True."""
        return True


class Nothing(_Combined):
    """Matches none."""

    def __init__(self) -> None:
        super().__init__()

    def __call__(self, path: PathParts, x: Anything) -> bool:
        """False."""
        return False


def filters_to_predicates(filters: Sequence[Filter]) -> tuple[Predicate, ...]:
    """The filters as predicates, of which the first that matches takes a value.

    Raises:
        ValueError: one that matches all stands before others, which would get nothing.
    """
    for i, filter in enumerate(filters[:-1]):
        if filter is Ellipsis or filter is True:
            rest = [f for f in filters[i + 1 :] if f is not Ellipsis and f is not True]
            if rest:
                raise ValueError(f"`...` or `True` can only be used as the last filters, got {filter} at index {i}.")
    return tuple(map(to_predicate, filters))
