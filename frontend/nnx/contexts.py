"""Several objects split and merged with one numbering; changes of structure carried out of a transform of JAX.

Transforms of this package do all of this by themselves; these functions are for using JAX's directly.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Hashable, Iterator
from types import TracebackType
from typing import Any

import jax

from distaff.frontend import struct
from distaff.frontend.nnx import graph as graphs
from distaff.frontend.nnx.filters import Filter
from distaff.frontend.nnx.graphdef import Build, GraphDef, NodeDef, nested_leaves
from distaff.frontend.nnx.object_trees import is_object
from distaff.frontend.nnx.state import FlatState, State, split_flat
from distaff.frontend.nnx.structure import Walk
from distaff.frontend.nnx.variables import Variable

_Decorated = Callable[..., Any]


class UpdateContext:
    """Which objects are which on the way into a transform's function and out of it: see ``nnx.update_context``."""

    def __init__(self, tag: Hashable) -> None:
        self.tag = tag
        self.outer: list[Any] = []  # the objects of the first split, by number
        self.inner: list[Any] = []  # what the function was given for them

    def known_inside(self, objects: list[Any]) -> tuple[tuple[int, int], ...]:
        """For objects split inside, which of the outer ones they stand for."""
        numbers = {id(x): i for i, x in enumerate(self.inner)}
        return tuple((i, numbers[id(x)]) for i, x in enumerate(objects) if id(x) in numbers)


class _Contexts(threading.local):
    def __init__(self) -> None:
        self.stacks: dict[Hashable, list[UpdateContext]] = {}


_contexts = _Contexts()


def current_update_context(tag: Hashable) -> UpdateContext:
    """The innermost running ``nnx.update_context`` of this tag.

    Raises:
        ValueError: there is none.
    """
    stack = _contexts.stacks.get(tag)
    if not stack:
        raise ValueError(f"No update context with the tag {tag!r} is running; use `with nnx.update_context({tag!r})`.")
    return stack[-1]


class update_context:
    """A ``with`` block, or a decorator, in which objects keep their identity through a hand-written transform.

    Four steps with the same ``tag`` take objects through: ``split_context(tag)`` outside, ``merge_context(tag, True)``
    in the function, ``split_context(tag)`` there, and ``merge_context(tag, False)`` outside, which changes the objects
    that were split at first.
    """

    def __init__(self, tag: Hashable) -> None:
        self.tag = tag

    def __enter__(self) -> UpdateContext:
        context = UpdateContext(self.tag)
        _contexts.stacks.setdefault(self.tag, []).append(context)
        return context

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _contexts.stacks[self.tag].pop()

    def __call__(self, fn: _Decorated) -> _Decorated:
        """Run ``fn`` in such a block at each call."""

        @functools.wraps(fn)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with update_context(self.tag):
                return fn(*args, **kwargs)

        return wrapped


class SplitContext:
    """Splits objects with one numbering: what they share stays shared when they are merged in the same order."""

    def __init__(self, context: UpdateContext | None = None) -> None:
        self._walk = Walk()
        self._context = context

    def flatten(self, node: Any, *filters: Filter, with_paths: bool = True) -> tuple[Any, ...]:
        """The definition and a ``FlatState`` (one for each filter); without ``with_paths``, a list of raw values."""
        ((start, end),) = self._walk.visit_all([node])
        cells = self._walk.cells[start:end]
        context = self._context
        outer = () if context is None or not context.inner else context.known_inside(self._walk.objects)
        definition: GraphDef[Any] = GraphDef(self._walk.specs[-1], len(cells), outer=outer)
        if not with_paths:
            return definition, [cell._raw_value for cell in cells]
        leaves = [cell if isinstance(cell, Variable) else cell._raw_value for cell in cells]
        flat = FlatState.from_sorted_keys_values(definition.paths, leaves)
        return (definition, *split_flat(flat, filters)) if filters else (definition, flat)

    def split(self, node: Any, *filters: Filter) -> tuple[Any, ...]:
        """As ``nnx.split``."""
        definition, *flat = self.flatten(node, *filters)
        if not filters and not isinstance(definition.root, NodeDef):
            return definition, flat[0].leaves[0] if flat[0].leaves else State({})
        if not filters:
            return definition, State(nested_leaves(definition.root, iter(flat[0].leaves)), _copy=False)
        return (definition, *(group.to_nested_state() for group in flat))


