"""The operation that models are compiled to: checks a call and hands it to the implementation that serves it."""

from __future__ import annotations

from typing import Any, cast

import jax

from distaff.kernels.paged_attention.batch import StepBatch
from distaff.kernels.paged_attention.spec import AttentionSpec
from distaff.kernels.registry import choose


def paged_attention(
    spec: AttentionSpec,
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    layer: int | jax.Array,
    batch: StepBatch,
    *,
    sinks: jax.Array | None = None,
    platform: str | None = None,
) -> jax.Array:
    """Attention of every token of a step over its request's pages, which already hold the step's own keys and values.

    ``q[T, H, D]`` against ``k_pages[L, P, page, KV, D]`` and ``v_pages[L, P, page, KV, Dv]`` (may be the same array)
    at ``layer``, a number or a traced scalar, gives ``[T, H, Dv]`` in q's dtype, computed in float32 (products at
    jax's default precision). H is a multiple of KV, and head h reads key-value head ``h // (H / KV)``. ``sinks[H]``
    are scores of one more softmax column per head that has no value. Rows ``0 .. decodes-1`` of the batch have one
    token each. If T == R, every row has at most one token and row r's is token r, whatever ``decodes`` says. Outputs
    of padding tokens are finite.

    ``platform`` is where the program will run (default: where jax runs now). Raises `ValueError` for shapes that do
    not fit together and `NoImplementationError`.
    """
    _check(spec, q, k_pages, v_pages, batch, sinks)
    attributes = call_attributes(spec, q, k_pages, v_pages, batch)
    implementation = choose("paged_attention", platform or jax.default_backend(), attributes)
    return cast(jax.Array, implementation.function(spec, q, k_pages, v_pages, layer, batch, sinks))


def call_attributes(
    spec: AttentionSpec, q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, batch: StepBatch
) -> dict[str, Any]:
    """What implementations of ``paged_attention`` are chosen by; takes arrays or `jax.ShapeDtypeStruct`."""
    return {
        "spec": spec,
        "tokens": q.shape[0],
        "requests": batch.contexts.shape[0],
        "heads": q.shape[1],
        "kv_heads": k_pages.shape[3],
        "key_size": k_pages.shape[4],
        "value_size": v_pages.shape[4],
        "page_size": k_pages.shape[2],
        "dtype": str(q.dtype),
        "pages_dtype": str(k_pages.dtype),
    }


def _check(
    spec: AttentionSpec,
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    batch: StepBatch,
    sinks: jax.Array | None,
) -> None:
    shapes = f"q{list(q.shape)}, k_pages{list(k_pages.shape)}, v_pages{list(v_pages.shape)}"
    if (q.ndim, k_pages.ndim, v_pages.ndim) != (3, 5, 5):
        raise ValueError(f"{shapes} must be q[T, H, D] and pages[L, P, page, KV, D]")
    tokens, heads, size = q.shape
    if k_pages.shape[:4] != v_pages.shape[:4] or k_pages.shape[4] != size:
        raise ValueError(f"{shapes}: pages must agree in all but the last size, and keys be as wide as queries")
    if heads % k_pages.shape[3]:
        raise ValueError(f"{shapes}: {heads} query heads are not a multiple of {k_pages.shape[3]} key-value heads")
    if tokens != batch.tokens.shape[0]:
        raise ValueError(f"{shapes}: the batch has {batch.tokens.shape[0]} tokens")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks{list(sinks.shape)} must be [{heads}], one per query head")
    if spec.slopes is not None and len(spec.slopes) != heads:
        raise ValueError(f"{len(spec.slopes)} slopes for {heads} query heads")
