"""Paged attention in plain XLA operations for every platform: an online softmax over chunks of pages.

All loops have trip counts that are known only at run time, so one compiled shape serves any context length and work
follows what the batch holds: blocks of decode rows up to the longest context among them, and blocks of queries of one
request up to their causal limit, both from the window's start on. (The online softmax is that of Milakov and
Gimelshein 2018 and FlashAttention, Dao et al. 2022.)

What was found on XLA:CPU (two cores, 9 query heads on 3 key-value heads of size 64; ``tools/bench_attention.py``):

* Products take three-dimensional operands ``[Z, M, D] x [Z, C, D]``. With more free or inner batch dimensions XLA
  transposes the gathered keys element by element.
* A decode product over several key-value heads at once, with zeros in the query (`_decode`), takes 0.7 (1 request),
  0.45 (8) and 0.4 (32) of the time of one product per head, although it multiplies three times as much; it pays until
  about 10 query heads share a product. Multiply-and-reduce instead of a product is 1.5 to 5 times slower.
* Blocks of 8 requests and chunks of 128 are within a few percent of the best at 1 to 32 requests; one block of all 32
  costs 1.3 once its chunk outgrows the cache. Prefill wants 64 queries by 64 keys: 0.65 of 64 by 128 for a prompt of
  64 tokens, 0.9 for 512.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from distaff.kernels.paged_attention.batch import StepBatch
from distaff.kernels.paged_attention.pages import gather_pages, row_shape
from distaff.kernels.paged_attention.rotary import RotaryTables
from distaff.kernels.paged_attention.rows import prepare_rows
from distaff.kernels.paged_attention.spec import LOWEST, AttentionSpec
from distaff.kernels.registry import register

# Running maximum and sum of exponentials [Z, M, 1], weighted values [Z, M, E].
State: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of the blocks of work.

    Chunks (in tokens, rounded down to whole pages, at least one) are what is read from the pages at a time, against
    ``decode_rows`` requests or ``prefill_queries`` tokens of one request. A decode product joins key-value heads while
    their query heads are at most ``folded_heads``.
    """

    decode_rows: int = 8
    decode_chunk: int = 128
    prefill_queries: int = 64
    prefill_chunk: int = 64
    folded_heads: int = 10


