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
    """A copy of an object whose variables lie in mutable arrays (``ref=True``), or no longer do (``ref=False``).

    Raises:
        NotImplementedError: ``hijax`` or ``mutable`` is given.
        ValueError: a variable stands at two places, unless ``allow_duplicates``.
    """
    if hijax or mutable is not None:
        raise NotImplementedError("with_vars changes `ref` only; hijax and mutable are not supported.")
    if not allow_duplicates:
        duplicates = find_duplicates(node, only=Variable)
        if duplicates:
            raise ValueError(f"Variables stand at several places: {duplicates}. Pass allow_duplicates=True.")
    matches = to_predicate(only)

    def convert(path: Any, x: Any) -> Any:
        if not isinstance(x, Variable) or ref is None or not matches(path, x):
            return x
        raw: Any = x.get_raw_value()
        if ref and not x.ref:
            return x.copy(jax.new_ref(raw))
        return x.copy(raw[...]) if x.ref and not ref else x.copy()

    return graphs.map(convert, node, graph=True)


vars_as = with_vars
