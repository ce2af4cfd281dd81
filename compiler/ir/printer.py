"""The IR as text: one line a node, with types, parameters and the user's line.

Names are ``%n`` for results, ``@name`` for weights, numbers for scalars and ``const``/``table`` for other arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from distaff.compiler.ir.graph import Graph, Node, Value

_HIDDEN_PARAMS = frozenset(
    """sharding out_sharding precision preferred_element_type accuracy weak_type unique_indices indices_are_sorted
    fill_value mode region pattern is_stable""".split()
)


def print_graph(graph: Graph, *, locations: bool = True, annotations: dict[int, str] | None = None) -> str:
    """The graph as text; ``annotations`` (by ``id`` of a value) are added to the line that defines the value."""
    names = _Names(graph)
    notes = annotations or {}
    lines = [f"graph({', '.join(f'%{v.name or i}: {v.type}' for i, v in enumerate(graph.inputs))}) {{"]
    for node in graph.nodes:
        lines.append("  " + _line(node, names, notes) + (f"  // {node.location.short()}" if locations else ""))
    lines.append(f"  return {', '.join(names[v] for v in graph.outputs)}")
    return "\n".join([*lines, "}"]) + "\n"


def _line(node: Node, names: _Names, notes: dict[int, str]) -> str:
    results = ", ".join(f"{names[v]}: {v.type}{' ' + notes[id(v)] if id(v) in notes else ''}" for v in node.outputs)
    shown = {k: v for k, v in node.params.items() if k not in _HIDDEN_PARAMS and v is not None}
    params = " {" + ", ".join(f"{k}={_parameter(v)}" for k, v in sorted(shown.items())) + "}" if shown else ""
    return f"{results} = {node.op}({', '.join(names[v] for v in node.inputs)}){params}"


def _parameter(value: Any) -> str:
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return "(" + ",".join(_parameter(v) for v in value) + ")"
    return str(value)


class _Names:
    def __init__(self, graph: Graph) -> None:
        self.names = {id(v): f"%{v.name or i}" for i, v in enumerate(graph.inputs)}
        for i, value in enumerate(v for node in graph.nodes for v in node.outputs):
            self.names[id(value)] = f"%{i}"

    def __getitem__(self, value: Value) -> str:
        if id(value) in self.names:
            return self.names[id(value)]
        if value.name:
            return f"@{value.name}"
        if value.type.rank == 0 and value.data is not None:
            return f"{np.asarray(value.data).item()!r}:{value.type.dtype}"
        return f"{'table' if value.is_table else 'const'} {value.type}"
