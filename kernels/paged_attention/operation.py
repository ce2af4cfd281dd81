"""The operation that models are compiled to: checks a call and hands it to the implementation that serves it."""

from __future__ import annotations

from typing import Any, cast

import jax

from distaff.kernels.paged_attention.batch import StepBatch
from distaff.kernels.paged_attention.pages import row_shape
from distaff.kernels.paged_attention.rotary import RotaryTables
from distaff.kernels.paged_attention.spec import AttentionSpec
from distaff.kernels.registry import choose, usual_calls


def paged_attention(
    spec: AttentionSpec,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    layer: int | jax.Array,
    batch: StepBatch,
    *,
    sinks: jax.Array | None = None,
    rotary: RotaryTables | None = None,
    platform: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Writes a step's keys and values into the pages, then attends with every token over its request's pages.

    ``k[T, KV, D]`` and ``v[T, KV, Dv]`` go to ``batch.slots`` of ``k_pages[L, P, page, KV, D]`` and ``v_pages[L, P,
    page, KV, Dv]`` at ``layer``, a number or a traced scalar (heads in int8 pools have `STEP_BYTES` more);
    ``q[T, H, D]`` against them gives ``[T, H, Dv]`` in q's dtype, computed in float32 (products at jax's default
    precision; a kernel may round queries and weights to bfloat16 where the pages hold that or int8). Returns it and
    both pools, which are updated in place if they are donated to the program. If ``k_pages is v_pages``, keys are
    values too: ``v`` is not looked at, and both pools returned are the same array.

    H is a multiple of KV, and head h reads key-value head ``h // (H / KV)``. ``sinks[H]`` are scores of one more
    softmax column per head that has no value. ``rotary`` are the tables cos and sin, float32 ``[P, size]``, that
    ``spec.rotary`` turns queries and keys with, before keys are written. Rows ``0 .. decodes-1`` of the batch have one
    token each. If T == R, every row has at most one token and row r's is token r, whatever ``decodes`` says. Outputs
    of padding tokens are finite.

    ``platform`` is where the program will run (default: where jax runs now). Raises `ValueError` for shapes that do
    not fit together and `NoImplementationError`.
    """
    _check(spec, q, k, k_pages, v_pages, batch, sinks, rotary)
    shared = v_pages is k_pages
    if not shared and v.shape != (*k.shape[:2], row_shape(v_pages)[1]):
        raise ValueError(f"v{list(v.shape)} must be as k{list(k.shape)} but for {row_shape(v_pages)[1]} values a head")
    attributes = call_attributes(spec, q, k, v, k_pages, v_pages, batch)
    implementation = choose("paged_attention", platform or jax.default_backend(), attributes)
    rows, pools = (k, None if shared else v), (k_pages, None if shared else v_pages)
    output, new_k, new_v = implementation.function(spec, q, *rows, *pools, layer, batch, sinks, rotary)
    return cast(jax.Array, output), cast(jax.Array, new_k), cast(jax.Array, new_k if shared else new_v)


def call_attributes(
    spec: AttentionSpec,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    batch: StepBatch,
) -> dict[str, Any]:
    """What implementations of ``paged_attention`` are chosen by; takes arrays or `jax.ShapeDtypeStruct`."""
    return {
        "spec": spec,
        "tokens": q.shape[0],
        "requests": batch.contexts.shape[0],
        "heads": q.shape[1],
        "kv_heads": k_pages.shape[3],
        "key_size": row_shape(k_pages)[1],
        "value_size": row_shape(v_pages)[1],
        "page_size": k_pages.shape[2],
        "dtype": str(q.dtype),
        "rows_dtypes": (str(k.dtype), str((k if v_pages is k_pages else v).dtype)),
        "pages_dtypes": (str(k_pages.dtype), str(v_pages.dtype)),
    }


@usual_calls("paged_attention")
def _calls() -> dict[str, dict[str, Any]]:
    def call(pages: str, **spec: Any) -> dict[str, Any]:
        sizes = {"tokens": 64, "requests": 8, "heads": 8, "kv_heads": 2, "key_size": 64, "value_size": 64}
        dtypes = {"dtype": "float32", "rows_dtypes": ("float32",) * 2, "pages_dtypes": (pages,) * 2}
        return {"spec": AttentionSpec(0.125, **spec), "page_size": 16, **sizes, **dtypes}

    return {
        "float32 pages": call("float32"),
        "bfloat16 pages": call("uint16"),
        "a window": call("float32", window=8),
        "a mask of its own": call("float32", mask=lambda query, key: key % 2 == query % 2),
    }


def _check(
    spec: AttentionSpec,
    q: jax.Array,
    k: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    batch: StepBatch,
    sinks: jax.Array | None,
    rotary: RotaryTables | None,
) -> None:
    shapes = f"q{list(q.shape)}, k_pages{list(k_pages.shape)}, v_pages{list(v_pages.shape)}"
    if (q.ndim, k_pages.ndim, v_pages.ndim) != (3, 5, 5):
        raise ValueError(f"{shapes} must be q[T, H, D] and pages[L, P, page, KV, D]")
    tokens, heads, size = q.shape
    if k_pages.shape[:4] != v_pages.shape[:4] or row_shape(k_pages)[1] != size:
        raise ValueError(f"{shapes}: pages must agree in all but the last size, and keys be as wide as queries")
    if heads % k_pages.shape[3]:
        raise ValueError(f"{shapes}: {heads} query heads are not a multiple of {k_pages.shape[3]} key-value heads")
    if tokens != batch.tokens.shape[0]:
        raise ValueError(f"{shapes}: the batch has {batch.tokens.shape[0]} tokens")
    if k.shape != (tokens, k_pages.shape[3], size):
        raise ValueError(f"{shapes}: k{list(k.shape)} must be [{tokens}, {k_pages.shape[3]}, {size}]")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks{list(sinks.shape)} must be [{heads}], one per query head")
    if spec.slopes is not None and len(spec.slopes) != heads:
        raise ValueError(f"{len(spec.slopes)} slopes for {heads} query heads")
    _check_rotary(spec, rotary, size)


def _check_rotary(spec: AttentionSpec, tables: RotaryTables | None, size: int) -> None:
    if (spec.rotary is None) != (tables is None):
        raise ValueError(f"spec.rotary is {spec.rotary}, and the call has {'no' if tables is None else 'its'} tables")
    if spec.rotary is None or tables is None:
        return
    cos, sin = tables
    if spec.rotary.size > size:
        raise ValueError(f"{spec.rotary} turns more than the {size} values of a head")
    if cos.shape != sin.shape or cos.ndim != 2 or cos.shape[1] != spec.rotary.size:
        raise ValueError(f"rotary tables {list(cos.shape)} and {list(sin.shape)} must both be [P, {spec.rotary.size}]")
