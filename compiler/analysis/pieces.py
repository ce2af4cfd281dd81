"""Pieces of a program around one value: found by walking back from it, and run by themselves on chosen inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from distaff.compiler.analysis.tokens import Kind, TokenClasses
from distaff.compiler.ir import Graph, Node, Value
from distaff.compiler.ir.evaluate import Evaluator
from distaff.compiler.ir.types import TOKENS


@dataclasses.dataclass
class Piece:
    """``nodes``, from the last to the first, compute a value of ``inputs`` (token data) and ``index`` (by positions).

    Both map ``id(value)`` to the value.
    """

    inputs: dict[int, Value]
    nodes: list[Node] = dataclasses.field(default_factory=list)
    index: dict[int, Value] = dataclasses.field(default_factory=dict)

    def source_of(self, value: Value) -> Value | None:
        """The only input, if it holds as much of each token as ``value``."""
        if len(self.inputs) != 1:
            return None
        (source,) = self.inputs.values()
        same = np.prod(source.type.per_token()) == np.prod(value.type.per_token())
        return source if same and len(source.type.token_dims) == 1 else None


def walk_back(
    value: Value, graph: Graph, classes: TokenClasses, operations: Collection[str], most: int
) -> Iterator[Piece]:
    """The piece before ``value``, longer by one node each time; the same object, which grows.

    It ends where an operation is none of ``operations``, where a constant is computed, and after ``most`` nodes.
    """
    place = {id(n): i for i, n in enumerate(graph.nodes)}
    piece = Piece({id(value): value})
    while piece.inputs and len(piece.nodes) < most:
        latest = max(piece.inputs.values(), key=lambda v: -1 if v.node is None else place[id(v.node)])
        node = latest.node
        if node is None or node.op not in operations:
            return
        for made in node.outputs:
            piece.inputs.pop(id(made), None)
        piece.nodes.append(node)
        for operand in node.inputs:
            kind = classes.kinds.get(id(operand), Kind.CONSTANT)
            if kind is Kind.TOKEN:
                piece.inputs[id(operand)] = operand
            elif kind is Kind.INDEX:
                piece.index[id(operand)] = operand
            elif operand.data is None:
                return
        yield piece


def run_piece(
    value: Value, nodes: Sequence[Node], known: Mapping[int, np.ndarray], positions: np.ndarray
) -> np.ndarray:
    """``value`` as ``nodes``, in order, compute it of the ``known`` arrays (by ``id``) for tokens at ``positions``."""
    evaluator = Evaluator({TOKENS: len(positions)}, {TOKENS: positions}, known)
    evaluator.run(nodes)
    return np.asarray(evaluator[value])


def token_rows(value: Value, array: np.ndarray) -> np.ndarray:
    """A token value as float64 ``[tokens, values of one token]``."""
    (dim,) = value.type.token_dims
    return np.moveaxis(np.asarray(array, np.float64), dim, 0).reshape(array.shape[dim], -1)
