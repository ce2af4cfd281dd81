"""Nested dicts as flat ones, keyed by path, and back (``flax.traverse_util``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from distaff.frontend import struct
from distaff.frontend.core.frozen_dict import FrozenDict


@struct.dataclass
class _EmptyNode:
    """Stands for an empty dict in a flattened one."""


empty_node = _EmptyNode()


def flatten_dict(
    xs: Mapping[Any, Any],
    keep_empty_nodes: bool = False,
    is_leaf: Callable[[tuple[Any, ...], Any], bool] | None = None,
    sep: str | None = None,
) -> dict[Any, Any]:
    """Flatten a nested dict: ``{"a": {"b": 1}}`` becomes ``{("a", "b"): 1}``, or with ``sep="/"`` ``{"a/b": 1}``.

    Args:
        xs: a dict or ``FrozenDict``, nested.
        keep_empty_nodes: keep empty dicts inside, as ``empty_node``; otherwise they are dropped.
        is_leaf: called with path and value; True keeps a dict whole.
        sep: joins the parts of a path, which must then be strings.
    """
    if not isinstance(xs, FrozenDict | dict):
        raise TypeError(f"flatten_dict takes a dict or FrozenDict, got {type(xs)}")
    flat: dict[Any, Any] = {}

    def visit(value: Any, path: tuple[Any, ...]) -> None:
        if not isinstance(value, FrozenDict | dict) or (is_leaf and is_leaf(path, value)):
            flat[path if sep is None else sep.join(path)] = value
        elif value:
            for key, item in value.items():
                visit(item, (*path, key))
        elif keep_empty_nodes and path:
            flat[path if sep is None else sep.join(path)] = empty_node

    visit(xs, ())
    return flat


def unflatten_dict(xs: Mapping[Any, Any], sep: str | None = None) -> dict[Any, Any]:
    """The inverse of ``flatten_dict``: ``{("a", "b"): 1}`` becomes ``{"a": {"b": 1}}``."""
    if not isinstance(xs, Mapping):
        raise TypeError(f"unflatten_dict takes a dict, got {type(xs)}")
    nested: dict[Any, Any] = {}
    for path, value in xs.items():
        *parents, last = path if sep is None else path.split(sep)
        cursor = nested
        for key in parents:
            cursor = cursor.setdefault(key, {})
        cursor[last] = {} if value is empty_node else value
    return nested


def path_aware_map(f: Callable[[tuple[Any, ...], Any], Any], nested_dict: Mapping[Any, Any]) -> dict[Any, Any]:
    """Map ``f(path, leaf)`` over the leaves of a nested dict."""
    flat = flatten_dict(nested_dict, keep_empty_nodes=True)
    return unflatten_dict({path: x if x is empty_node else f(path, x) for path, x in flat.items()})
