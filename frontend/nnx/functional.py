"""Objects as values: ``unpack``, ``call``, and variables made plain or mutable."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import jax

from distaff.frontend.nnx import graph_functions as graphs
from distaff.frontend.nnx.filters import Filter, to_predicate
from distaff.frontend.nnx.graph_state import GraphState
from distaff.frontend.nnx.graphdef import GraphDef
from distaff.frontend.nnx.state import State
from distaff.frontend.nnx.traversal import find_duplicates
from distaff.frontend.nnx.variables import Variable


def unpack(node: Any, *filters: Filter, graph: bool | None = None) -> Any:
    """As ``split``, with the definition in each state: one ``GraphState``, or a tuple for several filters."""
    definition, *states = graphs.split(node, *filters, graph=graph)
    made = tuple(GraphState(definition, state) for state in states)
    return made[0] if len(made) == 1 else made


class _Caller:
    """Attributes and items of an object that is made of a definition and states when a method is called at last."""

    def __init__(self, parts: tuple[Any, ...], get: Callable[[Any], Any] = lambda x: x) -> None:
        self._parts = parts
        self._get = get

    def __getattr__(self, name: str) -> _Caller:
        return _Caller(self._parts, lambda x, get=self._get: getattr(get(x), name))  # type: ignore[misc]

    def __getitem__(self, key: Any) -> _Caller:
        return _Caller(self._parts, lambda x, get=self._get: operator.getitem(get(x), key))  # type: ignore[misc]

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, tuple[GraphDef[Any], State]]:
        """The method's result, and the definition and state afterwards."""
        definition, *states = self._parts
        node = graphs.merge(definition, *states, copy=True)
        result = self._get(node)(*args, **kwargs)
        return result, graphs.split(node, graph=definition.graph)


def call(graphdef_state: tuple[Any, ...], /) -> Any:
    """Call methods of an object given as ``(graphdef, state)``, without changing the state given.

    >>> y, (graphdef, state) = nnx.call((graphdef, state))(x)
    >>> y, (graphdef, state) = nnx.call((graphdef, state)).encoder.layers[0](x)
    """
    return _Caller(tuple(graphdef_state))


def as_pure(tree: Any) -> Any:
    """The tree with each variable replaced by its value."""

    def is_variable(x: Any) -> bool:
        return isinstance(x, Variable)

    return jax.tree.map(lambda x: x.get_raw_value() if is_variable(x) else x, tree, is_leaf=is_variable)


pure = as_pure


def with_vars(
    node: Any,
    /,
    *,
    hijax: bool | None = None,
    ref: bool | None = None,
    mutable: bool | None = None,
    only: Filter = ...,
    allow_duplicates: bool = False,
) -> Any:
    """A copy of an object with variables of other kinds where they are not of those already.

    Args:
        node: the object, or a state.
        hijax: whether JAX's own transforms may change them: see ``nnx.Variable``.
        ref: whether they lie in mutable arrays.
        mutable: the metadata of this name.
        only: which variables.
        allow_duplicates: also copy variables that stand at several places, of which there is one copy then.

    Raises:
        ValueError: a variable to be copied stands at two places, unless ``allow_duplicates``.
    """
    given = {"hijax": hijax, "ref": ref, "mutable": mutable}
    wanted = {name: value for name, value in given.items() if value is not None}
    matches = to_predicate(only)

    def is_other(path: Any, x: Any) -> bool:
        if not isinstance(x, Variable) or not matches(path, x):
            return False
        return any(x.get_metadata(name, None) != value for name, value in wanted.items())

    if not allow_duplicates:
        duplicates = find_duplicates(node, only=is_other)
        if duplicates:
            raise ValueError(
                f"Found duplicate at paths: {duplicates}. A variable stands at several places; to copy it once, "
                "pass allow_duplicates=True."
            )
    return graphs.map(
        lambda path, x: x.copy(**wanted) if is_other(path, x) else x, node, graph=True, recreate_variables=False
    )


vars_as = with_vars