@register("paged_attention", "xla")
@functools.partial(jax.jit, static_argnames=("spec", "blocks"))
def attention(
    spec: AttentionSpec,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    k_pages: jax.Array,
    v_pages: jax.Array | None,
    layer: int | jax.Array,
    batch: StepBatch,
    sinks: jax.Array | None,
    rotary: RotaryTables | None,
    *,
    blocks: Blocks = Blocks(),
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """`paged_attention`; layers with the same spec and shapes share one trace. No ``v_pages``: keys are values."""
    dtype = q.dtype
    q, k_pages, v_pages = prepare_rows(spec, q, k, v, k_pages, v_pages, layer, batch, rotary)
    call = _Call(spec, k_pages, k_pages if v_pages is None else v_pages, layer, sinks, blocks)
    tokens, requests = q.shape[0], batch.contexts.shape[0]
    if tokens == requests:
        output = _decode(call, q, batch, batch.starts[-1])
    else:
        output = _prefill(call, q, batch, _decode(call, q, batch, batch.decodes))
    return output.astype(dtype), k_pages, v_pages


@dataclasses.dataclass(frozen=True)
class _Call:
    """What stays the same over the blocks of a call."""

    spec: AttentionSpec
    k_pages: jax.Array
    v_pages: jax.Array
    layer: int | jax.Array
    sinks: jax.Array | None
    blocks: Blocks

    def attend(
        self,
        layout: Callable[[jax.Array], jax.Array],
        q: jax.Array,
        positions: jax.Array,
        contexts: jax.Array,
        tables: jax.Array,
        span: tuple[jax.Array | int, jax.Array],
        chunk_tokens: int,
    ) -> jax.Array:
        """Attention of ``size`` queries over the pages of B requests, ``tables[B, NP]``: float32 ``[Z, M, E]``.

        ``layout`` brings ``q[size, H, D]`` and every other array ``[size, H, _]`` into the form ``[Z, M, _]`` in which
        M rows share keys: those of one request and one of Z / B equal parts of its key-value heads. ``positions`` and
        ``contexts`` are ``[size]``; ``span`` is the first position that any query sees, and one past the last.
        """
        spec, page_size = self.spec, self.k_pages.shape[2]
        chunk_pages = max(1, chunk_tokens // page_size)
        chunk = chunk_pages * page_size
        tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % chunk_pages)))

        def rows(numbers: jax.Array) -> jax.Array:
            return layout(jnp.broadcast_to(numbers, (*q.shape[:2], 1)))

        slopes = spec.slope_array()
        slopes = None if slopes is None else rows(slopes[:, None])
        query = rows(positions[:, None, None])
        context = rows(contexts[:, None, None])
        queries = layout(q).astype(jnp.float32)
        parts = queries.shape[0] // tables.shape[0]

        def read(pages: jax.Array, numbers: jax.Array) -> jax.Array:
            pool = gather_pages(pages, self.layer, numbers).astype(jnp.float32)
            return pool.reshape(tables.shape[0], chunk, parts, -1).swapaxes(1, 2).reshape(queries.shape[0], chunk, -1)

        def step(c: jax.Array, state: State) -> State:
            highest, total, weighted = state
            numbers = lax.dynamic_slice_in_dim(tables, c * chunk_pages, chunk_pages, 1)
            key = c * chunk + jnp.arange(chunk, dtype=jnp.int32)
            products = jnp.einsum("zmd,zcd->zmc", queries, read(self.k_pages, numbers))
            visible = spec.visible(query, key)
            if not spec.causal:  # a causal query sees no further than itself, which is inside the context
                visible &= key < context
            scores = jnp.where(visible, spec.scores(products, slopes, query, key), -jnp.inf)
            new_highest = jnp.maximum(highest, scores.max(-1, keepdims=True))
            weights = jnp.exp(scores - new_highest)
            shrink = jnp.exp(highest - new_highest)
            total = total * shrink + weights.sum(-1, keepdims=True)
            update = jnp.einsum("zmc,zcd->zmd", weights, read(self.v_pages, numbers))
            return new_highest, total, weighted * shrink + update

        each = (*queries.shape[:2], 1)
        if self.sinks is None:
            highest, total = jnp.full(each, LOWEST, jnp.float32), jnp.zeros(each, jnp.float32)
        else:
            highest, total = rows(self.sinks[:, None].astype(jnp.float32)), jnp.ones(each, jnp.float32)
        kv_heads, value_size = row_shape(self.v_pages)
        weighted = jnp.zeros((*queries.shape[:2], kv_heads // parts * value_size), jnp.float32)
        first, end = span
        _, total, weighted = lax.fori_loop(first // chunk, (end + chunk - 1) // chunk, step, (highest, total, weighted))
        output: jax.Array = weighted / jnp.where(total > 0, total, 1)
        return output

    def first_seen(self, position: jax.Array) -> jax.Array | int:
        """The first position that a query at ``position`` sees."""
        return 0 if self.spec.window is None else jnp.maximum(position + 1 - self.spec.window, 0)


def _decode(call: _Call, q: jax.Array, batch: StepBatch, decodes: jax.Array) -> jax.Array:
    """Outputs ``[T, H, Dv]`` that hold the first ``decodes`` tokens, computed a block of rows at a time.

    Key-value heads are folded: a query head is as wide as the keys of several heads, with zeros for all but its own.
    So keys are used as they lie in the page instead of being transposed first.
    """
    tokens, heads, _ = q.shape
    rows = min(tokens, batch.contexts.shape[0])
    size = min(rows, call.blocks.decode_rows)
    kv_heads, value_size = row_shape(call.v_pages)
    groups = heads // kv_heads
    most = max(1, call.blocks.folded_heads // groups)
    fold = max(f for f in range(1, kv_heads + 1) if kv_heads % f == 0 and f <= most)
    own = np.eye(fold, dtype=np.float32)[np.arange(heads) // groups % fold, :, None]

    def block(i: jax.Array, output: jax.Array) -> jax.Array:
        # The last block starts early rather than reach past the rows, and computes some of them again.
        start = jnp.minimum(i * size, rows - size)
        part = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        live = start + jnp.arange(size, dtype=jnp.int32) < decodes
        positions, contexts = part(batch.positions), part(batch.contexts)
        end = jnp.max(jnp.where(live, contexts, 0))
        attended = call.attend(
            lambda array: array.reshape(-1, fold * groups, array.shape[-1]),
            (part(q)[:, :, None] * own).reshape(size, heads, -1),
            positions,
            contexts,
            part(batch.tables),
            (call.first_seen(jnp.min(jnp.where(live, positions, end))), end),
            call.blocks.decode_chunk,
        )
        attended = jnp.sum(attended.reshape(size, heads, fold, value_size) * own, 2).astype(output.dtype)
        updated: jax.Array = lax.dynamic_update_slice_in_dim(output, attended, start, 0)
        return updated

    output = jnp.zeros((tokens, heads, value_size), q.dtype)
    if size == rows:
        return block(jnp.int32(0), output)
    filled: jax.Array = lax.fori_loop(0, (decodes + size - 1) // size, block, output)
    return filled


def _prefill(call: _Call, q: jax.Array, batch: StepBatch, output: jax.Array) -> jax.Array:
    """Fills in the tokens after the decodes, a block of at most ``prefill_queries`` tokens of one row at a time."""
    tokens, heads, _ = q.shape
    size = min(tokens, call.blocks.prefill_queries)
    kv_heads, value_size = row_shape(call.v_pages)

    def layout(array: jax.Array) -> jax.Array:
        grouped = array.reshape(size, kv_heads, heads // kv_heads, -1)
        return grouped.swapaxes(0, 1).reshape(kv_heads, -1, array.shape[-1])

    def block(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        token, output = state
        row = batch.rows[token]
        # At least one token further: a batch that breaks the contract must not hang the device.
        end = jnp.maximum(jnp.minimum(token + size, batch.starts[row + 1]), token + 1)
        # The block starts early rather than reach past the tokens; only tokens .. end-1 of it are kept.
        start = jnp.minimum(token, tokens - size)
        part = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        index = start + jnp.arange(size, dtype=jnp.int32)
        position, context = batch.positions[token], batch.contexts[row]
        attended = call.attend(
            layout,
            part(q),
            position + index - token,
            jnp.broadcast_to(context, (size,)),
            lax.dynamic_slice_in_dim(batch.tables, row, 1),
            (call.first_seen(position), position + end - token if call.spec.causal else context),
            call.blocks.prefill_chunk,
        )
        attended = attended.reshape(kv_heads, size, -1, value_size).swapaxes(0, 1).reshape(output[:size].shape)
        mine = ((index >= token) & (index < end))[:, None, None]
        kept = jnp.where(mine, attended.astype(output.dtype), part(output))
        return end, lax.dynamic_update_slice_in_dim(output, kept, start, 0)

    _, output = lax.while_loop(lambda state: state[0] < batch.starts[-1], block, (batch.decodes, output))
    return output
