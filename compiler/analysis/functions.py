"""Reading functions by evaluating them: which normalisation or activation a piece of program computes.

A piece is run on random inputs and compared with the functions that kernels know. So it does not matter how it is
spelled (``x * rsqrt(...)``, ``x / sqrt(...)``, a logistic or an exponential), and what differs is never mistaken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from distaff.compiler.analysis.dims import ELEMENTWISE, REDUCTIONS, STRUCTURAL
from distaff.compiler.analysis.pieces import run_piece, token_rows, walk_back
from distaff.compiler.analysis.tokens import TokenClasses
from distaff.compiler.ir import Graph, Node, Value
from distaff.compiler.ir.types import TOKENS
from distaff.kernels.matmul.operation import ACTIVATIONS

_TOKENS = 6
_POSITIONS = np.arange(_TOKENS, dtype=np.int32)
_MOST_NODES = 32
_TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 2e-3}


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
    y = token_rows(value, run_piece(value, nodes, {id(source): x}, _POSITIONS))
    rows = token_rows(source, x)
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
    """The name in the kernels' `ACTIVATIONS` of the elementwise function that ``nodes`` compute of ``leaf``."""
    x = _sample(leaf, 0)
    y = token_rows(root, run_piece(root, nodes, {id(leaf): x}, _POSITIONS))
    rows = token_rows(leaf, x)
    return next((n for n, f in ACTIVATIONS.items() if _close(y, _apply(f, rows), leaf, root)), None)


def read_gate(root: Value, leaves: Sequence[Value], nodes: Sequence[Node]) -> Gate | None:
    """How ``nodes`` join two values: an activation of one of them times the other."""
    arrays = [_sample(leaf, i) for i, leaf in enumerate(leaves)]
    y = token_rows(root, run_piece(root, nodes, {id(v): a for v, a in zip(leaves, arrays, strict=True)}, _POSITIONS))
    rows = [token_rows(v, a) for v, a in zip(leaves, arrays, strict=True)]
    for gate in (0, 1):
        for name, function in ACTIVATIONS.items():
            if _close(y, _apply(function, rows[gate]) * rows[1 - gate], leaves[0], root):
                return Gate(name, gate)
    return None


def _source_of_norm(value: Value, graph: Graph, classes: TokenClasses) -> tuple[Value, list[Node]] | None:
    """The nearest value of the same size that ``value`` is a function of alone, through a reduction; and the nodes."""
    for piece in walk_back(value, graph, classes, (*ELEMENTWISE, *STRUCTURAL, *REDUCTIONS), _MOST_NODES):
        if piece.index:
            return None
        if len(piece.inputs) == 1 and any(n.op in REDUCTIONS for n in piece.nodes):
            source = piece.source_of(value)
            return None if source is None else (source, piece.nodes[::-1])
    return None


def _apply(function: Callable[[jax.Array], jax.Array], rows: np.ndarray) -> np.ndarray:
    return np.asarray(function(jnp.asarray(rows, jnp.float32)), np.float64)


def _sample(value: Value, seed: int) -> np.ndarray:
    shape = value.type.at({TOKENS: _TOKENS})
    return (3 * np.random.default_rng(seed).standard_normal(shape)).astype(value.type.dtype)


def _close(a: np.ndarray, b: np.ndarray, *values: Value) -> bool:
    tolerance = max(_TOLERANCE.get(str(v.type.dtype), 2e-5) for v in values)
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=tolerance, atol=tolerance * float(np.abs(b).max())))
