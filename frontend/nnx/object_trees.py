"""Where objects (nodes, variables, mutable arrays, states) stand in a tree, and trees with something else there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from distaff.frontend.nnx.kinds import Kind, kind_of
from distaff.frontend.nnx.state import State


def is_object(x: Any) -> bool:
    """Whether transforms take ``x`` apart: nodes, variables, mutable arrays and states."""
    return kind_of(x) <= Kind.REF or isinstance(x, State)


class Layout(NamedTuple):
    """Where objects stand in a tree: its treedef with them as leaves, and which of the leaves they are."""

    treedef: Any
    positions: tuple[int, ...]


WHOLE = Layout(None, ())  # the tree is an object itself


class Taken(NamedTuple):
    """A tree without its objects.

    Attributes:
        leaves: its leaves, None where an object stood; the tree itself if ``layout`` is None.
        layout: where the objects stood; None if there are none.
        objects: them.
    """

    leaves: Any
    layout: Layout | None
    objects: list[Any]


def take_tree(tree: Any) -> Taken:
    """Find the objects in a tree."""
    kind = kind_of(tree)
    if kind <= Kind.REF or isinstance(tree, State):
        return Taken(None, WHOLE, [tree])
    if kind is not Kind.CONTAINER:
        return Taken(tree, None, [])
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_object)
    positions = tuple(i for i, leaf in enumerate(leaves) if is_object(leaf))
    if not positions:
        return Taken(tree, None, [])
    return Taken(leaves, Layout(treedef, positions), [leaves[i] for i in positions])


def put_tree(leaves: Any, layout: Layout | None, values: Iterable[Any]) -> Any:
    """The tree with other values where its objects stood."""
    if layout is None:
        return leaves
    if layout is WHOLE:
        (value,) = values
        return value
    leaves = list(leaves)
    for position, value in zip(layout.positions, values, strict=True):
        leaves[position] = value
    return layout.treedef.unflatten(leaves)


def count_objects(layout: Layout | None) -> int:
    """How many objects stand in a tree."""
    return 0 if layout is None else 1 if layout is WHOLE else len(layout.positions)
