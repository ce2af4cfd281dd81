"""Nested mappings as flat ones, keyed by path, and back: the names of ``flax.nnx.traversals``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from distaff.frontend.traverse_util import empty_node as empty_node
from distaff.frontend.traverse_util import unflatten_dict

IsLeaf = Callable[[tuple[Any, ...], Mapping[Any, Any]], bool]


def _flat(xs: Any, path: tuple[Any, ...], is_leaf: IsLeaf | None, keep_empty: bool) -> Iterator[tuple[Any, Any]]:
    if not isinstance(xs, Mapping) or (is_leaf is not None and is_leaf(path, xs)):
        yield path, xs
    elif keep_empty and path and not xs:
        yield path, empty_node
    else:
        for key, value in xs.items():
            yield from _flat(value, (*path, key), is_leaf, keep_empty)


def flatten_to_sequence(xs: Mapping[Any, Any], /, *, is_leaf: IsLeaf | None = None) -> list[tuple[Any, Any]]:
    """Pairs of a path and a value; empty mappings are dropped, and kept whole is what ``is_leaf(path, mapping)`` says.

    Raises:
        TypeError: ``xs`` is no mapping.
    """
    return list(_flat(_checked(xs), (), is_leaf, False))


def flatten_mapping(
    xs: Mapping[Any, Any],
    /,
    *,
    keep_empty_nodes: bool = False,
    is_leaf: IsLeaf | None = None,
    sep: str | None = None,
) -> dict[Any, Any]:
    """As ``traverse_util.flatten_dict``, of any mapping, such as a ``State``.

    Raises:
        TypeError: ``xs`` is no mapping.
    """
    pairs = _flat(_checked(xs), (), is_leaf, keep_empty_nodes)
    return {path if sep is None else sep.join(path): value for path, value in pairs}


def _checked(xs: Any) -> Any:
    if not isinstance(xs, Mapping):
        raise TypeError(f"Only mappings can be made flat, got {type(xs)}.")
    return xs


def unflatten_mapping(
    xs: Mapping[Any, Any] | Iterable[tuple[Any, Any]], /, *, sep: str | None = None
) -> dict[Any, Any]:
    """The inverse of ``flatten_mapping`` and ``flatten_to_sequence``."""
    return unflatten_dict(dict(xs), sep=sep)
