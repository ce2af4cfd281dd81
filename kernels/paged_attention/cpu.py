"""Paged attention on CPUs: one call of the C++ kernel (``kernels/native/attention*``) writes, turns and attends.

Pools of float32, bfloat16 (as bits) and int8 are updated in place. Where a pool holds bfloat16, queries and weights are
rounded to it on processors that have its dot product, and in prompts where a pool holds int8.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.kernels import native
from distaff.kernels.paged_attention.batch import StepBatch
from distaff.kernels.paged_attention.pages import row_shape
from distaff.kernels.paged_attention.rotary import RotaryTables
from distaff.kernels.paged_attention.spec import AttentionSpec
from distaff.kernels.registry import Attributes, register

_POOLS = ("float32", "uint16", "int8")
_ROWS = ("float32", "bfloat16")
_MOST_VALUES = 1024  # kMostValues in attention.h


def refuses(attributes: Attributes) -> str | None:
    """Why the kernel cannot serve a call with these attributes, or None."""
    if not native.available():
        return "is not built: this installation was made without a C++ compiler"
    spec: AttentionSpec = attributes["spec"]
    if not spec.causal or spec.mask is not None:
        return "computes causal masks and windows alone"
    if other := set(attributes["pages_dtypes"]) - set(_POOLS):
        return f"keeps keys and values in {' or '.join(_POOLS)}, not {', '.join(sorted(other))}"
    if other := {attributes["dtype"], *attributes["rows_dtypes"]} - set(_ROWS):
        return f"takes rows in {' or '.join(_ROWS)}, not {', '.join(sorted(other))}"
    if len(set(attributes["pages_dtypes"])) > 1 and "int8" in attributes["pages_dtypes"]:
        return "keeps keys and values both in int8 or neither"
    if (size := max(attributes["key_size"], attributes["value_size"])) > _MOST_VALUES:
        return f"takes heads of at most {_MOST_VALUES} values, not {size}"
    return None


@register("paged_attention", "native", platforms=("cpu",), priority=10, refuses=refuses)
@functools.partial(jax.jit, static_argnames="spec")
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
    """`paged_attention`; layers with the same spec and shapes share one trace. No ``v_pages``: keys are values."""
    native.register()
    none = jnp.zeros(0, jnp.float32)
    slopes = spec.slope_array()
    cos, sin = (none, none) if rotary is None else (table.astype(jnp.float32) for table in rotary)
    operands = [
        *(q, k, k_pages, jnp.asarray(layer, jnp.int32), batch.positions, batch.slots, batch.starts, batch.tables),
        *(none if slopes is None else slopes, none if sinks is None else sinks.astype(jnp.float32), cos, sin),
    ]
    attributes: dict[str, Any] = {
        "scale": np.float32(spec.scale),
        "softcap": np.float32(spec.softcap or 0),
        "window": np.int32(spec.window or 0),
        "interleaved": np.int32(spec.rotary is not None and spec.rotary.kind == "interleaved"),
    }
    output = jax.ShapeDtypeStruct((*q.shape[:2], row_shape(k_pages if v_pages is None else v_pages)[1]), q.dtype)
    if v is None or v_pages is None:
        results, aliases, name = (output, _like(k_pages)), {2: 1}, "distaff_paged_attention_one_pool"
        attended, k_pages = jax.ffi.ffi_call(name, results, input_output_aliases=aliases)(*operands, **attributes)
        return attended, k_pages, None
    call = jax.ffi.ffi_call(
        "distaff_paged_attention",
        (output, _like(k_pages), _like(v_pages)),
        input_output_aliases={2: 1, len(operands) + 1: 2},
    )
    attended, k_pages, v_pages = call(*operands, v, v_pages, **attributes)
    return attended, k_pages, v_pages


def _like(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
