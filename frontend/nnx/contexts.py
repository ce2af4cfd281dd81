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
from distaff.frontend.nnx import graph_functions as graphs
from distaff.frontend.nnx.filters import Filter
from distaff.frontend.nnx.graphdef import Build, GraphDef, NodeDef, NoUpdate, as_output, nested_leaves
from distaff.frontend.nnx.object_trees import is_object
from distaff.frontend.nnx.prefix_mapping import broadcast_prefix
from distaff.frontend.nnx.state import FlatState, State, split_flat
from distaff.frontend.nnx.stored_values import changes_in_place
from distaff.frontend.nnx.structure import Walk
from distaff.frontend.nnx.traversal import iter_graph
from distaff.frontend.nnx.variables import Variable

_Decorated = Callable[..., Any]
MISSING: Any = object()


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
        if context is not None and context.inner:
            known = {id(x) for x in context.inner}
            leaves = [_leaving(x, id(x) in known) for x in leaves]
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


def _leaving(x: Any, known: bool) -> Any:
    """A variable or mutable array on its way out of a transform, which these cannot pass themselves."""
    stored = x._raw_value if isinstance(x, Variable) else x
    if not changes_in_place(stored):
        return x
    passed = NoUpdate() if known else as_output(stored)
    return x._of(passed, x._var_metadata) if isinstance(x, Variable) else passed


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

    _graphdef: GraphDef[Any] | None
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


def is_tree_node(x: Any) -> bool:
    """Whether ``x`` is what ``to_tree`` puts in the place of an object."""
    return isinstance(x, NodeStates)


def merge_tree_node(context: MergeContext, path: Any, prefix: Any, leaf: NodeStates) -> Any:
    """The object of ``NodeStates``: how ``from_tree`` merges if it is not told."""
    return context.merge(leaf.graphdef, *leaf.states)


def _split_object(context: SplitContext, path: Any, prefix: Any, leaf: Any) -> NodeStates:
    return NodeStates.from_split(*context.split(leaf))


def _map_with_prefix(f: Callable[[Any, Any, Any], Any], tree: Any, prefix: Any, is_leaf: Callable[[Any], bool]) -> Any:
    """The tree of ``f(key path, what the prefix has there, leaf)``."""
    treedef: Any
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    given = [prefix] * len(leaves)
    if prefix is not MISSING and prefix is not None:
        given = broadcast_prefix(prefix, tree, lambda x: x is None or is_leaf(x), is_leaf)
    return treedef.unflatten([f(path, of, leaf) for (path, leaf), of in zip(leaves, given, strict=True)])


def _check_prefixes(first: dict[int, tuple[Any, Any]], path: Any, prefix: Any, node: Any) -> None:
    """Raise ValueError if something in an object stood at a place with another prefix before."""
    for _, x in iter_graph(node, graph=True):
        if is_object(x):
            where, before = first.setdefault(id(x), (path, prefix))
            if before != prefix:
                there, here = map(jax.tree_util.keystr, (where, path))
                raise ValueError(
                    f"Inconsistent aliasing detected: a {type(x).__name__} stands at {there} and at {here}, with the "
                    f"prefix {before!r} there and {prefix!r} here."
                )


def to_tree(
    tree: Any,
    /,
    *,
    prefix: Any = MISSING,
    split_fn: Callable[[SplitContext, Any, Any, Any], Any] = _split_object,
    map_non_graph_nodes: bool = False,
    ctxtag: Hashable | None = None,
    check_aliasing: bool = True,
) -> Any:
    """The tree with ``NodeStates`` in the places of objects, which share one numbering: a tree for JAX's transforms.

    Args:
        tree: what holds objects.
        prefix: a prefix of the tree, such as axes, whose parts ``split_fn`` gets.
        split_fn: ``(context, key path, prefix, object) -> what to put in its place``.
        map_non_graph_nodes: call ``split_fn`` with other leaves too.
        ctxtag: the tag of a running ``nnx.update_context``, of which this is a step then.
        check_aliasing: refuse objects that stand at places with different prefixes.

    Raises:
        ValueError: the prefix has another structure, or different parts for places of one object.
    """
    first: dict[int, tuple[Any, Any]] = {}
    with split_context(ctxtag) as context:

        def split(path: Any, prefix: Any, leaf: Any) -> Any:
            if not is_object(leaf):
                return split_fn(context, path, prefix, leaf) if map_non_graph_nodes else leaf
            if check_aliasing and prefix is not MISSING:
                _check_prefixes(first, path, prefix, leaf)
            return split_fn(context, path, prefix, leaf)

        return _map_with_prefix(split, tree, prefix, is_object)


def from_tree(
    tree: Any,
    /,
    *,
    prefix: Any = MISSING,
    merge_fn: Callable[[MergeContext, Any, Any, Any], Any] = merge_tree_node,
    is_node_leaf: Callable[[Any], bool] = is_tree_node,
    is_leaf: Callable[[Any], bool] = is_tree_node,
    map_non_graph_nodes: bool = False,
    is_inner: bool | None = None,
    ctxtag: Hashable | None = None,
) -> Any:
    """The inverse of ``to_tree``.

    Args:
        tree: what ``to_tree`` returned.
        prefix: a prefix of the tree, whose parts ``merge_fn`` gets.
        merge_fn: ``(context, key path, prefix, leaf) -> object``.
        is_node_leaf: which leaves are given to ``merge_fn``.
        is_leaf: which parts of the tree are leaves.
        map_non_graph_nodes: call ``merge_fn`` with all leaves.
        is_inner: as ``inner`` of ``nnx.merge_context``.
        ctxtag: as of ``nnx.merge_context``.

    Raises:
        ValueError: the prefix has another structure; only one of ``is_inner`` and ``ctxtag`` is given.
    """
    with merge_context(ctxtag, is_inner) as context:

        def merge(path: Any, prefix: Any, leaf: Any) -> Any:
            return merge_fn(context, path, prefix, leaf) if map_non_graph_nodes or is_node_leaf(leaf) else leaf

        return _map_with_prefix(merge, tree, prefix, is_leaf)


def clear_non_graph_nodes(tree: Any) -> Any:
    """The tree with None for all that is no object."""
    return jax.tree.map(lambda x: x if is_object(x) else None, tree, is_leaf=is_object)
