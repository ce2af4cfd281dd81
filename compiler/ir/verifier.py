"""Checks that a graph is well formed; run after every pass, so that a broken pass is named at once."""

from __future__ import annotations

from distaff.compiler.errors import VerificationError
from distaff.compiler.ir.graph import ATTENTION, EMBED, MATMUL, ROW_PROGRAM, Graph

_OWN = frozenset({ATTENTION, ROW_PROGRAM, MATMUL, EMBED})


def verify(graph: Graph, after: str) -> None:
    """Raises `VerificationError` if an operand is used before it is defined, or a node or value is inconsistent."""
    defined = {id(v) for v in graph.inputs}

    def usable(value: object) -> bool:
        return id(value) in defined or getattr(value, "data", None) is not None

    for i, node in enumerate(graph.nodes):
        where = f"after pass {after}: node {i} ({node.op}, {node.location.short()})"
        for value in node.inputs:
            if not usable(value):
                raise VerificationError(f"{where} takes a value of type {value.type} that is not defined before it")
        for j, value in enumerate(node.outputs):
            if value.node is not node or value.index != j:
                raise VerificationError(f"{where}: result {j} does not point back to its node")
            if id(value) in defined:
                raise VerificationError(f"{where}: result {j} is defined twice")
            defined.add(id(value))
        if node.primitive is None and node.op not in _OWN:
            raise VerificationError(f"{where} has neither a primitive nor a meaning of its own")
    for value in graph.outputs:
        if not usable(value):
            raise VerificationError(f"after pass {after}: an output of type {value.type} is not defined")
