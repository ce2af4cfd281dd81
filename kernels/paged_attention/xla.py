"""Paged attention in plain XLA operations for every platform: an online softmax over chunks of pages.

All loops have trip counts that are known only at run time, so one compiled shape serves any context length and work
follows what the batch holds: blocks of decode rows up to the longest context among them, and blocks of queries of one
request up to their causal limit, both from the window's start on. (The online softmax is that of Milakov and
Gimelshein 2018 and FlashAttention, Dao et al. 2022.)
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from distaff.kernels.paged_attention.batch import StepBatch
from distaff.kernels.paged_attention.pages import gather_pages
from distaff.kernels.paged_attention.spec import LOWEST, AttentionSpec
from distaff.kernels.registry import register


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of the blocks of work.

    ``chunk_tokens`` (rounded down to whole pages) are read from the pages at a time, against ``decode_rows`` requests
    or ``prefill_queries`` tokens of one request. A decode product joins key-value heads while their query heads are
    at most ``folded_heads``.
    """

    decode_rows: int = 8
    prefill_queries: int = 64
    chunk_tokens: int = 128
    folded_heads: int = 10


@register("paged_attention", "xla")
@functools.partial(jax.jit, static_argnames=("spec", "blocks"))
def attention(
    spec: AttentionSpec,
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    layer: int | jax.Array,
    batch: StepBatch,
    sinks: jax.Array | None,
    *,
    blocks: Blocks = Blocks(),
) -> jax.Array:
    """`paged_attention`; layers with the same spec and shapes share one trace."""
    call = _Call(spec, k_pages, v_pages, layer, sinks, blocks)
    tokens, requests = q.shape[0], batch.contexts.shape[0]
    output = jnp.zeros((tokens, q.shape[1], v_pages.shape[4]), q.dtype)
    if tokens == requests:
        return _decode(call, q, batch, batch.starts[-1], output)
    return _prefill(call, q, batch, _decode(call, q, batch, batch.decodes, output))


