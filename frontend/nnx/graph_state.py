"""``GraphState``: the definition and the state of an object in one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

import jax

from distaff.frontend.nnx.graphdef import GraphDef
from distaff.frontend.nnx.state import State, sorted_keys


class GraphState(MutableMapping[Any, Any]):
    """A definition and (a part of) its state: a mapping, its entries attributes, and a pytree node as the state is."""

    _graphdef: GraphDef[Any]
    _state: State

    def __init__(self, _graphdef: GraphDef[Any], _state: State) -> None:
        object.__setattr__(self, "_graphdef", _graphdef)
        object.__setattr__(self, "_state", _state)

    def __getitem__(self, key: Any) -> Any:
        return self._state[key]

    def __getattr__(self, key: str) -> Any:
        if "_state" not in vars(self) or key not in self._state:
            raise AttributeError(f"{type(self).__name__} has no entry {key!r}.")
        return self._state[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._state[key] = value

    __setattr__ = __setitem__

    def __delitem__(self, key: Any) -> None:
        del self._state[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def __repr__(self) -> str:
        return f"GraphState({self._graphdef!r}, {self._state!r})"


def _flatten(x: GraphState) -> tuple[list[Any], Any]:
    keys = tuple(sorted_keys(x._state))
    return [x._state[key] for key in keys], (x._graphdef, keys)


def _flatten_with_keys(x: GraphState) -> tuple[list[Any], Any]:
    children, static = _flatten(x)
    return list(zip(map(jax.tree_util.DictKey, static[1]), children, strict=True)), static


def _unflatten(static: Any, children: Iterable[Any]) -> GraphState:
    graphdef, keys = static
    state = State({})
    for key, child in zip(keys, children, strict=True):
        state[key] = child
    return GraphState(graphdef, state)


jax.tree_util.register_pytree_with_keys(GraphState, _flatten_with_keys, _unflatten, _flatten)
