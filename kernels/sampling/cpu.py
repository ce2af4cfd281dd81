"""Sampling on CPUs: a row of logits is read once or twice by a C++ kernel (``kernels/native/sampling*``)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from distaff.kernels import native
from distaff.kernels.registry import Attributes, register
from distaff.kernels.sampling.rows import SamplingRows, TokenLogprobs


def refuses(attributes: Attributes) -> str | None:
    """Why the kernels cannot serve a call with these attributes, or None."""
    if not native.available():
        return "is not built: this installation was made without a C++ compiler"
    if attributes["dtype"] != "float32":
        return f"takes float32 logits, not {attributes['dtype']}"
    return None


@register("sampling.greedy_tokens", "native", platforms=("cpu",), priority=10, refuses=refuses)
def greedy_tokens(logits: jax.Array) -> jax.Array:
    """`distaff.kernels.sampling.greedy_tokens`."""
    native.register()
    tokens: jax.Array = jax.ffi.ffi_call("distaff_greedy_tokens", _of_rows(logits, jnp.int32))(logits)
    return tokens


@register("sampling.draw_tokens", "native", platforms=("cpu",), priority=10, refuses=refuses)
def draw_tokens(logits: jax.Array, rows: SamplingRows) -> jax.Array:
    """`distaff.kernels.sampling.draw_tokens`."""
    native.register()
    tokens: jax.Array = jax.ffi.ffi_call("distaff_draw_tokens", _of_rows(logits, jnp.int32))(logits, *rows)
    return tokens


@register("sampling.token_logprobs", "native", platforms=("cpu",), priority=10, refuses=refuses)
def token_logprobs(logits: jax.Array, tokens: jax.Array, *, top: int) -> TokenLogprobs:
    """`distaff.kernels.sampling.token_logprobs`."""
    native.register()
    shapes = [_of_rows(logits, dtype, *shape) for shape in ((), (top,)) for dtype in (jnp.float32, jnp.int32)]
    return TokenLogprobs(*jax.ffi.ffi_call("distaff_token_logprobs", shapes)(logits, tokens))


def _of_rows(logits: jax.Array, dtype: jax.typing.DTypeLike, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((logits.shape[0], *shape), dtype)