class MergeContext:
    """Merges what a ``SplitContext`` split, in the same order."""

    def __init__(self, build: Build, context: UpdateContext | None, inner: bool) -> None:
        self._build = build
        self._context = context
        self._inner = inner

    def merge(self, graphdef: GraphDef[Any], state: Any, /, *states: Any) -> Any:
        """As ``nnx.merge``; outside an update, the objects that were split at first, changed."""
        if self._context is not None and not self._inner:
            outer = self._context.outer
            self._build.reuse({new: outer[old] for new, old in graphdef.outer})
        leaves = graphs.leaves_in_order(graphdef, [state, *states])
        return self._build.make_with(graphdef.root, leaves)

    unflatten = merge


@contextlib.contextmanager
def split_context(ctxtag: Hashable | None = None) -> Iterator[SplitContext]:
    """Split several objects with one numbering; with the tag of a running ``nnx.update_context``, as a step of it."""
    context = None if ctxtag is None else current_update_context(ctxtag)
    split = SplitContext(context)
    yield split
    if context is not None and not context.outer:
        context.outer = split._walk.objects


@contextlib.contextmanager
def merge_context(ctxtag: Hashable | None = None, inner: bool | None = None) -> Iterator[MergeContext]:
    """Merge several objects that were split in one ``split_context``.

    Args:
        ctxtag: the tag of a running ``nnx.update_context``, of which this is a step then.
        inner: whether this is inside the transform's function (True) or after it (False).

    Raises:
        ValueError: only one of the two is given.
    """
    if (ctxtag is None) != (inner is None):
        raise ValueError("Give both `ctxtag` and `inner`, or neither.")
    context = None if ctxtag is None else current_update_context(ctxtag)
    build = Build()
    yield MergeContext(build, context, bool(inner))
    if context is not None and inner:
        context.inner = [build.objects[i] for i in sorted(build.objects)]


class NodeStates(struct.PyTreeNode):
    """An object in a tree of JAX: its definition, static, and its states."""

    _graphdef: GraphDef[Any] | None = struct.field(pytree_node=False)
    states: tuple[Any, ...]
    metadata: Any = struct.field(pytree_node=False, default=None)

    @property
    def graphdef(self) -> GraphDef[Any]:
        """The definition.

        Raises:
            ValueError: there is none.
        """
        if self._graphdef is None:
            raise ValueError("These NodeStates have no definition, only states.")
        return self._graphdef

    @property
    def state(self) -> Any:
        """The state, if it is the only one.

        Raises:
            ValueError: there are several.
        """
        if len(self.states) != 1:
            raise ValueError(f"These NodeStates have {len(self.states)} states; use `states`.")
        return self.states[0]

    @classmethod
    def from_split(
        cls, graphdef: GraphDef[Any] | None, state: Any, /, *states: Any, metadata: Any = None
    ) -> NodeStates:
        """Of what ``split`` returned."""
        return cls(_graphdef=graphdef, states=(state, *states), metadata=metadata)

    @classmethod
    def from_states(cls, state: Any, *states: Any) -> NodeStates:
        """Of states alone."""
        return cls(_graphdef=None, states=(state, *states))

    @classmethod
    def from_prefixes(cls, prefixes: Any, /, *, metadata: Any = None) -> NodeStates:
        """Of what a transform's specification says of each state."""
        return cls(_graphdef=None, states=tuple(prefixes), metadata=metadata)


def to_tree(tree: Any, /, *, ctxtag: Hashable | None = None) -> Any:
    """The tree with ``NodeStates`` in the places of objects, which share one numbering: a tree for JAX's transforms."""
    with split_context(ctxtag) as context:
        return jax.tree.map(
            lambda x: NodeStates.from_split(*context.split(x)) if is_object(x) else x, tree, is_leaf=is_object
        )


def from_tree(tree: Any, /, *, is_inner: bool | None = None, ctxtag: Hashable | None = None) -> Any:
    """The inverse of ``to_tree``."""

    def is_states(x: Any) -> bool:
        return isinstance(x, NodeStates)

    with merge_context(ctxtag, is_inner) as context:
        return jax.tree.map(
            lambda x: context.merge(x.graphdef, *x.states) if is_states(x) else x, tree, is_leaf=is_states
        )
