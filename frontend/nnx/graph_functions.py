"""Functions on object graphs: split them into a static definition and a state, and join, update and walk them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from distaff.frontend.nnx.filters import Filter, PathParts, to_predicate
from distaff.frontend.nnx.graph_state import GraphState
from distaff.frontend.nnx.graphdef import Build, GraphDef, NodeDef, graph_mode, leaves_of, nested_leaves
from distaff.frontend.nnx.kinds import Kind, kind_of
from distaff.frontend.nnx.pytrees import Pytree
from distaff.frontend.nnx.ref_maps import IndexMap, RefMap
from distaff.frontend.nnx.state import FlatState, State, filter_flat, merge_nested, raw_dict, split_flat
from distaff.frontend.nnx.stored_values import is_array_ref
from distaff.frontend.nnx.structure import Structure, Walk, structure_of
from distaff.frontend.nnx.variables import Variable

_MISSING: Any = object()


def _leaf(cell: Any) -> Any:
    return cell if isinstance(cell, Variable) else cell._raw_value


def _state_of(found: Structure) -> Any:
    root = found.specs[0]
    if isinstance(root, NodeDef):
        return State(nested_leaves(root, (_leaf(cell) for cell in found.cells)), _copy=False)
    return _leaf(found.cells[0])


def _flat_state_of(found: Structure) -> FlatState[Any]:
    paths, leaves = found.graphdef.paths, [_leaf(cell) for cell in found.cells]
    if found.graph:
        return FlatState.from_sorted_keys_values(paths, leaves)
    return FlatState(zip(paths, leaves, strict=True), sort=True)


def graphdef(node: Any, /, *, graph: bool | None = None) -> GraphDef[Any]:
    """The static definition of an object graph."""
    return structure_of((node,), graph_mode(graph)).graphdef


def split(node: Any, *filters: Filter, graph: bool | None = None) -> Any:
    """Split an object graph into its static definition and its state.

    Args:
        node: an object, or a list, tuple, dict ... of objects.
        filters: if given, there is one state for each, with the variables and arrays that it matches and no filter
            before it does.
        graph: follow shared references and cycles (default: ``nnx.set_graph_mode``); otherwise ``node`` must be a tree.

    Returns:
        ``(graphdef, state)`` or ``(graphdef, state, ...)``. The states hold the very variables of the object.

    Raises:
        ValueError: the filters leave something over; in tree mode, a variable stands at two places.
    """
    found = structure_of((node,), graph_mode(graph))
    if not filters:
        return found.graphdef, _state_of(found)
    groups = split_flat(_flat_state_of(found), filters)
    return found.graphdef, *(group.to_nested_state() for group in groups)


def state(node: Any, *filters: Filter, graph: bool | None = None) -> Any:
    """The state of an object graph: as ``split`` gives it, but what no filter matches is left out.

    Returns:
        One state, or a tuple of one for each filter if there are several.
    """
    found = structure_of((node,), graph_mode(graph))
    if not filters:
        return _state_of(found)
    groups = tuple(group.to_nested_state() for group in filter_flat(_flat_state_of(found), filters))
    return groups[0] if len(groups) == 1 else groups


variables = state


def merge(
    graphdef: Any, state: Any = _MISSING, /, *states: Any, copy: bool = False, recreate_variables: bool = True
) -> Any:
    """Make the object of a definition and one or more states; the inverse of ``split``.

    Args:
        graphdef: the definition; or a ``GraphState``, and then the states are others of the same definition.
        state: a ``State`` or nested dict, with variables or plain values as leaves; or a ``FlatState``, or a list of
            leaves in order; ``states`` likewise.
        copy: make new variables of those in the states, which the object shares otherwise.
        recreate_variables: make new variables of those that cannot be assigned under the running JAX transform, and
            of plain values; otherwise these take the places of variables.

    Raises:
        TypeError: there is no state.
        ValueError: the states lack leaves that the definition has, or have others; of several ``GraphState``, not all
            have the same definition.
    """
    given = states if state is _MISSING else (state, *states)
    if isinstance(graphdef, GraphState):
        given = (graphdef._state, *(_state_with(graphdef._graphdef, x) for x in given))
        graphdef = graphdef._graphdef
    elif not given:
        raise TypeError("merge() missing 1 required positional argument: 'state'")
    leaves = leaves_in_order(graphdef, list(given))
    return Build(iter(leaves), copy=copy, recreate=recreate_variables).make(graphdef.root)


def _state_with(definition: GraphDef[Any], x: Any) -> State:
    if not isinstance(x, GraphState):
        raise ValueError(f"Expected GraphState objects after the first one, got {type(x).__name__}.")
    if x._graphdef != definition:
        raise ValueError(f"GraphDef must be the same for all GraphStates, got {definition} and {x._graphdef}.")
    return x._state


def leaves_in_order(graphdef: GraphDef[Any], states: list[Any]) -> list[Any]:
    """The leaves of some states in the order of the definition.

    Raises:
        ValueError: they lack some, or have others.
    """
    if len(states) == 1:
        given = states[0]
        if isinstance(given, FlatState) and given.paths == graphdef.paths:
            return given.leaves
        if isinstance(given, list):
            if len(given) != graphdef.num_leaves:
                raise ValueError(f"Incorrect number of leaves: {graphdef.num_leaves} expected, got {len(given)}.")
            return given
        if not isinstance(given, FlatState):
            return leaves_of(graphdef, given)
    nested = [s.to_nested_state() if isinstance(s, FlatState) else s for s in states]
    if not isinstance(graphdef.root, NodeDef):
        nested = _without_empty(nested)
        return leaves_of(graphdef, nested[0] if len(nested) == 1 else merge_nested(nested))
    return leaves_of(graphdef, merge_nested(nested))


def _without_empty(states: Iterable[Any]) -> list[Any]:
    """The states but those with nothing in them, as ``split`` by filters gives of a variable."""
    return [s for s in states if not (isinstance(s, Mapping) and not s)]


def flatten(
    node: Any,
    /,
    *,
    ref_index: RefMap | None = None,
    ref_outer_index: RefMap | None = None,
    with_paths: bool = True,
    graph: bool | None = None,
) -> tuple[GraphDef[Any], Any]:
    """The definition and a ``FlatState``; without ``with_paths``, a list of the raw values instead.

    Args:
        node: an object, or a tree of objects.
        ref_index: numbers that objects have already; those found are added.
        ref_outer_index: other numbers of some objects, which the definition is to remember for ``unflatten``.
        with_paths: give paths too.
        graph: as for ``split``.
    """
    follow = graph_mode(graph)
    if ref_index is None and ref_outer_index is None:
        found = structure_of((node,), follow)
        return found.graphdef, _flat_state_of(found) if with_paths else found.values()
    numbers, outside = RefMap() if ref_index is None else ref_index, ref_outer_index or RefMap()
    walk = Walk(follow, sorted(numbers, key=numbers.__getitem__))
    walk.visit_all([node])
    numbers.update((x, i) for i, x in enumerate(walk.objects))
    for x in (cell._raw_value for cell in walk.cells if is_array_ref(cell._raw_value)):
        numbers.setdefault(x, len(numbers))  # those in variables too
    outer = tuple((i, outside[x]) for i, x in enumerate(walk.objects) if x in outside)
    definition: GraphDef[Any] = GraphDef(walk.specs[0], len(walk.cells), follow, outer)
    leaves = [_leaf(cell) if with_paths else cell._raw_value for cell in walk.cells]
    return definition, FlatState(zip(definition.paths, leaves, strict=True), sort=not follow) if with_paths else leaves


def unflatten(
    graphdef: GraphDef[Any],
    state: Any,
    /,
    *,
    index_ref: IndexMap | None = None,
    outer_index_outer_ref: Mapping[int, Any] | None = None,
    copy_variables: bool = False,
    recreate_variables: bool = True,
) -> Any:
    """As ``merge``, of one state.

    Args:
        graphdef: the definition.
        state: the state.
        index_ref: objects that earlier numbers stand for; those made are added.
        outer_index_outer_ref: objects by the numbers of ``ref_outer_index``, to be changed instead of making new ones.
        copy_variables: as ``copy`` of ``merge``.
        recreate_variables: as for ``merge``.
    """
    outside = outer_index_outer_ref or {}
    existing = {new: outside[old] for new, old in graphdef.outer if old in outside}
    build = Build((), copy=copy_variables, recreate=recreate_variables, existing=existing)
    build.objects.update(index_ref or {})
    made = build.make_with(graphdef.root, leaves_in_order(graphdef, [state]))
    if index_ref is not None:
        index_ref.update(build.objects)
    return made


def clone(node: Any, variables: bool = True, *, arrays: bool = False, graph: bool | None = None) -> Any:
    """A deep copy of an object graph.

    Args:
        node: the object.
        variables: make new variables; otherwise the copy shares them.
        arrays: copy the arrays too, so that the copy can be donated.
        graph: as for ``split``.

    Raises:
        ValueError: ``arrays`` without ``variables``.
    """
    if arrays and not variables:
        raise ValueError("clone(arrays=True) copies the arrays of new variables; pass variables=True too.")
    definition, state_ = split(node, graph=graph)
    if arrays:
        state_ = jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, state_)
    return merge(definition, state_, copy=variables)


# Changing objects.


def update(node: Any, state: Any, /, *states: Any) -> None:
    """Assign the values (and metadata) of one or more states to the variables and attributes of an object.

    A variable keeps its type; what the object lacks becomes a new attribute.

    Args:
        node: the object.
        state: a ``State``, nested dict, ``FlatState`` or ``GraphState``; ``states`` likewise, the later over
            the earlier.

    Raises:
        TraceContextError: a variable was made outside the running JAX transform.
        ValueError: a state has a subtree where the object has a constant.
    """
    if isinstance(node, Variable):
        for value in _without_empty((state, *states)):
            _assign(node, value)
        return
    nested = [s.to_nested_state() if isinstance(s, FlatState) else s for s in (state, *states)]
    _update(node, merge_nested(nested) if len(nested) > 1 else raw_dict(nested[0]))


def _assign(variable: Variable[Any], value: Any) -> None:
    if isinstance(value, Variable):
        variable.update_from_state(value)
    else:
        if isinstance(value, State):
            value = value.to_pure_dict()
        variable.set_raw_value(value) if not variable.ref else variable.set_value(value)


def _update(node: Any, changes: Mapping[Any, Any]) -> None:
    for key, value in changes.items():
        current = _get_child(node, key)
        kind = kind_of(current)
        if kind is Kind.VARIABLE:
            _assign(current, value)
        elif isinstance(value, Mapping) and kind in (Kind.NODE, Kind.CONTAINER):
            _update(current, raw_dict(value))
        else:
            _set_child(node, key, value)


def _get_child(node: Any, key: Any) -> Any:
    if isinstance(node, Pytree):
        return node.__dict__.get(str(key))
    if isinstance(node, list | tuple) and isinstance(key, int):
        return node[key] if key < len(node) else None
    return node.get(key) if isinstance(node, Mapping) else getattr(node, key, None)


def _set_child(node: Any, key: Any, value: Any) -> None:
    if isinstance(node, Pytree):
        setattr(node, str(key), value)
    elif isinstance(node, list | dict | State):
        node[key] = value
    else:
        raise ValueError(f"Cannot assign {key!r} of a {type(node).__name__}, which cannot be changed in place.")


def pop(node: Any, *filters: Filter) -> Any:
    """Remove the variables and arrays that the filters match from an object; of several places of one, the first.

    Returns:
        Their state; a tuple with one state for each filter if there are several.

    Raises:
        ValueError: no filter is given, or a variable is an item of a plain list or tuple.
    """
    if not filters:
        raise ValueError("Expected at least one filter: say which variables to remove.")
    predicates = [to_predicate(f) for f in filters]
    groups: list[list[tuple[PathParts, Any]]] = [[] for _ in filters]
    for path, value in _flat_state_of(structure_of((node,))):
        matched = next((i for i, matches in enumerate(predicates) if matches(path, value)), None)
        if matched is not None:
            groups[matched].append((path, value))
    for path, _ in itertools.chain(*groups):
        _remove(node, path)
    states = tuple([FlatState(group, sort=False).to_nested_state() for group in groups])
    return states if len(filters) > 1 else states[0]


def _remove(node: Any, path: PathParts) -> None:
    for key in path[:-1]:
        node = _get_child(node, key)
    if isinstance(node, Pytree):
        delattr(node, str(path[-1]))
    elif isinstance(node, dict | State):
        del node[path[-1]]
    else:
        raise ValueError(f"Cannot remove the variable at {path}: it is an item of a {type(node).__name__}.")


def map(f: Any, node: Any, /, *, graph: bool | None = None, recreate_variables: bool = True) -> Any:
    """A copy of an object in which each variable and array ``x`` is replaced by ``f(path, x)``."""
    definition, flat = flatten(node, graph=graph)
    mapped = FlatState.from_sorted_keys_values(flat.paths, [f(path, value) for path, value in flat])
    return merge(definition, mapped, recreate_variables=recreate_variables)
