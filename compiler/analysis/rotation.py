"""Reading rotary position embeddings (RoFormer, arXiv:2104.09864) by evaluating them.

A rotation turns pairs of a head's values by angles that depend on the position alone. Whatever it is written with, it
is linear, and what each value keeps of itself (cos) and takes from its partner (sin) follows from two evaluations.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from distaff.compiler.analysis.dims import ELEMENTWISE, STRUCTURAL
from distaff.compiler.analysis.pieces import run_piece, token_rows, walk_back
from distaff.compiler.analysis.tokens import TokenClasses
from distaff.compiler.ir import Graph, Node, Value
from distaff.compiler.ir.graph import ancestors
from distaff.compiler.ir.hashing import parameters_key
from distaff.compiler.ir.types import TOKENS
from distaff.kernels.paged_attention import Rotary

_MOST_NODES = 40
_KNOWN = (*ELEMENTWISE, *STRUCTURAL, "split", "concatenate", "stack", "slice", "gather")
_TOLERANCE = 1e-4
_CHUNK = 1024  # positions that are evaluated at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Rotation:
    """``value`` is ``source`` turned as ``rotary`` says, by ``nodes``; head 0 has its values at ``head`` of a token's.

    Equal keys mean equal rotations. ``turns`` are the cosines and sines ``[2, positions, size]`` at a few positions.
    """

    source: Value
    value: Value
    rotary: Rotary
    nodes: tuple[Node, ...]
    head: np.ndarray
    key: str
    turns: np.ndarray

    def tables(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines at positions 0 to ``length - 1``, float32 ``[length, size]``."""
        first = np.isin(np.arange(self.rotary.size), _first_of_pairs(self.rotary))
        parts = []
        for start in range(0, length, _CHUNK):
            positions = np.arange(start, min(length, start + _CHUNK), dtype=np.int32)
            of_first, of_second = (self._turned(positions, mask) for mask in (first, ~first))
            parts.append((np.where(first, of_first, of_second), np.where(first, of_second, of_first)))
        cos, sin = (np.concatenate(part) for part in zip(*parts, strict=True))
        return cos, sin

    def _turned(self, positions: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The first head's values after a rotation of ones where ``mask`` is, zeros elsewhere: [positions, size]."""
        unit = np.zeros(int(np.prod(self.source.type.per_token())), self.source.type.dtype)
        unit[self.head[: self.rotary.size][mask]] = 1.0
        (dim,) = self.source.type.token_dims
        line = np.expand_dims(unit.reshape(self.source.type.per_token()), dim)
        x = np.broadcast_to(line, self.source.type.at({TOKENS: len(positions)}))
        rows = token_rows(self.value, run_piece(self.value, self.nodes, {id(self.source): x}, positions))
        return rows[:, self.head[: self.rotary.size]].astype(np.float32)


class RotationReader:
    """Reads rotations of one graph; equal ones, as in the layers of a model, are evaluated once."""

    def __init__(self, graph: Graph, classes: TokenClasses, max_model_len: int) -> None:
        self._graph = graph
        self._classes = classes
        self._max_model_len = max_model_len
        self._known: dict[tuple[str, bytes], tuple[Rotary, np.ndarray] | None] = {}

    def read(self, value: Value, layout: np.ndarray) -> Rotation | None:
        """What ``value``, whose heads lie as ``layout[head, i]`` in a token's values, is the rotation of; or None."""
        found = _source(value, self._graph, self._classes)
        if found is None:
            return None
        source, nodes, key = found
        known = (key, layout.tobytes())
        if known not in self._known:
            self._known[known] = _evaluated(source, value, nodes, layout, self._max_model_len)
        reading = self._known[known]
        if reading is None:
            return None
        rotary, turns = reading
        return Rotation(source, value, rotary, nodes, layout[0], f"{rotary} {key}", turns)


def _evaluated(
    source: Value, value: Value, nodes: tuple[Node, ...], layout: np.ndarray, max_model_len: int
) -> tuple[Rotary, np.ndarray] | None:
    rng = np.random.default_rng(0)
    positions = np.unique(np.r_[0, 1, 2, rng.integers(0, max_model_len, 3), max_model_len - 1]).astype(np.int32)
    xs, ys = zip(*(_sample(source, value, nodes, positions, layout, rng) for _ in range(3)), strict=True)
    for rotary in _candidates(xs[0], ys[0]):
        turns = _solve(rotary, xs, ys)
        if turns is not None:
            return rotary, turns
    return None


def _source(value: Value, graph: Graph, classes: TokenClasses) -> tuple[Value, tuple[Node, ...], str] | None:
    """The nearest value that ``value`` is a function of, together with positions; the nodes, and a key of them."""
    for piece in walk_back(value, graph, classes, _KNOWN, _MOST_NODES):
        source = piece.source_of(value) if piece.index else None
        if source is not None:
            needed = {id(n) for n in ancestors(list(piece.index.values()))}
            before = [n for n in graph.nodes if id(n) in needed]
            parts = [(n.op, parameters_key(n.params), str(n.outputs[0].type)) for n in piece.nodes]
            return source, (*before, *piece.nodes[::-1]), f"{parts} {sorted(piece.index)}"
    return None


def _sample(
    source: Value, value: Value, nodes: tuple[Node, ...], positions: np.ndarray, layout: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Random values of ``source`` and what becomes of them, float64 [positions, heads, values of a head]."""
    x = rng.standard_normal(source.type.at({TOKENS: len(positions)})).astype(source.type.dtype)
    y = run_piece(value, nodes, {id(source): x}, positions)
    return token_rows(source, x)[:, layout], token_rows(value, y)[:, layout]


def _candidates(x: np.ndarray, y: np.ndarray) -> list[Rotary]:
    """The kinds of rotation to try: over all values of a head that change."""
    changed = np.nonzero(np.any(x != y, axis=(0, 1)))[0]
    if not changed.size:
        return []
    size = int(changed[-1]) + 1
    return [Rotary("half", size), Rotary("interleaved", size)] if size % 2 == 0 else []


def _first_of_pairs(rotary: Rotary) -> np.ndarray:
    return np.arange(rotary.size // 2) if rotary.kind == "half" else np.arange(0, rotary.size, 2)


def _partners(rotary: Rotary) -> np.ndarray:
    numbers = np.arange(rotary.size)
    return (numbers + rotary.size // 2) % rotary.size if rotary.kind == "half" else numbers ^ 1


def _solve(rotary: Rotary, xs: tuple[np.ndarray, ...], ys: tuple[np.ndarray, ...]) -> np.ndarray | None:
    """Cosines and sines [2, positions, size] that explain all samples, the same ones for every head; or None."""
    size, partners = rotary.size, _partners(rotary)
    own = [x[..., :size] for x in xs]
    others = [x[..., partners] for x in xs]
    wanted = [y[..., :size] for y in ys]
    determinant = own[0] * others[1] - own[1] * others[0]
    cos = (wanted[0] * others[1] - wanted[1] * others[0]) / determinant
    sin = (own[0] * wanted[1] - own[1] * wanted[0]) / determinant
    # Every head gives an estimate; the best conditioned one serves for all.
    best = np.abs(determinant).argmax(axis=1)[:, None]
    turns = np.stack([np.take_along_axis(t, best, axis=1)[:, 0] for t in (cos, sin)])
    scale = float(max(np.abs(y).max() for y in ys))
    for a, b, y, x, whole in zip(own, others, wanted, xs, ys, strict=True):
        if not np.allclose(a * turns[0][:, None] + b * turns[1][:, None], y, rtol=0, atol=_TOLERANCE * scale):
            return None
        if not np.array_equal(x[..., size:], whole[..., size:]):
            return None
    return turns
