"""``GraphState``: the definition and the state of an object in one."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import jax

from distaff.frontend.nnx.graphdef import GraphDef
from distaff.frontend.nnx.state import State


class GraphState(MutableMapping[Any, Any]):
    """A definition and (a part of) its state; a mapping as the state is one, and a pytree node with its leaves."""

    def __init__(self, _graphdef: GraphDef[Any], _state: State) -> None:
        self.graphdef = _graphdef
        self.state = _state

    def __getitem__(self, key: Any) -> Any:
        return self.state[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.state[key] = value

    def __delitem__(self, key: Any) -> None:
        del self.state[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)

    def __repr__(self) -> str:
        return f"GraphState({self.graphdef!r}, {self.state!r})"


jax.tree_util.register_pytree_with_keys(
    GraphState,
    lambda x: (((jax.tree_util.GetAttrKey("state"), x.state),), x.graphdef),
    lambda graphdef, children: GraphState(graphdef, *children),
    lambda x: ((x.state,), x.graphdef),
)
