"""The IR: a small SSA graph over JAX primitives and a few operations of our own.

Capture makes it flat (calls inlined, loops over layers unrolled), so a pass sees one list of nodes. Operations of our
own (`ATTENTION`, `MATMUL` and so on) have no primitive; they are raised by passes and expanded by lowering.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from distaff.compiler.ir.location import UNKNOWN, Location
from distaff.compiler.ir.types import TensorType

ATTENTION = "distaff.attention"
ROW_PROGRAM = "distaff.row_program"
MATMUL = "distaff.matmul"
EMBED = "distaff.embed"


@dataclasses.dataclass(eq=False)
class Value:
    """An SSA value: a node's result, an input, or (with ``data``) a weight, constant or position table.

    A *weight* has a name; a *table* has token dimensions and data for the longest length that was traced: its value at
    length S is the leading part.
    """

    type: TensorType
    node: Node | None = None
    index: int = 0
    name: str = ""
    data: Any = None

    @property
    def is_constant(self) -> bool:
        """Whether the value is known or a weight, and does not span the token axis."""
        return self.data is not None and not self.type.token_dims

    @property
    def is_table(self) -> bool:
        """Whether the value is a captured array that spans the token axis."""
        return self.data is not None and bool(self.type.token_dims)


@dataclasses.dataclass(eq=False)
class Node:
    """One operation. ``params`` may hold symbolic dimensions; ``primitive`` is None for operations of our own."""

    op: str
    inputs: tuple[Value, ...]
    params: dict[str, Any]
    outputs: tuple[Value, ...] = ()
    location: Location = UNKNOWN
    primitive: Any = None

    @classmethod
    def make(
        cls,
        op: str,
        inputs: Iterable[Value],
        params: dict[str, Any],
        types: Iterable[TensorType],
        location: Location = UNKNOWN,
        primitive: Any = None,
    ) -> Node:
        """Builds a node together with its output values."""
        node = cls(op, tuple(inputs), params, (), location, primitive)
        node.outputs = tuple(Value(t, node, i) for i, t in enumerate(types))
        return node

    @property
    def output(self) -> Value:
        """The only result."""
        (value,) = self.outputs
        return value


@dataclasses.dataclass(eq=False)
class Graph:
    """Nodes in an order in which they can run, with inputs and outputs; weights and constants hang on the values."""

    inputs: tuple[Value, ...]
    nodes: list[Node]
    outputs: tuple[Value, ...]

    def constants(self) -> list[Value]:
        """Weights, constants and tables that the nodes use, each once, in order of first use."""
        seen: dict[int, Value] = {}
        for node in self.nodes:
            for value in node.inputs:
                if value.data is not None:
                    seen.setdefault(id(value), value)
        for value in self.outputs:
            if value.data is not None:
                seen.setdefault(id(value), value)
        return list(seen.values())

    def consumers(self) -> dict[int, list[Node]]:
        """For each value (by ``id``) the nodes that take it."""
        users: dict[int, list[Node]] = {}
        for node in self.nodes:
            for value in {id(v): v for v in node.inputs}.values():
                users.setdefault(id(value), []).append(node)
        return users

    def reachable(self) -> Graph:
        """The same graph without nodes that no output needs."""
        live = {id(v.node) for v in self.outputs if v.node is not None}
        for node in reversed(self.nodes):
            if id(node) in live:
                live.update(id(v.node) for v in node.inputs if v.node is not None)
        return Graph(self.inputs, [n for n in self.nodes if id(n) in live], self.outputs)


def ancestors(values: Iterable[Value]) -> Iterator[Node]:
    """All nodes that the values are computed from, each once, in no particular order."""
    seen: set[int] = set()
    stack = [v.node for v in values if v.node is not None]
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        stack.extend(v.node for v in node.inputs if v.node is not None)
