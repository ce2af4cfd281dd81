"""Clean-up: constants are folded, equal computations are made one, unused ones are dropped."""

from __future__ import annotations

from typing import Any

import numpy as np

from distaff.compiler.ir import Graph, Node, Value
from distaff.compiler.ir.evaluate import Evaluator
from distaff.compiler.ir.hashing import constant_key, parameters_key

FOLD_LIMIT = 1 << 20  # bytes of a result that is always worth keeping instead of computing


def fold_constants(graph: Graph) -> Graph:
    """Computes now what depends on weights and numbers alone.

    A large result replaces its weight only if nothing else uses the weight and it takes no more memory: a tied
    embedding is not stored twice for its transpose, and quantised weights are not expanded.
    """
    consumers = graph.consumers()
    folded: dict[int, Value] = {}
    kept: list[Node] = []
    for node in graph.nodes:
        node.inputs = tuple(folded.get(id(v), v) for v in node.inputs)
        constant = all(v.is_constant for v in node.inputs) and not any(v.type.token_dims for v in node.outputs)
        if constant and _worth_folding(node, consumers):
            evaluator = Evaluator({}, {}, {})
            evaluator.run([node])
            name = next((v.name for v in node.inputs if v.name), "")
            for value in node.outputs:
                new = Value(value.type, name=f"{name}.{node.op}" if name else "", data=evaluator[value])
                folded[id(value)] = new
                consumers[id(new)] = consumers.get(id(value), [])
        else:
            kept.append(node)
    outputs = tuple(folded.get(id(v), v) for v in graph.outputs)
    return Graph(graph.inputs, kept, outputs).reachable()


def _worth_folding(node: Node, consumers: dict[int, list[Node]]) -> bool:
    size = sum(_bytes(v) for v in node.outputs)
    if size <= FOLD_LIMIT:
        return True
    alone = all(len(consumers.get(id(v), [])) <= 1 for v in node.inputs if _bytes(v) > FOLD_LIMIT)
    return alone and size <= sum(_bytes(v) for v in node.inputs)


def _bytes(value: Value) -> int:
    return int(np.prod(value.type.per_token(), dtype=np.int64)) * value.type.dtype.itemsize


def merge_equal(graph: Graph) -> Graph:
    """Makes computations with the same operation, parameters and operands one (rope tables of every layer, masks)."""
    seen: dict[Any, Node] = {}
    renamed: dict[int, Value] = {}
    kept: list[Node] = []
    for node in graph.nodes:
        node.inputs = tuple(renamed.get(id(v), v) for v in node.inputs)
        key = (
            node.op,
            parameters_key(node.params),
            tuple(_operand_key(v) for v in node.inputs),
            tuple(str(v.type) for v in node.outputs),
        )
        first = seen.setdefault(key, node)
        if first is node:
            kept.append(node)
        else:
            renamed.update({id(a): b for a, b in zip(node.outputs, first.outputs, strict=True)})
    outputs = tuple(renamed.get(id(v), v) for v in graph.outputs)
    return Graph(graph.inputs, kept, outputs).reachable()


def _operand_key(value: Value) -> Any:
    if value.data is not None and not value.name and np.size(value.data) <= 64:
        return constant_key(value)
    return id(value.data) if value.data is not None else id(value)
