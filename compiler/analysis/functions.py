"""Reading functions by evaluating them: which normalisation or activation a piece of program computes.

A piece is run on random inputs and compared with the functions that kernels know. So it does not matter how it is
spelled (``x * rsqrt(...)``, ``x / sqrt(...)``, a logistic or an exponential), and what differs is never mistaken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from distaff.compiler.analysis.dims import ELEMENTWISE, REDUCTIONS, STRUCTURAL
from distaff.compiler.analysis.tokens import Kind, TokenClasses
from distaff.compiler.ir import Graph, Node, Value
from distaff.compiler.ir.evaluate import Evaluator
from distaff.compiler.ir.types import TOKENS

_TOKENS = 6
_MOST_NODES = 32
_TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 2e-3}

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class RmsNorm:
    """``source * rsqrt(mean(source ** 2) + epsilon) * weight``; ``name`` is the weight's."""

    source: Value
    weight: np.ndarray
    epsilon: float
    name: str


@dataclasses.dataclass(frozen=True)
class Gate:
    """``activation(leaves[gate]) * leaves[1 - gate]``."""

    activation: str
    gate: int


def read_rms_norm(value: Value, graph: Graph, classes: TokenClasses) -> RmsNorm | None:
    """What ``value`` normalises, if it is the RMS norm (arXiv:1910.07467) of another value; None if it is not."""
    found = _source_of_norm(value, graph, classes)
    if found is None:
        return None
    source, nodes = found
    rng = np.random.default_rng(0)
    shape = source.type.at({TOKENS: _TOKENS})
    (dim,) = source.type.token_dims
    # Small rows tell the epsilons apart.
    scales = np.geomspace(1e-3, 3.0, _TOKENS).reshape([-1 if i == dim else 1 for i in range(len(shape))])
    x = (rng.standard_normal(shape) * scales).astype(source.type.dtype)
    y = _rows(value, _evaluate(value, nodes, {id(source): x}))
    rows = _rows(source, x)
    constants = [v for n in nodes for v in n.inputs if v.data is not None]
    numbers = {float(np.asarray(v.data)) for v in constants if np.size(v.data) == 1 and v.type.dtype.kind == "f"}
    for epsilon in sorted(e for e in numbers if 0 <= e < 1e-2):
        unit = rows / np.sqrt(np.mean(rows**2, axis=1, keepdims=True) + epsilon)
        weight = np.sum(y * unit, axis=0) / np.sum(unit * unit, axis=0)
        if _close(y, unit * weight, source, value):
            # The weight itself where it is there, rather than what was fitted.
            exact = [np.asarray(v.data, np.float64).reshape(-1) for v in constants if np.size(v.data) == weight.size]
            weight = next((w for w in exact if np.allclose(w, weight, rtol=1e-3, atol=1e-6)), weight)
            name = next((v.name for v in constants if v.name), "norm")
            return RmsNorm(source, weight.astype(np.float32), epsilon, name)
    return None


def read_activation(root: Value, leaf: Value, nodes: Sequence[Node]) -> str | None:
    """The name in `ACTIVATIONS` of the elementwise function that ``nodes`` compute of ``leaf``."""
    x = _sample(leaf, 0)
    y = _rows(root, _evaluate(root, nodes, {id(leaf): x}))
    rows = _rows(leaf, x)
    return next((n for n, f in ACTIVATIONS.items() if _close(y, _apply(f, rows), leaf, root)), None)


def read_gate(root: Value, leaves: Sequence[Value], nodes: Sequence[Node]) -> Gate | None:
    """How ``nodes`` join two values: an activation of one of them times the other."""
    arrays = [_sample(leaf, i) for i, leaf in enumerate(leaves)]
    y = _rows(root, _evaluate(root, nodes, {id(v): a for v, a in zip(leaves, arrays, strict=True)}))
    rows = [_rows(v, a) for v, a in zip(leaves, arrays, strict=True)]
    for gate in (0, 1):
        for name, function in ACTIVATIONS.items():
            if _close(y, _apply(function, rows[gate]) * rows[1 - gate], leaves[0], root):
                return Gate(name, gate)
    return None


def _source_of_norm(value: Value, graph: Graph, classes: TokenClasses) -> tuple[Value, list[Node]] | None:
    """The nearest value of the same size that ``value`` is a function of alone, through a reduction; and the nodes."""
    place = {id(n): i for i, n in enumerate(graph.nodes)}
    known = (*ELEMENTWISE, *STRUCTURAL, *REDUCTIONS)
    frontier = {id(value): value}
    nodes: list[Node] = []
    while len(nodes) < _MOST_NODES:
        latest = max(frontier.values(), key=lambda v: -1 if v.node is None else place[id(v.node)])
        node = latest.node
        if node is None or node.op not in known:
            return None
        for made in node.outputs:
            frontier.pop(id(made), None)
        nodes.append(node)
        for operand in node.inputs:
            kind = classes.kinds.get(id(operand), Kind.CONSTANT)
            if kind is Kind.TOKEN:
                frontier[id(operand)] = operand
            elif kind is not Kind.CONSTANT or operand.data is None:
                return None
        if len(frontier) == 1 and any(n.op in REDUCTIONS for n in nodes):
            (source,) = frontier.values()
            same = np.prod(source.type.per_token()) == np.prod(value.type.per_token())
            return (source, nodes[::-1]) if same and len(source.type.token_dims) == 1 else None
        if not frontier:
            return None
    return None


def _apply(function: Callable[[jax.Array], jax.Array], rows: np.ndarray) -> np.ndarray:
    return np.asarray(function(jnp.asarray(rows, jnp.float32)), np.float64)


def _sample(value: Value, seed: int) -> np.ndarray:
    shape = value.type.at({TOKENS: _TOKENS})
    return (3 * np.random.default_rng(seed).standard_normal(shape)).astype(value.type.dtype)


def _evaluate(value: Value, nodes: Sequence[Node], known: Mapping[int, np.ndarray]) -> np.ndarray:
    evaluator = Evaluator({TOKENS: _TOKENS}, {TOKENS: np.arange(_TOKENS, dtype=np.int32)}, known)
    evaluator.run(nodes)
    return np.asarray(evaluator[value])


def _rows(value: Value, array: np.ndarray) -> np.ndarray:
    """A token value as float64 ``[tokens, values of one token]``."""
    (dim,) = value.type.token_dims
    return np.moveaxis(np.asarray(array, np.float64), dim, 0).reshape(_TOKENS, -1)


def _close(a: np.ndarray, b: np.ndarray, *values: Value) -> bool:
    tolerance = max(_TOLERANCE.get(str(v.type.dtype), 2e-5) for v in values)
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=tolerance, atol=tolerance * float(np.abs(b).max())))
