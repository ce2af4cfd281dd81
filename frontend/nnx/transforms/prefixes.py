"""Specifications such as ``in_axes``: prefixes of the trees they are for, and what they say of each leaf.

At an object, a specification is one value for all its variables, a ``StateAxes`` with a value for each filter, or an
object of the same structure with values for arrays, as ``nnx.prefix`` makes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from distaff.frontend.nnx.filters import Filter, PathIn, PathParts
from distaff.frontend.nnx.graphdef import graph_mode
from distaff.frontend.nnx.kinds import Kind, kind_of
from distaff.frontend.nnx.object_trees import is_object
from distaff.frontend.nnx.prefix_mapping import PrefixMapping, is_object_or_prefix
from distaff.frontend.nnx.pytrees import is_data_attribute, sorted_attributes
from distaff.frontend.nnx.state import State, iter_flat, nest
from distaff.frontend.nnx.structure import Structure, container_items, key_of, paths_of
from distaff.frontend.nnx.traversal import iter_graph, recursive_map
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


class TreeState(PrefixMapping):
    """What an object of specifications says of an object of the same structure."""

    def __init__(self, values: Iterable[tuple[PathParts, Any]]) -> None:
        self._by_path = dict(values)
        paths: dict[Any, list[PathParts]] = {}
        for path, value in self._by_path.items():
            paths.setdefault(value, []).append(path)
        super().__init__([(PathIn(*found), value) for value, found in paths.items()])

    @property
    def state(self) -> State:
        """The specifications by path."""
        return State(nest(self._by_path.items()), _copy=False)


def _values_in(x: Any, path: PathParts = ()) -> Iterator[tuple[PathParts, Any]]:
    """Paths and values of an object of specifications."""
    kind = kind_of(x)
    if kind is Kind.VARIABLE:
        yield path, x.get_raw_value()
    elif isinstance(x, State):
        yield from ((p, v.get_raw_value() if isinstance(v, Variable) else v) for p, v in iter_flat(x, path))
    elif kind is Kind.NODE:
        for key, name in sorted_attributes(x):
            if is_data_attribute(x, name, x.__dict__[name]):
                yield from _values_in(x.__dict__[name], (*path, key))
    elif kind is Kind.CONTAINER:
        for key, child in container_items(x)[0]:
            yield from _values_in(child, (*path, key))
    else:
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
        graph: as for ``nnx.split``.

    Returns:
        In graph mode, the tree with a ``TreeState`` in the place of each object. In tree mode, the same tree with
        specifications in the places of variables and arrays, which JAX's own transforms take too.

    Raises:
        ValueError: no filter matches a variable.
    """
    if callable(filter_map):
        value_of = filter_map
    else:
        by_filter = StateAxes(filter_map)
        value_of = by_filter.map_prefix

    if not graph_mode(graph):
        return recursive_map(lambda path, x: value_of(path, x) if _is_leaf(x) else x, node, graph=False)

    def specify(path: Any, x: Any) -> Any:
        above = tuple(map(key_of, path))
        if not is_object(x):
            return value_of(above, x)
        variables = iter_flat(x) if isinstance(x, State) else iter_graph(x, graph=True)
        leaves = ((p, v) for p, v in variables if _is_leaf(v))
        return TreeState((p, value_of((*above, *p), v)) for p, v in leaves)

    return jax.tree_util.tree_map_with_path(specify, node, is_leaf=is_object)


def _is_leaf(x: Any) -> bool:
    return kind_of(x) in (Kind.VARIABLE, Kind.DATA, Kind.REF)


def by_object(specification: Any) -> Any:
    """The specification with a ``PrefixMapping`` for each object of specifications in it."""

    def convert(x: Any) -> Any:
        return TreeState(_values_in(x)) if is_object(x) else x

    return jax.tree.map(convert, specification, is_leaf=is_object_or_prefix)


def _ends(x: Any) -> bool:
    return x is None or isinstance(x, PrefixMapping)


def values_of(specification: Any) -> list[Any]:
    """All values in a specification, each once."""
    found: list[Any] = []
    for part in jax.tree.leaves(specification, is_leaf=_ends):
        found += part.values if isinstance(part, PrefixMapping) else [part]
    return list(dict.fromkeys(found))


def check_prefix(specification: Any, name: str, transform: str, updates: bool) -> None:
    """Refuse what a specification may not have in it.

    Args:
        specification: a tree.
        name: of it, for errors.
        transform: of which it is an argument, for errors.
        updates: whether changes of structure are passed on: only then there may be a ``StateAxes`` or the like, and
            only otherwise objects of specifications.

    Raises:
        ValueError: it has such a thing in it.
    """
    for part in jax.tree.leaves(specification, is_leaf=is_object_or_prefix):
        if isinstance(part, PrefixMapping) and not isinstance(part, TreeState) and not updates:
            cls = type(part).__name__
            raise ValueError(
                f"`{name}` cannot contain `{cls}` objects when graph=False or graph_updates=False: nnx.{transform} was "
                f"given {part}. Pass what nnx.prefix(object, {{filter: value}}) returns, or graph=True and "
                "graph_updates=True."
            )
        if isinstance(part, Variable):
            raise ValueError(f"Variables prefixes are not supported: `{name}` of nnx.{transform} has {part}.")
        if kind_of(part) is Kind.NODE and updates:
            raise ValueError(
                f"Graph nodes are not allowed as prefixes with graph_updates=True: `{name}` of nnx.{transform} has a "
                f"{type(part).__name__}. Use a StateAxes, StateSharding or DiffState."
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
        for path, cell in zip(paths_of(spec), cells, strict=True):
            found.append(value.map_prefix(path, cell if isinstance(cell, Variable) else cell._raw_value))
    return found


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