@dataclasses.dataclass(frozen=True)
class _Call:
    """What stays the same over the blocks of a call."""

    spec: AttentionSpec
    k_pages: jax.Array
    v_pages: jax.Array
    layer: int | jax.Array
    sinks: jax.Array | None
    blocks: Blocks

    def attend(self, q: jax.Array, positions: jax.Array, contexts: jax.Array, tables: jax.Array) -> jax.Array:
        """Attention of B blocks, each over its own pages: ``[B, N, Q, A, Dv]``.

        ``q[B, N, Q, A, D]`` float32 has Q queries at ``positions[B, Q]`` (-1: none) with A heads that share keys, for
        each of the N equal parts in which D and Dv cut a token's keys and values. ``contexts[B]``, ``tables[B, NP]``.
        """
        spec, (size, parts, *_) = self.spec, q.shape
        page_size = self.k_pages.shape[2]
        chunk_pages = max(1, self.blocks.chunk_tokens // page_size)
        chunk = chunk_pages * page_size
        tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % chunk_pages)))
        slopes = self._per_head(spec.slope_array(), q.shape)
        query = positions[:, None, :, None, None]

        def step(c: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
            highest, total, weighted = state
            numbers = lax.dynamic_slice_in_dim(tables, c * chunk_pages, chunk_pages, 1)
            keys, values = (
                gather_pages(pages, self.layer, numbers).astype(jnp.float32).reshape(size, chunk, parts, -1)
                for pages in (self.k_pages, self.v_pages)
            )
            key = c * chunk + jnp.arange(chunk, dtype=jnp.int32)
            scores = spec.scores(jnp.einsum("bnqad,bcnd->bnqac", q, keys), slopes, query, key)
            visible = spec.visible(query, key)
            if not spec.causal:  # a causal query sees no further than itself, which is inside the context
                visible &= key < contexts[:, None, None, None, None]
            scores = jnp.where(visible, scores, -jnp.inf)
            new_highest = jnp.maximum(highest, scores.max(-1, keepdims=True))
            weights = jnp.exp(scores - new_highest)
            shrink = jnp.exp(highest - new_highest)
            total = total * shrink + weights.sum(-1, keepdims=True)
            weighted = weighted * shrink + jnp.einsum("bnqac,bcnd->bnqad", weights, values)
            return new_highest, total, weighted

        first, last = self._chunks(positions, contexts, chunk)
        _, total, weighted = lax.fori_loop(first, last, step, self._empty(q.shape))
        output: jax.Array = weighted / jnp.where(total > 0, total, 1)
        return output

    def _chunks(self, positions: jax.Array, contexts: jax.Array, chunk: int) -> tuple[jax.Array | int, jax.Array]:
        """The range of chunks that any of the queries can see."""
        end = jnp.max(positions) + 1 if self.spec.causal else jnp.max(contexts)
        if self.spec.window is None:
            return 0, (end + chunk - 1) // chunk
        lowest = jnp.min(jnp.where(positions < 0, end, positions)) + 1 - self.spec.window
        return jnp.maximum(lowest, 0) // chunk, (end + chunk - 1) // chunk

    def _empty(self, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The state of the online softmax before any key: maximum, sum of exponentials, weighted values.

        The maximum is finite from the start, so that a query that has seen nothing yet makes no NaN.
        """
        size, parts, queries, heads, _ = shape
        rows = (size, parts, queries, heads)
        value_size = math.prod(self.v_pages.shape[3:]) // parts
        weighted = jnp.zeros((*rows, value_size), jnp.float32)
        sinks = self._per_head(self.sinks, shape)
        if sinks is None:
            return jnp.full((*rows, 1), LOWEST, jnp.float32), jnp.zeros((*rows, 1), jnp.float32), weighted
        return jnp.broadcast_to(sinks, (*rows, 1)), jnp.ones((*rows, 1), jnp.float32), weighted

    @staticmethod
    def _per_head(numbers: jax.Array | None, shape: tuple[int, ...]) -> jax.Array | None:
        """One float32 number per query head, laid out to broadcast against scores ``[B, N, Q, A, C]``."""
        _, parts, _, heads, _ = shape
        return None if numbers is None else numbers.astype(jnp.float32).reshape(parts, 1, heads, 1)


def _decode(call: _Call, q: jax.Array, batch: StepBatch, decodes: jax.Array, output: jax.Array) -> jax.Array:
    """Fills in tokens ``0 .. decodes-1`` of rows ``0 .. decodes-1``, a block of rows at a time."""
    tokens, heads, width = q.shape
    rows = min(tokens, batch.contexts.shape[0])
    size = min(rows, call.blocks.decode_rows)
    kv_heads = call.k_pages.shape[3]
    groups = heads // kv_heads
    most = max(1, call.blocks.folded_heads // groups)
    fold = max(f for f in range(1, kv_heads + 1) if kv_heads % f == 0 and f <= most)
    diagonal = jnp.repeat(jnp.eye(fold, dtype=jnp.float32), groups, axis=0)[:, :, None]

    def block(i: jax.Array, output: jax.Array) -> jax.Array:
        # The last block starts early rather than reach past the rows, and computes some of them again.
        start = jnp.minimum(i * size, rows - size)
        part = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        live = start + jnp.arange(size, dtype=jnp.int32) < decodes
        positions = jnp.where(live, part(batch.positions), -1)
        contexts = jnp.where(live, part(batch.contexts), 0)
        queries = part(q).astype(jnp.float32).reshape(size, -1, 1, fold * groups, 1, width) * diagonal
        queries = queries.reshape(*queries.shape[:4], fold * width)
        attended = call.attend(queries, positions[:, None], contexts, part(batch.tables))
        attended = (attended.reshape(*attended.shape[:4], fold, -1) * diagonal).sum(4)
        attended = attended.reshape(size, *output.shape[1:]).astype(output.dtype)
        return lax.dynamic_update_slice_in_dim(output, attended, start, 0)

    output = lax.fori_loop(0, (decodes + size - 1) // size, block, output)
    return output


def _prefill(call: _Call, q: jax.Array, batch: StepBatch, output: jax.Array) -> jax.Array:
    """Fills in the tokens after the decodes, a block of at most ``prefill_queries`` tokens of one row at a time."""
    tokens, _, width = q.shape
    size = min(tokens, call.blocks.prefill_queries)
    kv_heads = call.k_pages.shape[3]

    def block(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        token, output = state
        row = batch.rows[token]
        # At least one token further: a batch that breaks the contract must not hang the device.
        end = jnp.maximum(jnp.minimum(token + size, batch.starts[row + 1]), token + 1)
        # The block starts early rather than reach past the tokens; only tokens .. end-1 of it are computed and kept.
        start = jnp.minimum(token, tokens - size)
        part = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        index = start + jnp.arange(size, dtype=jnp.int32)
        mine = (index >= token) & (index < end)
        positions = jnp.where(mine, part(batch.positions), -1)
        queries = part(q).astype(jnp.float32).reshape(1, size, kv_heads, -1, width).transpose(0, 2, 1, 3, 4)
        context, table = (lax.dynamic_slice_in_dim(field, row, 1) for field in (batch.contexts, batch.tables))
        attended = call.attend(queries, positions[None], context, table)
        attended = attended.transpose(0, 2, 1, 3, 4).reshape(size, *output.shape[1:]).astype(output.dtype)
        kept = jnp.where(mine[:, None, None], attended, part(output))
        return end, lax.dynamic_update_slice_in_dim(output, kept, start, 0)

    _, output = lax.while_loop(lambda state: state[0] < batch.starts[-1], block, (batch.decodes, output))
    return output
