"""Paged attention said as plainly as possible: token by token over the whole gathered context, in float32.

It serves every call, slowly; the other implementations are tested against it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from distaff.kernels.paged_attention.batch import StepBatch
from distaff.kernels.paged_attention.pages import read_context
from distaff.kernels.paged_attention.rotary import RotaryTables
from distaff.kernels.paged_attention.rows import prepare_rows
from distaff.kernels.paged_attention.spec import LOWEST, AttentionSpec
from distaff.kernels.registry import register


@register("paged_attention", "reference", priority=-1)
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
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """`paged_attention`; materialises one request's context at a time. No ``v_pages``: keys are values."""
    dtype = q.dtype
    q, k_pages, v_pages = prepare_rows(spec, q, k, v, k_pages, v_pages, layer, batch, rotary)
    heads = q.shape[1]
    groups = heads // k_pages.shape[3]
    slopes = spec.slope_array()

    def one_token(token: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        query, position, row = token
        keys, values = (
            jnp.repeat(read_context(pages, layer, batch.tables[row]).astype(jnp.float32), groups, axis=1)
            for pages in (k_pages, k_pages if v_pages is None else v_pages)
        )
        context = jnp.arange(keys.shape[0], dtype=jnp.int32)
        products = jnp.einsum("hd,chd->hc", query.astype(jnp.float32), keys, precision="highest")
        scores = spec.scores(products, None if slopes is None else slopes[:, None], position, context)
        visible = spec.visible(position, context) & (context < batch.contexts[row])
        scores = jnp.where(visible, scores, -jnp.inf)
        columns = scores if sinks is None else jnp.append(scores, sinks[:, None].astype(jnp.float32), axis=1)
        highest = jnp.maximum(columns.max(1, keepdims=True), LOWEST)
        total = jnp.exp(columns - highest).sum(1, keepdims=True)
        weights = jnp.exp(scores - highest) / jnp.where(total > 0, total, 1)
        output: jax.Array = jnp.einsum("hc,chd->hd", weights, values, precision="highest")
        return output

    outputs: jax.Array = lax.map(one_token, (q, batch.positions, batch.rows))
    return outputs.astype(dtype), k_pages, v_pages
