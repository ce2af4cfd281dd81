"""The walk over an object graph, and its result kept on the root: a call verifies it instead of walking again.

What a walk found holds as long as every object still has the very same attributes, every variable the same metadata,
and every list, dict and changeable constant the same content. All of that is compared, by identity where that is
enough; no assignment has to be noticed when it happens.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, compress, pairwise
from typing import Any

import jax

from distaff.frontend.nnx.filters import PathParts
from distaff.frontend.nnx.graphdef import (
    LEAF,
    NO_METADATA,
    Constant,
    GraphDef,
    NodeDef,
    NodeRef,
    Spec,
    VariableDef,
    fingerprint,
    iter_specs,
    may_change,
)
from distaff.frontend.nnx.kinds import Kind, kind_of
from distaff.frontend.nnx.pytrees import Pytree, sorted_attributes
from distaff.frontend.nnx.state import State, sorted_keys
from distaff.frontend.nnx.variables import Variable

_MAX_KEPT = 4  # structures kept on one root: of it alone, and with others as arguments of functions


class AttributeCell:
    """An array that is an attribute of a node or an item of a dict; read and written as a ``Variable`` is."""

    __slots__ = ("attributes", "name")

    def __init__(self, attributes: dict[str, Any], name: str) -> None:
        self.attributes = attributes
        self.name = name

    @property
    def _raw_value(self) -> Any:
        return self.attributes[self.name]

    def write(self, value: Any) -> None:
        """Assign it."""
        self.attributes[self.name] = value


class ItemCell:
    """An array inside a list, tuple or the like, which is not assigned: the container is replaced instead."""

    __slots__ = ("_raw_value",)

    def __init__(self, value: Any) -> None:
        self._raw_value = value

    def write(self, value: Any) -> None:
        """Refuse: a change here is one of structure."""
        raise AssertionError("An array inside a container was assigned by itself.")


Cell = Variable[Any] | AttributeCell | ItemCell


def key_of(entry: Any) -> Any:
    """What a key path's entry stands for in our paths."""
    for name in ("key", "name", "idx"):
        if hasattr(entry, name):
            return getattr(entry, name)
    return entry


def raw_mapping(container: Any) -> dict[Any, Any] | None:
    """The dict behind a dict or ``State``; None for other containers."""
    if type(container) is dict:
        return container
    return container._mapping if isinstance(container, State) else None


