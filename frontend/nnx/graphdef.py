"""The static half of an object graph: what it is made of, and in what order its variables and arrays come."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np

from distaff.frontend.jax_compat import Box
from distaff.frontend.nnx import config
from distaff.frontend.nnx.filters import PathParts
from distaff.frontend.nnx.pytrees import STATUSES, empty_node
from distaff.frontend.nnx.state import State, iter_flat, key_order, raw_dict
from distaff.frontend.nnx.variables import _NO_METADATA, Variable

Node = TypeVar("Node")

# Types whose values cannot change and are equal only if they do the same.
_CONSTANT = (str, bytes, type(None), type, np.dtype, type(Ellipsis), types.FunctionType, types.BuiltinFunctionType)
_NUMBERS = (int, float, complex, bool)


class _ByIdentity:
    """An unhashable value of which nothing is known: equal to itself alone."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def fingerprint(x: Any) -> Any:
    """A hashable value that is equal for equal constants of the same types, and shows changes within them."""
    if isinstance(x, _CONSTANT):
        return x
    if isinstance(x, float):
        return type(x), x.hex()  # tells 0.0 from -0.0
    if isinstance(x, _NUMBERS):
        return type(x), x  # tells 1 from True
    if isinstance(x, list | tuple):
        return type(x), *map(fingerprint, x)
    if isinstance(x, dict):
        return type(x), *((key, fingerprint(value)) for key, value in x.items())
    if isinstance(x, set | frozenset):
        return type(x), frozenset(x)
    if dataclasses.is_dataclass(x) and not isinstance(x, type) and not _has_identity_hash(type(x)):
        fields = (getattr(x, field.name, None) for field in dataclasses.fields(x))
        return type(x), *map(fingerprint, fields)
    if _has_identity_hash(type(x)):
        return x
    try:
        return type(x), hash(x), x
    except TypeError:
        return _ByIdentity(x)


def _has_identity_hash(cls: type[Any]) -> bool:
    return getattr(cls, "__hash__", None) is object.__hash__


def may_change(x: Any) -> bool:
    """Whether the fingerprint of a constant may become another without an assignment."""
    if isinstance(x, (*_CONSTANT, *_NUMBERS)) or _has_identity_hash(type(x)):
        return False
    return not isinstance(x, tuple) or any(map(may_change, x))


