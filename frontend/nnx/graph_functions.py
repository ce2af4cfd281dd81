"""Functions on object graphs: split them into a static definition and a state, and join, update and walk them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import jax

from distaff.frontend.nnx.filters import Filter, PathParts, to_predicate
from distaff.frontend.nnx.graph_state import GraphState
from distaff.frontend.nnx.graphdef import Build, GraphDef, NodeDef, graph_mode, leaves_of, nested_leaves
from distaff.frontend.nnx.kinds import Kind, kind_of
from distaff.frontend.nnx.pytrees import Pytree
from distaff.frontend.nnx.state import FlatState, State, filter_flat, merge_nested, raw_dict, split_flat
from distaff.frontend.nnx.structure import Structure, structure_of
from distaff.frontend.nnx.variables import Variable


def _leaf(cell: Any) -> Any:
    return cell if isinstance(cell, Variable) else cell._raw_value


def _state_of(found: Structure) -> Any:
    root = found.specs[0]
    if isinstance(root, NodeDef):
        return State(nested_leaves(root, (_leaf(cell) for cell in found.cells)), _copy=False)
    return _leaf(found.cells[0])


def _flat_state_of(found: Structure) -> FlatState[Any]:
    return FlatState.from_sorted_keys_values(found.graphdef.paths, [_leaf(cell) for cell in found.cells])


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


def merge(graphdef: Any, /, *states: Any, copy: bool = False, recreate_variables: bool = True) -> Any:
    """Make the object of a definition and one or more states; the inverse of ``split``.

    Args:
        graphdef: the definition, or a ``GraphState``.
        states: ``State`` objects or nested dicts, with variables or plain values as leaves; or a ``FlatState``, or
            a list of leaves in order.
        copy: make new variables of those in the states, which the object shares otherwise.
        recreate_variables: make new variables of those that cannot be assigned under the running JAX transform.

    Raises:
        ValueError: the states lack leaves that the definition has, or have others.
    """
    if isinstance(graphdef, GraphState):
        graphdef, states = graphdef.graphdef, (graphdef, *states)
    leaves = leaves_in_order(graphdef, [s.state if isinstance(s, GraphState) else s for s in states])
    return Build(iter(leaves), copy=copy, recreate=recreate_variables).make(graphdef.root)


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
    return leaves_of(graphdef, merge_nested(nested))


def flatten(node: Any, /, *, with_paths: bool = True, graph: bool | None = None) -> tuple[GraphDef[Any], Any]:
    """The definition and a ``FlatState``; without ``with_paths``, a list of the raw values instead."""
    found = structure_of((node,), graph_mode(graph))
    return found.graphdef, _flat_state_of(found) if with_paths else found.values()


def unflatten(
    graphdef: GraphDef[Any], state: Any, /, *, copy_variables: bool = False, recreate_variables: bool = True
) -> Any:
    """As ``merge``, of one state."""
    return merge(graphdef, state, copy=copy_variables, recreate_variables=recreate_variables)


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
        _assign(node, state)
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
    if isinstance(node, list | tuple):
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
    """Remove the variables that the filters match from an object; of one that stands at several places, the first.

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
        if isinstance(value, Variable) and matched is not None:
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
