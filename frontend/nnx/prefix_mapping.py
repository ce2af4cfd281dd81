"""Specifications of transforms (axes, shardings ...) for the objects in a tree, and for the variables in an object."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from distaff.frontend.nnx.filters import Filter, PathParts, ordered_predicates
from distaff.frontend.nnx.graphdef import NodeDef, NodeRef, Spec, VariableDef
from distaff.frontend.nnx.object_trees import WHOLE, Taken, is_object
from distaff.frontend.nnx.origin import describe_origin
from distaff.frontend.nnx.structure import Structure, paths_of
from distaff.frontend.nnx.variables import Variable


class PrefixMapping:
    """What a transform's specification gives for an object: a value for each filter, such as an axis or a sharding.

    Args:
        mapping: filters and values; each variable has the value of the first filter that matches it.
    """

    def __init__(self, mapping: Mapping[Filter, Any] | Iterable[tuple[Filter, Any]], /) -> None:
        items = list(mapping.items() if isinstance(mapping, Mapping) else mapping)
        self.filters: tuple[Filter, ...] = tuple(filter for filter, _ in items)
        self.values: tuple[Any, ...] = tuple(value for _, value in items)

    def map_prefix(self, path: PathParts, variable: Any) -> Any:
        """The value for a variable.

        Raises:
            ValueError: no filter matches it.
        """
        return self.values[self._first_match(path, variable)]

    def _first_match(self, path: PathParts, variable: Any) -> int:
        for i, matches in enumerate(ordered_predicates(self.filters)):
            if matches(path, variable):
                return i
        raise ValueError(f"No filter of {self} matches {path}: {variable}. Use `...` to match all that remain.")

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
        spread = jax.tree.leaves(
            jax.tree.map(lambda p, below: jax.tree.map(lambda _: _Box(p), below), prefix, whole, is_leaf=_ends_prefix),
            is_leaf=lambda x: isinstance(x, _Box),
        )
        found += (spread[i].value for i in tree.layout.positions)
    return found


class _Box:
    def __init__(self, value: Any) -> None:
        self.value = value


def _ends_prefix(x: Any) -> bool:
    return x is None or isinstance(x, PrefixMapping)


def check_aliases(structure: Structure, prefixes: Sequence[Any]) -> None:
    """Raise ValueError if a variable stands at several places for which the prefixes say different things."""
    cells = iter(structure.cells)
    defined: dict[int, Spec] = {}
    first: dict[int, tuple[PathParts, Any]] = {}

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
            where, (before, variable) = first[spec.number][0], first[spec.number][1]
            now = prefix_at(prefix, path, variable)
            if now != before:
                raise ValueError(
                    f"Inconsistent aliasing detected: the {spec.type.__name__} at {_dotted(where)}, made"
                    f"{describe_origin(variable._origin)}, stands at {_dotted(path)} as well, with the specification "
                    f"{before!r} there and {now!r} here. Give both the same, or pass the variable once."
                )
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
            first[spec.number] = path, (prefix_at(prefix, path, variable), variable)
        elif isinstance(spec, NodeDef):
            if spec.number is not None:
                defined[spec.number] = spec
            for key, child in spec.attributes:
                visit(child, (*path, key), prefix)
        elif not hasattr(spec, "key"):
            next(cells)

    for spec, prefix in zip(structure.specs, prefixes, strict=True):
        visit(spec, (), prefix)


def _dotted(path: PathParts) -> str:
    return ".".join(map(str, path)) or "(the argument itself)"
