"""Specifications such as ``in_axes``: prefixes of the trees they are for, and what they say of each leaf.

At an object, a specification is one value for all its variables, a ``StateAxes`` with a value for each filter, or an
object of the same structure with values for arrays, as ``nnx.prefix`` makes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from distaff.frontend.nnx.filters import Filter, PathIn, PathParts, filters_to_predicates
from distaff.frontend.nnx.kinds import Kind, kind_of
from distaff.frontend.nnx.object_trees import is_object
from distaff.frontend.nnx.prefix_mapping import PrefixMapping, is_object_or_prefix
from distaff.frontend.nnx.pytrees import sorted_attributes
from distaff.frontend.nnx.state import State, iter_flat
from distaff.frontend.nnx.structure import Structure, container_items, paths_of
from distaff.frontend.nnx.traversal import iter_graph
from distaff.frontend.nnx.variables import Variable


class StateAxes(PrefixMapping):
    """The axes of an object's variables, by filter: each has the axis of the first filter that matches it.

    >>> nnx.StateAxes({nnx.Param: 0, ...: None})
    """

    @property
    def axes(self) -> tuple[Any, ...]:
        """The axes, in the order of the filters."""
        return self.values

    def items(self) -> Iterator[tuple[Filter, Any]]:
        """Filters and axes."""
        return zip(self.filters, self.values, strict=True)


class _ByPath(PrefixMapping):
    """What an object of specifications says of an object of the same structure."""

    def __init__(self, values: Iterable[tuple[PathParts, Any]]) -> None:
        paths: dict[Any, list[PathParts]] = {}
        for path, value in values:
            paths.setdefault(value, []).append(path)
        super().__init__([(PathIn(*found), value) for value, found in paths.items()])


def _values_in(x: Any, path: PathParts = ()) -> Iterator[tuple[PathParts, Any]]:
    """Paths and values of an object of specifications."""
    kind = kind_of(x)
    if kind is Kind.VARIABLE:
        yield path, x.get_raw_value()
    elif isinstance(x, State):
        yield from ((p, v.get_raw_value() if isinstance(v, Variable) else v) for p, v in iter_flat(x, path))
    elif kind is Kind.NODE:
        for key, name in sorted_attributes(x):
            yield from _values_in(x.__dict__[name], (*path, key))
    elif kind is Kind.CONTAINER:
        for key, child in container_items(x)[0]:
            yield from _values_in(child, (*path, key))
    elif x is None or isinstance(x, int | type):
        yield path, x


def prefix(
    node: Any, filter_map: Mapping[Filter, Any] | Callable[[PathParts, Any], Any], /, *, graph: bool | None = None
) -> Any:
    """A specification for ``node``, to be passed to a transform for it.

    >>> axes = nnx.prefix(model, {nnx.Param: 0, ...: None})
    >>> nnx.vmap(f, in_axes=(axes, 0))(model, x)

    Args:
        node: an object or a tree of objects.
        filter_map: values by filter, of which the first that matches counts; or a function of path and variable.
        graph: accepted for likeness; the specification holds in both modes.

    Returns:
        The tree with specifications in the places of objects and arrays.

    Raises:
        ValueError: no filter matches a variable.
    """
    if callable(filter_map):
        value_of = filter_map
    else:
        by_filter = StateAxes(filter_map)
        value_of = by_filter.map_prefix

    def specify(path: Any, x: Any) -> Any:
        above = tuple(getattr(part, "key", getattr(part, "idx", getattr(part, "name", part))) for part in path)
        if not is_object(x):
            return value_of(above, x)
        variables = iter_flat(x) if isinstance(x, State) else iter_graph(x, graph=True)
        leaves = ((p, v) for p, v in variables if isinstance(v, Variable) or kind_of(v) is Kind.DATA)
        return _ByPath((p, value_of((*above, *p), v)) for p, v in leaves)

    return jax.tree_util.tree_map_with_path(specify, node, is_leaf=is_object)


def by_object(specification: Any) -> Any:
    """The specification with a ``PrefixMapping`` for each object of specifications in it."""

    def convert(x: Any) -> Any:
        return _ByPath(_values_in(x)) if is_object(x) else x

    return jax.tree.map(convert, specification, is_leaf=is_object_or_prefix)


def _ends(x: Any) -> bool:
    return x is None or isinstance(x, PrefixMapping)


def values_of(specification: Any) -> list[Any]:
    """All values in a specification, each once."""
    found: list[Any] = []
    for part in jax.tree.leaves(specification, is_leaf=_ends):
        found += part.values if isinstance(part, PrefixMapping) else [part]
    return list(dict.fromkeys(found))


def check_no_mapping(specification: Any, name: str, transform: str, cls: type[PrefixMapping] = PrefixMapping) -> None:
    """Raise ValueError if a specification uses ``StateAxes`` or the like, which needs graph updates."""
    for part in jax.tree.leaves(specification, is_leaf=_ends):
        if isinstance(part, PrefixMapping) and not isinstance(part, _ByPath):
            raise ValueError(
                f"`{name}` of nnx.{transform} cannot contain {type(part).__name__} when graph=False or "
                "graph_updates=False. Pass what nnx.prefix(object, {filter: value}) returns, or graph=True and "
                "graph_updates=True."
            )


class _Pairs:
    def __init__(self, pairs: list[tuple[Any, Any]]) -> None:
        self.pairs = pairs


def spread(specification: Any, tree: Any, name: str) -> list[tuple[Any, Any]]:
    """For each leaf of a tree (objects are leaves) what the specification says, and the leaf.

    Args:
        name: of the specification, for errors.

    Raises:
        ValueError: the specification is no prefix of the tree.
    """

    def below(value: Any, part: Any) -> _Pairs:
        return _Pairs([(value, leaf) for leaf in jax.tree.leaves(part, is_leaf=is_object)])

    try:
        spread_out = jax.tree.map(below, specification, tree, is_leaf=_ends)
    except ValueError as error:
        raise ValueError(f"{name} = {specification!r} has another structure than what it is for: {error}") from error
    return [pair for found in jax.tree.leaves(spread_out) for pair in found.pairs]


def cell_values(structure: Structure, specifications: Sequence[Any]) -> list[Any]:
    """What the specifications of a structure's objects, one for each, say of its variables and arrays."""
    found: list[Any] = []
    for spec, (start, end), value in zip(structure.specs, structure.spans, specifications, strict=True):
        if not isinstance(value, PrefixMapping):
            found += [value] * (end - start)
            continue
        cells = structure.cells[start:end]
        rules = list(zip(filters_to_predicates(value.filters), value.values, strict=True))
        for path, cell in zip(paths_of(spec), cells, strict=True):
            x = cell if isinstance(cell, Variable) else cell._raw_value
            found.append(_first_match(rules, path, x, value))
    return found


def _first_match(rules: Sequence[tuple[Any, Any]], path: PathParts, x: Any, mapping: PrefixMapping) -> Any:
    for matches, value in rules:
        if matches(path, x):
            return value
    return mapping.map_prefix(path, x)  # whose error says so


def leaf_values(
    pairs: Iterable[tuple[Any, bool]], of_cells: Iterable[Any], arrays: Iterable[Any], sizes: Iterable[int]
) -> list[Any]:
    """What a specification says of each array of a tree.

    Args:
        pairs: what the specification says of each leaf of the tree, and whether that is an object.
        of_cells: what the specification says of each cell of the objects in it.
        arrays: the value of each cell, which may be a tree of arrays.
        sizes: how many cells each object has.
    """
    cells, sizes = zip(of_cells, arrays, strict=True), iter(sizes)
    found: list[Any] = []
    for value, of_object in pairs:
        if not of_object:
            found.append(value)
            continue
        for of_cell, array in itertools.islice(cells, next(sizes)):
            found += [of_cell] * len(jax.tree.leaves(array))
    return found
