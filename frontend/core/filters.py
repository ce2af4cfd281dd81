"""Collection filters: which variable collections (or random streams) something applies to.

A filter is a bool (all or none), one name, a collection of names, or a ``DenyList`` (all but these).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, Union

from distaff.frontend import errors


@dataclasses.dataclass(frozen=True)
class DenyList:
    """Matches every collection except those that ``deny`` matches; ``DenyList("params")`` is all but ``params``."""

    deny: CollectionFilter


CollectionFilter: TypeAlias = Union[bool, str, Collection[str], DenyList]  # noqa: UP007 (DenyList is a forward name)


def in_filter(filter_like: CollectionFilter, col: str) -> bool:
    """Whether the filter matches the collection ``col``."""
    if isinstance(filter_like, bool):
        return filter_like
    if isinstance(filter_like, str):
        return col == filter_like
    if isinstance(filter_like, DenyList):
        return not in_filter(filter_like.deny, col)
    if isinstance(filter_like, Collection):
        return col in filter_like
    raise errors.InvalidFilterError(filter_like)


def is_filter_empty(filter_like: CollectionFilter) -> bool:
    """Whether the filter can match nothing."""
    if isinstance(filter_like, DenyList):
        return filter_like.deny is True
    return not filter_like and not isinstance(filter_like, str)


def _names(filter_like: CollectionFilter) -> set[str]:
    """The names that a finite filter matches."""
    if filter_like is False:
        return set()
    if isinstance(filter_like, str):
        return {filter_like}
    if isinstance(filter_like, Collection):
        return set(filter_like)
    raise errors.InvalidFilterError(filter_like)


def _split(filter_like: CollectionFilter) -> tuple[bool, set[str]]:
    """A filter as (inverted, names): it matches the names, or with ``inverted`` all others."""
    if filter_like is True:
        return True, set()
    if isinstance(filter_like, DenyList):
        inverted, names = _split(filter_like.deny)
        return not inverted, names
    return False, _names(filter_like)


def _join(inverted: bool, names: set[str]) -> CollectionFilter:
    if not inverted:
        return names
    return DenyList(names) if names else True


def intersect_filters(a: CollectionFilter, b: CollectionFilter) -> CollectionFilter:
    """The filter that matches what both match."""
    if a is True or b is True:
        return b if a is True else a
    (a_inverted, a_names), (b_inverted, b_names) = _split(a), _split(b)
    if a_inverted and b_inverted:
        return _join(True, a_names | b_names)
    if a_inverted:
        return b_names - a_names
    return a_names - b_names if b_inverted else a_names & b_names


def union_filters(a: CollectionFilter, b: CollectionFilter) -> CollectionFilter:
    """The filter that matches what either matches."""
    inverted, names = _split(intersect_filters(DenyList(a), DenyList(b)))
    return _join(not inverted, names)


def subtract_filters(a: CollectionFilter, b: CollectionFilter) -> CollectionFilter:
    """The filter that matches what ``a`` matches and ``b`` does not."""
    return False if b is True else intersect_filters(a, DenyList(b))


def group_collections(xs: Mapping[str, Any], col_filters: Sequence[CollectionFilter]) -> tuple[dict[str, Any], ...]:
    """Deal the collections out to the filters: each goes to the first filter that matches it, or to none."""
    remaining: Iterable[str] = list(xs)
    groups = []
    for filter_like in col_filters:
        groups.append({col: xs[col] for col in remaining if in_filter(filter_like, col)})
        remaining = [col for col in remaining if not in_filter(filter_like, col)]
    return tuple(groups)