class Constant:
    """A static value; equal to others by its fingerprint."""

    __slots__ = ("key", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        self.key = fingerprint(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"Static({self.value!r})"


class Leaf:
    """An array, or another value that was marked as data."""

    def __repr__(self) -> str:
        return "Leaf()"

    def __reduce__(self) -> str:
        return "LEAF"


LEAF = Leaf()


class VariableDef(NamedTuple):
    """A variable or mutable array, at its first occurrence."""

    type: type[Any]
    number: int
    metadata: Constant


class NodeRef(NamedTuple):
    """A node or variable that occurred before."""

    type: type
    number: int


class NodeDef(NamedTuple):
    """A node at its first occurrence, or (number None) a container.

    ``metadata`` says which attributes of a node are data or static against appearance; for containers other than list,
    tuple and dict it is their treedef.
    """

    type: type
    number: int | None
    attributes: tuple[tuple[Any, Spec], ...]
    metadata: Any


class TreeNodeDef(NamedTuple):
    """What ``GraphDef.nodes`` has of a definition made in tree mode, which knows no sharing: the leaves by path."""

    path_index: tuple[tuple[PathParts, int], ...]


@dataclasses.dataclass(frozen=True)
class ArrayRefOutput:
    """The value of a mutable array that was made inside a transform, which cannot come out itself; a pytree node."""

    value: Any


@dataclasses.dataclass(frozen=True)
class BoxOutput:
    """Likewise, of what a variable made with ``hijax=True`` stores."""

    value: Any


_OUTPUTS = (ArrayRefOutput, BoxOutput)


def as_output(stored: Any) -> Any:
    """What to return from a transform of a new mutable array, or a box; other values as they are."""
    if isinstance(stored, jax.Ref):
        return ArrayRefOutput(stored[...])
    return BoxOutput(stored.get()) if isinstance(stored, Box) else stored


def from_output(value: Any) -> Any:
    """The inverse of ``as_output``."""
    if isinstance(value, ArrayRefOutput):
        return jax.new_ref(value.value)
    return Box(value.value) if isinstance(value, BoxOutput) else value


@dataclasses.dataclass(frozen=True)
class NoUpdate:
    """In the place of a mutable array that was given to a transform: it changed in place. A pytree without leaves."""


jax.tree_util.register_dataclass(ArrayRefOutput, ["value"], [])
jax.tree_util.register_dataclass(BoxOutput, ["value"], [])
jax.tree_util.register_static(NoUpdate)

Spec = NodeDef | VariableDef | NodeRef | Constant | Leaf
NO_METADATA = Constant({})


class GraphDef(Generic[Node]):
    """What an object is but for its variables and arrays; hashable, and static in JAX.

    Attributes:
        root: the definition of the root.
        num_leaves: how many variables and arrays it takes.
        graph: whether it was made in graph mode.
        outer: if made inside ``nnx.update_context``, pairs of a number in it and that of the same object outside.
    """

    __slots__ = ("_hash", "_paths", "graph", "num_leaves", "outer", "root")

    def __init__(
        self, root: Spec, num_leaves: int, graph: bool = True, outer: tuple[tuple[int, int], ...] = ()
    ) -> None:
        self.root = root
        self.num_leaves = num_leaves
        self.graph = graph
        self.outer = outer
        self._hash: int | None = None
        self._paths: tuple[PathParts, ...] | None = None

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return (
            isinstance(other, GraphDef)
            and hash(self) == hash(other)
            and (self.root, self.outer) == (other.root, other.outer)
        )

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash((self.root, self.outer))
        return self._hash

    def __reduce__(self) -> Any:
        return GraphDef, (self.root, self.num_leaves, self.graph, self.outer)

    def __repr__(self) -> str:
        return f"GraphDef({self.root!r}, num_leaves={self.num_leaves})"

    @property
    def nodes(self) -> list[Any]:
        """The definitions of nodes, containers and variables, and references to them, in order; of a tree, one."""
        if not self.graph:
            numbered = ((path, i) for i, path in enumerate(self.paths))
            return [TreeNodeDef(tuple(sorted(numbered, key=lambda pair: [key_order(key) for key in pair[0]])))]
        return [spec for _, spec in iter_specs(self.root) if isinstance(spec, NodeDef | VariableDef | NodeRef)]

    @property
    def attributes(self) -> list[tuple[Any, Spec]]:
        """Keys and definitions of all attributes, in order."""
        return [(path[-1], spec) for path, spec in iter_specs(self.root) if path]

    @property
    def paths(self) -> tuple[PathParts, ...]:
        """The paths of the variables and arrays, in order."""
        if self._paths is None:
            found = ((path, spec) for path, spec in iter_specs(self.root))
            self._paths = tuple(path for path, spec in found if isinstance(spec, VariableDef) or spec is LEAF)
        return self._paths

    def apply(self, state: Any, *states: Any, graph: bool | None = None) -> Any:
        """As ``nnx.call((graphdef, state))``."""
        from distaff.frontend.nnx.functional import call

        return call((self, *((state, *states))))

    def with_no_outer_index(self) -> GraphDef[Node]:
        """The same without ``outer``."""
        return GraphDef(self.root, self.num_leaves, self.graph)

    def with_matching_outer_index(self, other: GraphDef[Any]) -> GraphDef[Node]:
        """The same with the ``outer`` of another."""
        return GraphDef(self.root, self.num_leaves, self.graph, other.outer)


jax.tree_util.register_static(GraphDef)
PureState = tuple[GraphDef[Node], State]


def iter_specs(spec: Spec, path: PathParts = ()) -> Iterator[tuple[PathParts, Spec]]:
    """Paths and definitions, each before its children."""
    yield path, spec
    if isinstance(spec, NodeDef):
        for key, child in spec.attributes:
            yield from iter_specs(child, (*path, key))


def make_container(cls: type[Any], keys: Sequence[Any], children: Sequence[Any], treedef: Any) -> Any:
    """A container of these children."""
    if treedef is not None:
        return treedef.unflatten(children)
    if cls is dict:
        return dict(zip(keys, children, strict=True))
    if issubclass(cls, State):
        return cls(dict(zip(keys, children, strict=True)), _copy=False)
    return cls(children)


class Build:
    """Makes objects of definitions and leaves.

    Args:
        leaves: variables or values, in the order of the definitions.
        copy: make new variables of those given.
        recreate: make new variables of those that belong to another JAX transform than the one that runs, and of values
            that are none.
        existing: objects by index to fill again instead of making new ones.
    """

    def __init__(
        self,
        leaves: Iterable[Any] = (),
        copy: bool = False,
        recreate: bool = True,
        existing: Mapping[int, Any] | None = None,
    ) -> None:
        self._leaves = iter(leaves)
        self._copy = copy
        self._recreate = recreate
        self._existing = dict(existing or {})
        self.objects: dict[int, Any] = {}

    def reuse(self, existing: Mapping[int, Any]) -> None:
        """Fill these objects, by number, instead of making new ones."""
        self._existing.update(existing)

    def make_with(self, spec: Spec, leaves: Iterable[Any]) -> Any:
        """The object of another definition with the same numbering, and with leaves of its own."""
        self._leaves = iter(leaves)
        return self.make(spec)

    def make(self, spec: Spec) -> Any:
        """The object of a definition."""
        if isinstance(spec, Constant):
            return spec.value
        if spec is LEAF:
            return next(self._leaves)
        if isinstance(spec, VariableDef):
            return self._variable(spec)
        if isinstance(spec, NodeRef):
            return self.objects[spec.number]
        assert isinstance(spec, NodeDef)
        if spec.number is None:
            keys = [key for key, _ in spec.attributes]
            return make_container(spec.type, keys, [self.make(child) for _, child in spec.attributes], spec.metadata)
        node = self._existing.get(spec.number)
        if node is None:
            node = empty_node(spec.type, {})
        else:
            node.__dict__.clear()
        self.objects[spec.number] = node
        attributes = node.__dict__
        if spec.metadata:
            attributes[STATUSES] = dict(spec.metadata)
        make = self.make
        for key, child in spec.attributes:
            attributes[key if type(key) is str else str(key)] = child.value if type(child) is Constant else make(child)
        return node

    def _variable(self, spec: VariableDef) -> Any:
        value = next(self._leaves)
        if type(value) in _OUTPUTS:
            value = from_output(value)
        existing = self._existing.get(spec.number)
        variable: Any
        if spec.type is jax.Ref:
            variable = value if existing is None else existing
        elif existing is not None:
            variable = existing
            raw = from_output(value._raw_value) if isinstance(value, Variable) else value
            if raw is not None and not isinstance(raw, NoUpdate):  # mutable arrays changed in place
                existing.write(raw)
            object.__setattr__(existing, "_var_metadata", spec.metadata.value)
        elif not isinstance(value, Variable) and not self._recreate:
            variable = value
        elif not isinstance(value, Variable):
            variable = spec.type.from_metadata(value, spec.metadata.value or _NO_METADATA)
        elif type(value._raw_value) in _OUTPUTS:
            variable = value._of(from_output(value._raw_value), value._var_metadata)
        elif self._copy or (self._recreate and not value._can_update):
            variable = value.copy()
        else:
            variable = value
        self.objects[spec.number] = variable
        return variable


def leaves_of(graphdef: GraphDef[Any], state: Any) -> list[Any]:
    """The leaves of a state in the order of the definitions, wherever they stand in it.

    Raises:
        ValueError: the state lacks some, or has others.
    """
    root = graphdef.root
    if not isinstance(root, NodeDef):
        return [state]
    leaves: list[Any] = []
    if _collect(root, raw_dict(state), leaves):
        return leaves
    wanted, given = set(graphdef.paths), {path for path, _ in iter_flat(state)}
    missing, extra = ([".".join(map(str, path)) for path in paths] for paths in (wanted - given, given - wanted))
    raise ValueError(
        f"Incorrect number of leaves, or other leaves than the graph has: it takes {len(wanted)}, the state has "
        f"{len(given)}. Missing: {sorted(missing)}. Not in the graph: {sorted(extra)}."
    )


def _collect(spec: NodeDef, mapping: Any, leaves: list[Any]) -> bool:
    """Append the leaves in ``mapping``; False if it does not have exactly those."""
    used = 0
    for key, child in spec.attributes:
        if isinstance(child, VariableDef) or child is LEAF:
            if key not in mapping:
                return False
            leaves.append(mapping[key])
            used += 1
        elif isinstance(child, NodeDef):
            inner = mapping.get(key)
            before = len(leaves)
            if inner is not None and not isinstance(inner, Mapping):
                return False
            if not _collect(child, {} if inner is None else raw_dict(inner), leaves):
                return False
            used += inner is not None and (len(leaves) > before or not inner)
    return used == len(mapping)


def nested_leaves(spec: NodeDef, leaves: Iterator[Any]) -> dict[Any, Any]:
    """The leaves as nested dicts, by path."""
    nested: dict[Any, Any] = {}
    for key, child in spec.attributes:
        if isinstance(child, VariableDef) or child is LEAF:
            nested[key] = next(leaves)
        elif isinstance(child, NodeDef):
            inner = nested_leaves(child, leaves)
            if inner:
                nested[key] = inner
    return nested


def graph_mode(graph: bool | None) -> bool:
    """What ``graph=None`` means here."""
    return config.set_graph_mode.current_value() if graph is None else graph
