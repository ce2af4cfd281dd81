"""Structural hashing: equal programs get equal keys, whatever their values are called and wherever they come from.

Repeated layers have equal bodies up to their weights, so proofs and matches are made once and looked up for the rest.
Arrays of up to `CONTENT_LIMIT` elements count by content, larger ones (weights) by type alone.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from distaff.compiler.ir.graph import Graph, Value

CONTENT_LIMIT = 65536


def structural_key(graph: Graph) -> str:
    """A hash that is equal for graphs of the same operations, parameters, types, wiring and small constants."""
    numbers = {id(v): f"input{i}:{v.type}" for i, v in enumerate(graph.inputs)}
    digest = hashlib.sha256()
    for i, node in enumerate(graph.nodes):
        operands = [numbers.get(id(v)) or constant_key(v) for v in node.inputs]
        kinds = [str(v.type) for v in node.outputs]
        digest.update(repr((node.op, operands, parameters_key(node.params), kinds)).encode())
        numbers.update({id(v): f"{i}.{j}" for j, v in enumerate(node.outputs)})
    digest.update(repr([numbers.get(id(v)) or constant_key(v) for v in graph.outputs]).encode())
    return digest.hexdigest()


def constant_key(value: Value) -> str:
    """A key for a constant, weight or table."""
    if np.size(value.data) > CONTENT_LIMIT:
        return f"{value.type}"
    array = np.ascontiguousarray(np.asarray(value.data))
    return f"{value.type}:{hashlib.sha256(array.tobytes()).hexdigest()[:16]}"


def parameters_key(params: dict[str, Any]) -> str:
    """A key for a node's parameters: names and printed values in order of name."""
    return repr([(k, str(params[k])) for k in sorted(params)])
