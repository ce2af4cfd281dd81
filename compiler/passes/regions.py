"""Cutting an attention region out of a graph: the body as a function of one query token and all key tokens.

Walking up from the region's end, the token axis of every value is bound to the role that it plays for its consumer:
``q`` (the query) or ``k`` (the keys). The same ``arange`` can so become a row index and a column index. Token data
where the walk stops are the *leaves*; those bound to ``k`` are what the KV cache must hold.

The cut on the key side is moved up through operations that only repeat, reshape or widen, so that grouped-query heads
are cached once and bf16 keys are cached as bf16.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from distaff.compiler.analysis.dims import STRUCTURAL, TOUCHED, dim_map
from distaff.compiler.analysis.tokens import DATA, Kind, TokenClasses
from distaff.compiler.errors import MixesTokensError, UnsupportedOperationError
from distaff.compiler.ir import Graph, Node, Sym, TensorType, Value
from distaff.compiler.ir.types import KEY, QUERY

Binding = tuple[tuple[int, str], ...]  # (dimension, axis) of each token dimension of a value


@dataclasses.dataclass(frozen=True)
class Region:
    """A body with one output over ``q`` and, for each body input, the outer value and the axis that it is bound to."""

    root: Value
    body: Graph
    leaves: tuple[tuple[Value, str], ...]


def extract_region(root: Value, classes: TokenClasses, *, latent: bool = False) -> Region:
    """Builds the region that ends at ``root``; with ``latent`` the cut also crosses narrowing-in-reverse products.

    Raises `MixesTokensError` if query and key roles cannot be told apart (normalising over queries).
    """
    builder = _Builder(classes, latent)
    (dim,) = root.type.token_dims
    output = builder.computed(root, ((dim, QUERY),))
    inputs = tuple(v for v, _, _ in builder.leaves.values())
    leaves = tuple((outer, axis) for _, outer, axis in builder.leaves.values())
    return Region(root, Graph(inputs, builder.nodes, (output,)), leaves)


class _Builder:
    def __init__(self, classes: TokenClasses, latent: bool) -> None:
        self.classes = classes
        self.latent = latent
        self.nodes: list[Node] = []
        self.memo: dict[tuple[int, Binding], Value] = {}
        self.leaves: dict[tuple[int, str], tuple[Value, Value, str]] = {}

    def bind(self, value: Value, binding: Binding) -> Value:
        """The body's value for an outer one, its token dimensions bound to axes."""
        if value.is_constant:
            return value
        if (id(value), binding) in self.memo:
            return self.memo[id(value), binding]
        kind = self.classes[value]
        if value.is_table:
            bound = Value(_bound(value.type, binding), name=value.name, data=value.data)
        elif kind is Kind.TOKEN:
            bound = self.leaf(value, binding)
        else:
            return self.computed(value, binding)
        self.memo[id(value), binding] = bound
        return bound

    def leaf(self, value: Value, binding: Binding) -> Value:
        ((_, axis),) = binding
        if axis == KEY and value.node is not None and id(value) in self.crossed(value):
            return self.computed(value, binding)
        if (id(value), axis) not in self.leaves:
            self.leaves[id(value), axis] = (
                Value(_bound(value.type, binding), name=f"leaf{len(self.leaves)}"),
                value,
                axis,
            )
        return self.leaves[id(value), axis][0]

    def crossed(self, value: Value) -> set[int]:
        """Values between ``value`` and the cheapest one to cache above it: these are recomputed from the cache."""
        chain = [value]
        while (above := self.above(chain[-1])) is not None:
            chain.append(above)
        cheapest = min(range(len(chain)), key=lambda i: (_bytes(chain[i].type), -i))
        return {id(v) for v in chain[:cheapest]}

    def above(self, value: Value) -> Value | None:
        node = value.node
        if node is None:
            return None
        data = [v for v in node.inputs if self.classes[v] in DATA]
        if len(data) != 1 or self.classes[data[0]] is not Kind.TOKEN:
            return None
        if any(self.classes[v] is not Kind.CONSTANT for v in node.inputs if v is not data[0]):
            return None
        crossable = node.op in STRUCTURAL or node.op == "convert_element_type"
        if self.latent and node.op == "dot_general":
            crossable = True
        if not crossable or any(_lost(node, data[0])):
            return None
        return data[0]

    def computed(self, value: Value, binding: Binding) -> Value:
        node = value.node
        assert node is not None, "a value without data or node is a leaf"
        axes = dict(binding)
        if self.classes[value] is Kind.PAIR and sorted(axes.values()) != sorted((QUERY, KEY)):
            raise MixesTokensError(
                node.op, node.location, "it uses a [query, key] matrix with both axes in the same role",
                "normalise and sum attention scores over keys, for each query by itself",
            )  # fmt: skip
        maps = dim_map(node)
        assert maps is not None, "classification has refused unknown primitives"
        inputs = []
        for operand, dims in zip(node.inputs, maps, strict=True):
            bound = []
            for d in operand.type.token_dims:
                target = dims[d]
                bound.append((d, KEY if target == TOUCHED or target is None else axes[target]))
            inputs.append(self.bind(operand, tuple(bound)))
        clone = Node.make(
            node.op, inputs, self.params(node, axes), [_bound(v.type, binding) for v in node.outputs],
            node.location, node.primitive,
        )  # fmt: skip
        self.nodes.append(clone)
        for original, new in zip(node.outputs, clone.outputs, strict=True):
            self.memo[id(original), binding] = new
        return clone.outputs[value.index]

    def params(self, node: Node, axes: dict[int, str]) -> dict[str, Any]:
        renamed = {}
        for key, value in node.params.items():
            if _has_symbol(value):
                if key not in ("shape", "new_sizes", "start_indices", "limit_indices"):
                    raise UnsupportedOperationError(
                        node.op, node.location, f"its parameter {key} spans the token axis inside attention",
                        "build masks and biases from comparisons of jnp.arange positions",
                    )  # fmt: skip
                value = tuple(
                    dataclasses.replace(d, axis=axes[i]) if isinstance(d, Sym) else d for i, d in enumerate(value)
                )
            renamed[key] = value
        return renamed


def _bound(kind: TensorType, binding: Binding) -> TensorType:
    axes = dict(binding)
    return TensorType(tuple(Sym(axes[i]) if i in axes else d for i, d in enumerate(kind.shape)), kind.dtype)


def _bytes(kind: TensorType) -> int:
    return int(np.prod(kind.per_token(), dtype=np.int64)) * kind.dtype.itemsize


def _lost(node: Node, value: Value) -> list[bool]:
    maps = dim_map(node) or []
    dims = maps[[id(v) for v in node.inputs].index(id(value))]
    return [dims[d] in (TOUCHED, None) for d in value.type.token_dims]


def _has_symbol(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_has_symbol(v) for v in value)
    return isinstance(value, Sym)
