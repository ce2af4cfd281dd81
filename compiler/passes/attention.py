"""Raising attention: every region becomes one node, a kernel's attention or a row program.

Causality is proved for each region to the longest length that is served. A region that reads as attention becomes an
`ATTENTION` node with the attributes of a kernel; any other is kept as a `ROW_PROGRAM`, which evaluates the user's own
operations for each query row over its gathered context: slower, and said so in the report. Proofs and matches are
looked up by structure, so that repeated layers cost one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.compiler.analysis.attention_pattern import AttentionPattern, NoMatch, match_attention
from distaff.compiler.analysis.masks import Visibility, prove_causal
from distaff.compiler.analysis.tokens import TokenClasses
from distaff.compiler.ir import ATTENTION, ROW_PROGRAM, Graph, Location, Node, Value
from distaff.compiler.ir.evaluate import Evaluator
from distaff.compiler.ir.graph import ancestors
from distaff.compiler.ir.hashing import structural_key
from distaff.compiler.ir.types import KEY, QUERY
from distaff.compiler.passes.regions import extract_region
from distaff.kernels.paged_attention import AttentionSpec

_HIDDEN = -1e8


@dataclasses.dataclass(frozen=True)
class AttentionFinding:
    """One attention of the model, for the report: where it stands, what serves it and what a token keeps for it."""

    location: Location
    served_by: str
    visibility: Visibility
    reason: str = ""
    spec: AttentionSpec | None = None


@dataclasses.dataclass(frozen=True)
class _Reading:
    visibility: Visibility
    pattern: AttentionPattern | None
    spec: AttentionSpec | None
    reason: str


def raise_attention(
    graph: Graph, classes: TokenClasses, max_model_len: int, *, latent: bool = False
) -> tuple[Graph, list[AttentionFinding]]:
    """Replaces each region of ``graph`` (which is changed) by one node; returns the graph and what was found.

    Raises `NotCausalError` or `MixesTokensError` for a region in which a query can see later keys.
    """
    readings: dict[str, _Reading] = {}
    findings: list[AttentionFinding] = []
    place = {id(node): i for i, node in enumerate(graph.nodes)}
    for root in classes.roots:
        region = extract_region(root, classes, latent=latent)
        key = structural_key(region.body)
        if key not in readings:
            readings[key] = _read(region.body, max_model_len)
        reading = readings[key]
        old = root.node
        assert old is not None
        if reading.pattern is not None:
            pattern = reading.pattern
            leaves = [region.leaves[i][0] for i in (pattern.query_leaf, pattern.key_leaf, pattern.value_leaf)]
            node = Node(ATTENTION, tuple(leaves), {"spec": reading.spec, "pattern": pattern}, (root,), old.location)
        else:
            leaves = [value for value, _ in region.leaves]
            node = Node(ROW_PROGRAM, tuple(leaves), {"region": region}, (root,), old.location)
        graph.nodes[place[id(old)]] = node
        root.node, root.index = node, 0
        findings.append(
            AttentionFinding(
                old.location,
                "kernel" if reading.pattern else "row program",
                reading.visibility,
                reading.reason,
                reading.spec,
            )
        )
    return graph.reachable(), findings


def _read(body: Graph, max_model_len: int) -> _Reading:
    visibility = prove_causal(body, max_model_len)
    try:
        pattern = match_attention(body)
        spec = _attributes(body, pattern, visibility, max_model_len)
    except NoMatch as mismatch:
        where = f" ({mismatch.node.location.short()})" if mismatch.node is not None else ""
        return _Reading(visibility, None, None, f"{mismatch}{where}")
    return _Reading(visibility, pattern, spec, "")


def _attributes(body: Graph, pattern: AttentionPattern, visibility: Visibility, max_model_len: int) -> AttentionSpec:
    if visibility.data_dependent:
        raise NoMatch("the mask depends on token data")
    slopes = _slopes(body, pattern, max_model_len)
    mask = _mask(body, pattern) if visibility.kind == "custom" else None
    return AttentionSpec(
        scale=pattern.scale,
        causal=True,
        window=visibility.window if visibility.kind == "window" else None,
        softcap=pattern.softcap,
        slopes=slopes,
        mask=mask,
    )


def _probe_positions(max_model_len: int) -> np.ndarray:
    """Positions that tell a linear bias from others: the first, the last, and some between, up to the longest."""
    rng = np.random.default_rng(0)
    near = np.arange(min(24, max_model_len))
    far = np.arange(max(0, max_model_len - 8), max_model_len)
    between = rng.integers(0, max_model_len, 40)
    return np.unique(np.concatenate([near, far, between])).astype(np.int32)


def _slopes(body: Graph, pattern: AttentionPattern, max_model_len: int) -> tuple[float, ...] | None:
    """ALiBi slopes of each query head (in the kernel's order), None if biases only mask; raises NoMatch otherwise."""
    if not pattern.biases:
        return None
    positions = _probe_positions(max_model_len)
    n = len(positions)
    heads = len(pattern.query)
    total = np.zeros((heads, n, n))
    for value, factor in pattern.biases:
        table = pair_values(body, value, positions, positions).astype(np.float64).reshape(-1, n, n)
        if len(table) not in (1, heads):
            raise NoMatch("adds a bias with a layout of its own to the scores")
        total += factor * table
    visible = (positions[None, :] <= positions[:, None]) & (total > _HIDDEN)
    distance = (positions[:, None] - positions[None, :]).astype(np.float64)
    shifted = np.where(visible, total - np.diagonal(total, axis1=1, axis2=2)[:, :, None], 0.0)
    slopes = -shifted[:, 1, 0] / distance[1, 0] if visible[:, 1, 0].all() else np.zeros(heads)
    if not np.allclose(shifted, np.where(visible, -slopes[:, None, None] * distance, 0.0), rtol=1e-4, atol=1e-4):
        raise NoMatch("adds a bias to the scores that is not linear in the distance")
    if not slopes.any():
        return None
    return tuple(float(s) for s in slopes[pattern.heads_of_scores])


def _mask(body: Graph, pattern: AttentionPattern) -> Callable[[Any, Any], Any]:
    """The region's own mask as a function of query and key positions, for kernels that evaluate it block by block."""
    grid = np.arange(8, dtype=np.int32)
    for value in [v for v, _ in (*pattern.hides, *pattern.biases)]:
        table = pair_values(body, value, grid, grid).reshape(-1, 8, 8)
        if not (table == table[:1]).all():
            raise NoMatch("masks each head in a way of its own")

    def visible(query: jax.Array, key: jax.Array) -> jax.Array:
        seen = jnp.asarray(True)
        for value, hides_true in pattern.hides:
            hidden = _trace_pair(body, value, query, key)
            seen &= ~hidden if hides_true else hidden
        for value, factor in pattern.biases:
            seen &= factor * _trace_pair(body, value, query, key) > _HIDDEN
        return seen

    return jnp.vectorize(visible)


def _trace_pair(body: Graph, value: Value, query: jax.Array, key: jax.Array) -> jax.Array:
    """A position-only value of the body for one query and one key position."""
    table = _evaluate_pair(body, value, query[None], key[None])
    return jnp.reshape(table, (-1,))[0]


def pair_values(body: Graph, value: Value, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """A position-only value of the body at all pairs of the given positions, as [..., queries, keys]."""
    table = np.asarray(_evaluate_pair(body, value, queries, keys))
    axes = {value.type.shape[d].axis: d for d in value.type.token_dims}  # type: ignore[union-attr]
    for axis, positions in ((QUERY, queries), (KEY, keys)):
        if axis not in axes:
            table = np.broadcast_to(table[..., None], (*table.shape, len(positions)))
            axes[axis] = table.ndim - 1
    return np.moveaxis(table, (axes[QUERY], axes[KEY]), (-2, -1))


def _evaluate_pair(body: Graph, value: Value, queries: Any, keys: Any) -> Any:
    needed = {id(n) for n in ancestors([value])}
    evaluator = Evaluator({QUERY: len(queries), KEY: len(keys)}, {QUERY: queries, KEY: keys}, {})
    evaluator.run([n for n in body.nodes if id(n) in needed])
    return evaluator[value]
