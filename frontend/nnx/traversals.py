"""Nested mappings as flat ones, keyed by path, and back: the names of ``flax.nnx.traversals``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from distaff.frontend.traverse_util import empty_node as empty_node
from distaff.frontend.traverse_util import flat_items, unflatten_dict

IsLeaf = Callable[[tuple[Any, ...], Mapping[Any, Any]], bool]


def flatten_to_sequence(xs: Mapping[Any, Any], /, *, is_leaf: IsLeaf | None = None) -> list[tuple[Any, Any]]:
    """Pairs of a path and a value; empty mappings are dropped, and kept whole is what ``is_leaf(path, mapping)`` says.

    Raises:
        TypeError: ``xs`` is no mapping.
    """
    return list(flat_items(_checked(xs), (Mapping,), False, is_leaf))


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
    pairs = flat_items(_checked(xs), (Mapping,), keep_empty_nodes, is_leaf)
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
