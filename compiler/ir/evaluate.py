"""Running a graph: each node is applied again through its primitive, at given sizes and positions.

This is how derived programs are emitted (under ``jax.jit``), how constants are folded and how the analyses try small
pieces of a program. Positions turn functions of the sequence into functions of a ragged batch: an ``iota`` over a
token axis gives the positions of that axis, and a table is read at them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.compiler import jax_compat
from distaff.compiler.ir.graph import Node, Value
from distaff.compiler.ir.types import Sym, resolve


class Evaluator:
    """Evaluates nodes in order; ``known`` maps ``id(value)`` to arrays and is filled on the way.

    ``sizes`` gives the size of each token axis and ``positions`` the int32 positions along it.
    """

    def __init__(self, sizes: Mapping[str, int], positions: Mapping[str, Any], known: Mapping[int, Any]) -> None:
        self.sizes = sizes
        self.positions = positions
        self.known: dict[int, Any] = dict(known)

    def run(self, nodes: Iterable[Node]) -> None:
        """Evaluates the nodes, which must stand in order, skipping those whose results are known."""
        for node in nodes:
            if id(node.outputs[0]) in self.known:
                continue
            with jax_compat.at_location(node.location):
                results = self.apply(node)
            for value, result in zip(node.outputs, results, strict=True):
                self.known[id(value)] = result

    def __getitem__(self, value: Value) -> Any:
        """The array of a value that has been evaluated, or of a constant, weight or table."""
        if id(value) in self.known:
            return self.known[id(value)]
        if value.data is None:
            raise KeyError(f"value {value.name or value.type} has not been evaluated")
        return self.table(value) if value.is_table else value.data

    def table(self, value: Value) -> Any:
        """A table at the positions of its token dimensions."""
        result = jnp.asarray(value.data)
        for d in value.type.token_dims:
            dim = value.type.shape[d]
            assert isinstance(dim, Sym)
            result = jnp.take(result, self.positions[dim.axis], axis=d, mode="clip")
        return result

    def apply(self, node: Node) -> list[Any]:
        """The results of one node, from its evaluated inputs."""
        if node.op == "iota":
            return [self.iota(node)]
        inputs = [self[v] for v in node.inputs]
        if node.op == "slice" and self.is_table_slice(node):
            return [self.table_slice(node, inputs[0])]
        params = {k: resolve(v, self.sizes) for k, v in node.params.items()}
        return jax_compat.bind(node.primitive, inputs, params)

    def iota(self, node: Node) -> Any:
        """Positions along a token axis, or plain numbers along any other."""
        dimension, shape = node.params["dimension"], node.outputs[0].type.shape
        dim = shape[dimension]
        dtype = node.params["dtype"]
        line: Any
        if isinstance(dim, Sym):
            line = jnp.asarray(self.positions[dim.axis]).astype(dtype)
        else:
            line = np.arange(dim, dtype=dtype)
        column = line.reshape([-1 if i == dimension else 1 for i in range(len(shape))])
        full = tuple(resolve(tuple(shape), self.sizes))
        return column if column.shape == full else jnp.broadcast_to(column, full)

    @staticmethod
    def is_table_slice(node: Node) -> bool:
        """Whether the node cuts ``table[start : start + S]`` out of an array without a token axis."""
        return not node.inputs[0].type.token_dims and bool(node.outputs[0].type.token_dims)

    def table_slice(self, node: Node, array: Any) -> Any:
        """Rows ``position + start`` of an array."""
        result = array
        for d, (start, limit) in enumerate(
            zip(node.params["start_indices"], node.params["limit_indices"], strict=True)
        ):
            if isinstance(limit, Sym):
                result = jnp.take(result, self.positions[limit.axis] + start, axis=d, mode="clip")
            else:
                result = jax.lax.slice_in_dim(result, start, limit, axis=d)
        return result