def container_items(container: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """Keys and children of a container, and its treedef if it is not a plain list, tuple, dict or ``State``."""
    if type(container) in (list, tuple):
        return list(enumerate(container)), None
    mapping = raw_mapping(container)
    if mapping is not None:
        return [(key, mapping[key]) for key in sorted_keys(mapping)], None
    pairs, treedef = jax.tree_util.tree_flatten_with_path(container, is_leaf=lambda x: x is not container)
    return [(key_of(path[0]), child) for path, child in pairs], treedef


def paths_to(x: Any, roots: Sequence[Any]) -> list[PathParts]:
    """The paths of the places where an object stands; with the number of the root first if there are several."""
    found: list[PathParts] = []

    def visit(y: Any, path: PathParts, above: tuple[int, ...]) -> None:
        if y is x:
            found.append(path)
        if id(y) in above:
            return
        kind, inside = kind_of(y), (*above, id(y))
        if kind is Kind.NODE:
            for key, name in sorted_attributes(y):
                visit(y.__dict__[name], (*path, key), inside)
        elif kind is Kind.CONTAINER:
            for key, child in container_items(y)[0]:
                visit(child, (*path, key), inside)

    for i, root in enumerate(roots):
        visit(root, (i,) if len(roots) > 1 else (), ())
    return found


def duplicate_message(x: Any, paths: Sequence[PathParts]) -> str:
    """What is wrong with an object that stands at several places, in tree mode."""
    return (
        f"Duplicate {type(x).__name__} found at paths: {', '.join(map(str, paths))}. Tree mode (graph=False) does not "
        "support shared references: a variable may stand at one place only, and no node inside itself. Remove the "
        "duplicate, make a copy with nnx.clone(), or use graph mode: graph=True, or nnx.set_graph_mode(True)."
    )


def opaque_message(x: Any, paths: Sequence[PathParts]) -> str:
    """What is wrong with an object that is no pytree, in tree mode."""
    return (
        f"{type(x).__name__} was defined with pytree=False, so that tree mode (graph=False) cannot look into it. Found "
        f"at path {paths[0] if paths else ()}. Leave pytree=False out of the class, or use graph mode: graph=True."
    )


class Walk:
    """One pass over some roots, which share one numbering of nodes and variables.

    Args:
        graph: follow shared references and cycles; otherwise all must be a tree, and what stands in containers is data.
        known: objects that have the first numbers already, as if they had been visited.
    """

    def __init__(self, graph: bool = True, known: Iterable[Any] = ()) -> None:
        self._graph = graph
        self.objects: list[Any] = list(known)
        self._index: dict[int, int] = {id(x): i for i, x in enumerate(self.objects)}
        self._open: set[int] = set()  # nodes that the walk is inside of
        self._roots: list[Any] = []
        self.specs: list[Spec] = []
        self.cells: list[Cell] = []
        self.dicts: list[dict[str, Any]] = []
        self.containers: list[tuple[Any, list[Any], Any]] = []
        self.changeable: list[Constant] = []

    def visit_all(self, roots: Iterable[Any]) -> list[tuple[int, int]]:
        """Visit roots; gives of each which of the ``cells`` are its own."""
        ends = [len(self.cells)]
        for root in roots:
            self._roots.append(root)
            self.specs.append(self.visit(root, as_data=True))
            ends.append(len(self.cells))
        return list(pairwise(ends))

    def visit(self, x: Any, as_data: bool = False) -> Spec:
        """The definition of a value; with ``as_data`` it is a leaf if it is nothing else."""
        kind = kind_of(x)
        if kind is Kind.VARIABLE:
            return self._variable(x)
        if kind is Kind.NODE:
            return self._node(x)
        if kind is Kind.CONTAINER:
            return self._container(x)
        if kind is Kind.REF:
            return self._ref(x, ItemCell(x))
        if kind is Kind.DATA or as_data:
            self.cells.append(ItemCell(x))
            return LEAF
        return self._constant(x)

    def _ref(self, x: Any, cell: Cell) -> VariableDef | NodeRef:
        """A mutable array: its definition is that of a variable without metadata."""
        known = self._index.get(id(x))
        if known is not None:
            return self._again(x, known)
        self.cells.append(cell)
        return VariableDef(jax.Ref, self._number(x), NO_METADATA)

    def _again(self, x: Any, known: int) -> NodeRef:
        if not self._graph:
            raise ValueError(duplicate_message(x, paths_to(x, self._roots)))
        return NodeRef(type(x), known)

    def _constant(self, x: Any) -> Constant:
        constant = Constant(x)
        if may_change(x):
            self.changeable.append(constant)
        return constant

    def _number(self, x: Any) -> int:
        index = self._index[id(x)] = len(self.objects)
        self.objects.append(x)
        return index

    def _variable(self, x: Variable[Any]) -> VariableDef | NodeRef:
        known = self._index.get(id(x))
        if known is not None:
            return self._again(x, known)
        self.cells.append(x)
        metadata = x._var_metadata
        return VariableDef(type(x), self._number(x), Constant(metadata) if metadata else NO_METADATA)

    def _node(self, node: Pytree) -> NodeDef | NodeRef:
        known = self._index.get(id(node))
        if known is not None and (self._graph or id(node) in self._open):
            return self._again(node, known)
        index = self._number(node)
        attributes = node.__dict__
        self.dicts.append(attributes)
        statuses = node._pytree__nodes
        opaque = not node._pytree__is_pytree
        if not self._graph:
            if opaque:
                raise ValueError(opaque_message(node, paths_to(node, self._roots)))
            self._open.add(id(node))
        specs: list[tuple[Any, Spec]] = []
        for key, name in sorted_attributes(node):
            value = attributes[name]
            kind = kind_of(value)
            status = statuses.get(name) if statuses else None
            spec: Spec
            if kind is Kind.VARIABLE:
                spec = self._variable(value)
            elif kind is Kind.NODE:
                spec = self._node(value)
            elif kind is Kind.CONTAINER and (status or opaque):
                spec = self._container(value)
            elif kind is Kind.REF:
                spec = self._ref(value, AttributeCell(attributes, name))
            elif (kind is Kind.DATA or status) and status is not False and value is not None:
                self.cells.append(AttributeCell(attributes, name))
                spec = LEAF
            else:
                spec = self._constant(value)
            specs.append((key, spec))
        if not self._graph:
            self._open.discard(id(node))
        own = attributes.get("_pytree__nodes")
        return NodeDef(type(node), index, tuple(specs), tuple(own.items()) if own else None)

    def _container(self, container: Any) -> NodeDef:
        if id(container) in self._open:
            raise ValueError(f"A {type(container).__name__} contains itself; use nnx.List or nnx.Dict for that.")
        self._open.add(id(container))
        items, treedef = container_items(container)
        mapping = raw_mapping(container)
        specs = tuple([(key, self._item(mapping, key, child)) for key, child in items])
        self._open.discard(id(container))
        if mapping is not None:
            self.dicts.append(mapping)
        elif not isinstance(container, tuple):
            self.containers.append((container, [child for _, child in items], treedef))
        return NodeDef(type(container), None, specs, treedef)

    def _item(self, mapping: dict[Any, Any] | None, key: Any, child: Any) -> Spec:
        kind = kind_of(child)
        if mapping is not None and kind is Kind.REF:
            return self._ref(child, AttributeCell(mapping, key))
        if mapping is None or not (kind is Kind.DATA or (kind is Kind.STATIC and not self._graph)):
            return self.visit(child, as_data=not self._graph)
        self.cells.append(AttributeCell(mapping, key))
        return LEAF


class Structure:
    """What a walk over some roots found.

    Attributes:
        specs: the definition of each root.
        cells: the variables and arrays, in the order of the definitions.
        spans: which of them each root has.
        graph: whether shared references were followed.
        kept: what functions derived from this structure.
    """

    def __init__(self, roots: Sequence[Any], graph: bool) -> None:
        walk = Walk(graph)
        self.spans = walk.visit_all(roots)
        self.specs: tuple[Spec, ...] = tuple(walk.specs)
        self.cells = walk.cells
        self.graph = graph
        self._graphdef: GraphDef[Any] | None = None
        self.kept: dict[Any, Any] = {}
        self._roots: tuple[Any, ...] = ()
        self._dicts = walk.dicts
        self._lengths = list(map(len, walk.dicts))
        self._keys = list(chain.from_iterable(walk.dicts))
        # Arrays are compared by kind and not kept: others may stand in their places at the next call.
        cells = [c for c in walk.cells if isinstance(c, AttributeCell) and kind_of(c._raw_value) is not Kind.REF]
        leaves = {(id(cell.attributes), cell.name) for cell in cells}
        self._arrays = [(cell, kind_of(cell._raw_value)) for cell in cells]
        self._compared = [(id(d), key) not in leaves for d in walk.dicts for key in d]
        self._values = self._current_values()
        self._variables = [cell for cell in walk.cells if isinstance(cell, Variable)]
        self._metadata = [variable._var_metadata for variable in self._variables]
        self._containers = walk.containers
        self._changeable = walk.changeable

    @property
    def graphdef(self) -> GraphDef[Any]:
        """The definition of the first root."""
        if self._graphdef is None:
            start, end = self.spans[0]
            self._graphdef = GraphDef(self.specs[0], end - start, self.graph)
        return self._graphdef

    def values(self) -> list[Any]:
        """The raw values of the cells."""
        return [cell._raw_value for cell in self.cells]

    def forget_with(self, roots: Iterable[Any], on_death: Callable[[Any], Any]) -> None:
        """Call ``on_death`` when one of the roots is gone; another object may have its ``id`` then."""
        self._roots = tuple(weakref.ref(root, on_death) for root in roots)

    def _current_values(self) -> list[Any]:
        """All attributes but arrays; meaningful while the keys are those of the walk."""
        return list(compress(chain.from_iterable(map(dict.values, self._dicts)), self._compared))

    def is_current(self) -> bool:
        """Whether another walk would find the same."""
        if list(map(len, self._dicts)) != self._lengths:
            return False
        if not all(map(operator.is_, chain.from_iterable(self._dicts), self._keys)):
            return False
        if not all(map(operator.is_, self._current_values(), self._values)):
            return False
        for cell, kind in self._arrays:
            value = cell._raw_value
            if value is None or kind_of(value) is not kind:
                return False
        metadata = [variable._var_metadata for variable in self._variables]
        if not all(map(operator.is_, metadata, self._metadata)):
            return False
        if self._changeable and any(fingerprint(c.value) != c.key for c in self._changeable):
            return False
        return all(_same_content(*entry) for entry in self._containers)


def _same_content(container: Any, children: list[Any], treedef: Any) -> bool:
    items, now = container_items(container)
    return (
        len(items) == len(children)
        and now == treedef
        and all(child is before for (_, child), before in zip(items, children, strict=True))
    )


def structure_of(roots: Sequence[Any], graph: bool = True) -> Structure:
    """The structure of some roots with a joint numbering: the kept one if it still holds, or by a walk.

    It is kept on the first root that is a node; the others it does not keep alive.
    """
    holder = next((root for root in roots if isinstance(root, Pytree)), None)
    if holder is None:
        return Structure(roots, graph)
    kept: dict[Any, Structure] | None = getattr(holder, "_pytree__structures", None)
    if kept is None:
        kept = {}
        _set_structures(holder, kept)
    key = (graph, *map(id, roots))
    found = kept.get(key)
    if found is not None and found.is_current():
        return found
    made = Structure(roots, graph)
    others = [root for root in roots if root is not holder]
    if all(isinstance(root, Pytree | Variable) for root in others):
        made.forget_with(others, lambda _: kept.pop(key, None))
        kept.pop(key, None)
        while len(kept) >= _MAX_KEPT:
            kept.pop(next(iter(kept)))
        kept[key] = made
    return made


_set_structures = Pytree.__dict__["_pytree__structures"].__set__


def paths_of(spec: Spec) -> list[PathParts]:
    """The paths of the leaves of a definition."""
    return [path for path, child in iter_specs(spec) if isinstance(child, VariableDef) or child is LEAF]
