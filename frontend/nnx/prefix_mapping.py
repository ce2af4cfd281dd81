"""Specifications of transforms (axes, shardings ...) for the objects in a tree, and for the variables in an object."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from distaff.frontend.nnx.filters import Filter, PathParts, filters_to_predicates
from distaff.frontend.nnx.graphdef import NodeDef, NodeRef, Spec, VariableDef
from distaff.frontend.nnx.object_trees import WHOLE, Taken, is_object
from distaff.frontend.nnx.origin import describe_origin
from distaff.frontend.nnx.state import State, create_path_filters
from distaff.frontend.nnx.structure import Structure, paths_of
from distaff.frontend.nnx.variables import Variable


class PrefixMapping:
    """What a transform's specification gives for an object: a value for each filter, such as an axis or a sharding.

    Args:
        mapping: filters and values; each variable has the value of the first filter that matches it. Or a ``State`` of
            values.
    """

    def __init__(self, mapping: State | Mapping[Filter, Any] | Iterable[tuple[Filter, Any]], /) -> None:
        if isinstance(mapping, State):
            mapping = create_path_filters(mapping)
        items = list(mapping.items() if isinstance(mapping, Mapping) else mapping)
        self.filters: tuple[Filter, ...] = tuple(filter for filter, _ in items)
        self.values: tuple[Any, ...] = tuple(value for _, value in items)
        self._predicates = filters_to_predicates(self.filters)

    def map_prefix(self, path: PathParts, variable: Any) -> Any:
        """The value for a variable.

        Raises:
            ValueError: no filter matches it.
        """
        return self.values[self._first_match(path, variable)]

    def _first_match(self, path: PathParts, variable: Any) -> int:
        for i, matches in enumerate(self._predicates):
            if matches(path, variable):
                return i
        raise ValueError(f"No filter matched {path}: {variable} in {self}. Use `...` to match all that remain.")

    def groups(self, spec: Spec, cells: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
        """For each filter, which of the leaves of a definition it takes."""
        groups: list[list[int]] = [[] for _ in self.filters]
        for i, (path, cell) in enumerate(zip(paths_of(spec), cells, strict=True)):
            value = cell if isinstance(cell, Variable) else cell._raw_value
            groups[self._first_match(path, value)].append(i)
        return tuple(map(tuple, groups))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({dict(zip(map(repr, self.filters), self.values, strict=True))})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and (self.filters, self.values) == (other.filters, other.values)

    def __hash__(self) -> int:
        return hash((self.filters, self.values))


def is_object_or_prefix(x: Any) -> bool:
    """As ``is_object``, or a ``PrefixMapping``: where trees of specifications end."""
    return isinstance(x, PrefixMapping) or is_object(x)


def object_prefixes(taken: Sequence[Taken], prefixes: Sequence[Any]) -> list[Any]:
    """The prefix of each object."""
    found: list[Any] = []
    for tree, prefix in zip(taken, prefixes, strict=True):
        if tree.layout is None:
            continue
        if tree.layout is WHOLE:
            found.append(prefix)
            continue
        whole = tree.layout.treedef.unflatten(range(tree.layout.treedef.num_leaves))
        spread = broadcast_prefix(prefix, whole, _ends_prefix)
        found += (spread[i] for i in tree.layout.positions)
    return found


def broadcast_prefix(
    prefix_tree: Any,
    full_tree: Any,
    prefix_is_leaf: Callable[[Any], bool] | None = None,
    tree_is_leaf: Callable[[Any], bool] | None = None,
) -> list[Any]:
    """For each leaf of a tree, that of a prefix of it.

    Args:
        prefix_tree: the prefix; objects in it are leaves.
        full_tree: the tree.
        prefix_is_leaf: what else is a leaf of the prefix.
        tree_is_leaf: what else is a leaf of the tree.

    Raises:
        ValueError: the one is no prefix of the other.
    """
    found: list[Any] = []

    def add(value: Any, below: Any) -> None:
        found.extend([value] * len(jax.tree.leaves(below, is_leaf=tree_is_leaf)))

    def is_leaf(x: Any) -> bool:
        return is_object(x) or (prefix_is_leaf is not None and prefix_is_leaf(x))

    jax.tree.map(add, prefix_tree, full_tree, is_leaf=is_leaf)
    return found


def _ends_prefix(x: Any) -> bool:
    return x is None or isinstance(x, PrefixMapping)


def check_aliases(structure: Structure, prefixes: Sequence[Any]) -> None:
    """Raise ValueError if a variable stands at several places for which the prefixes say different things."""
    cells = iter(structure.cells)
    defined: dict[int, Spec] = {}
    first: dict[int, tuple[PathParts, Any, Any]] = {}

    def prefix_at(prefix: Any, path: PathParts, variable: Any) -> Any:
        return prefix.map_prefix(path, variable) if isinstance(prefix, PrefixMapping) else prefix

    def again(spec: Spec, path: PathParts, prefix: Any, seen: frozenset[int]) -> None:
        """Compare at a second place of what was defined before."""
        number = getattr(spec, "number", None)
        if number is None and not isinstance(spec, NodeDef):
            return
        if isinstance(spec, NodeRef):
            spec = defined[spec.number]
        if isinstance(spec, VariableDef):
            where, before, variable = first[spec.number]
            now = prefix_at(prefix, path, variable)
            if now != before:
                raise ValueError(_alias_message(variable, (where, before), (path, now)))
        elif isinstance(spec, NodeDef) and spec.number not in seen:
            inside = seen if spec.number is None else seen | {spec.number}
            for key, child in spec.attributes:
                again(child, (*path, key), prefix, inside)

    def visit(spec: Spec, path: PathParts, prefix: Any) -> None:
        if isinstance(spec, NodeRef):
            again(spec, path, prefix, frozenset())
        elif isinstance(spec, VariableDef):
            variable = next(cells)
            defined[spec.number] = spec
            first[spec.number] = path, prefix_at(prefix, path, variable), variable
        elif isinstance(spec, NodeDef):
            if spec.number is not None:
                defined[spec.number] = spec
            for key, child in spec.attributes:
                visit(child, (*path, key), prefix)
        elif not hasattr(spec, "key"):
            next(cells)

    for spec, prefix in zip(structure.specs, prefixes, strict=True):
        visit(spec, (), prefix)


def _alias_message(variable: Any, *places: tuple[PathParts, Any]) -> str:
    is_variable = isinstance(variable, Variable)
    kind = type(variable if is_variable else variable._raw_value).__name__
    made = f" (made{describe_origin(variable._origin)})" if is_variable and variable._origin else ""
    lines = "".join(f"\n  {_dotted(path)}: {prefix}" for path, prefix in places)
    return (
        f"Inconsistent aliasing detected. The following nodes have different prefixes: one {kind}{made} stands at the "
        f"places below; give both the same prefix, or pass it once.{lines}"
    )


def _dotted(path: PathParts) -> str:
    return ".".join(map(str, path)) or "(the argument itself)"
