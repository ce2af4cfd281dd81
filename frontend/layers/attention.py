"""Attention of [batch..., length, heads, depth], its masks and its cache.

Weights, masks and biases are [batch..., heads, queries, keys] or broadcast to that; a mask is true where a query may
see a key. Keys and values may have fewer heads than queries: each is then shared by a group of these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from distaff.frontend.layers.dtypes import Array, Dtype


def check(condition: bool, message: str, *arrays: Array) -> None:
    """ValueError with the arrays' shapes unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{message}, got shapes {', '.join(str(array.shape) for array in arrays)}.")


def softmax_weights(
    query: Array,
    key: Array,
    bias: Array | None,
    mask: Array | None,
    einsum: Callable[..., Array],
    force_fp32: bool = False,
) -> Array:
    """``softmax(query · key / sqrt(depth) + bias)`` where ``mask`` is true: [batch..., heads, queries, keys].

    Args:
        query: [batch..., queries, heads, depth].
        key: [batch..., keys, heads or a divisor of it, depth].
        bias, mask: see the module.
        einsum: as ``jax.numpy.einsum``.
        force_fp32: compute the softmax in float32 and return it so; otherwise in the dtype of ``query``.
    """
    dtype, groups = query.dtype, key.shape[-2]
    scaled = query / np.sqrt(np.float32(query.shape[-1])).astype(dtype)
    if groups == query.shape[-2]:
        weights = einsum("...qhd,...khd->...hqk", scaled, key)
    else:
        grouped = scaled.reshape(*scaled.shape[:-2], groups, -1, scaled.shape[-1])
        weights = einsum("...qhgd,...khd->...hgqk", grouped, key)
        weights = weights.reshape(*weights.shape[:-4], query.shape[-2], *weights.shape[-2:])
    if bias is not None:
        weights = weights + bias
    if mask is not None:
        weights = jnp.where(mask, weights, jnp.finfo(dtype).min)  # type: ignore[no-untyped-call]
    if force_fp32 and dtype != jnp.float32:
        return jax.nn.softmax(weights.astype(jnp.float32))
    return jax.nn.softmax(weights).astype(dtype)


def dropped_weights(weights: Array, broadcast: bool, rng: jax.Array | None, rate: float, dtype: Dtype) -> Array:
    """The weights, each zero with probability ``rate`` and the others scaled; ValueError if there is no ``rng``.

    With ``broadcast`` the same are dropped in all batch rows and heads.
    """
    if rng is None:
        raise ValueError("Attention dropout needs dropout_rng, or deterministic=True.")
    shape = (1,) * (weights.ndim - 2) + weights.shape[-2:] if broadcast else weights.shape
    keep = jax.random.bernoulli(rng, 1.0 - rate, shape)
    return weights * (keep.astype(dtype) / jnp.asarray(1.0 - rate, dtype))


def weighted_values(weights: Array, value: Array, einsum: Callable[..., Array]) -> Array:
    """The sums by weight of ``value`` [..., keys, heads or a divisor, depth]: [batch..., queries, heads, depth]."""
    heads, groups = weights.shape[-3], value.shape[-2]
    if heads == groups:
        return einsum("...hqk,...khd->...qhd", weights, value)
    grouped = weights.reshape(*weights.shape[:-3], groups, -1, *weights.shape[-2:])
    out = einsum("...hgqk,...khd->...qhgd", grouped, value)
    return out.reshape(*out.shape[:-3], heads, out.shape[-1])


def cache_step(
    cached_key: Array, cached_value: Array, index: Array, key: Array, value: Array
) -> tuple[Array, Array, Array]:
    """The cache with one token's key and value at ``index``, and the mask of the tokens up to it.

    Args:
        cached_key, cached_value: [batch..., length, heads, depth].
        index: how many tokens the cache holds.
        key, value: [batch..., 1, heads, depth]; ValueError if not.
    """
    *batch, length, heads, depth = cached_key.shape
    if key.shape != (*batch, 1, heads, depth):
        raise ValueError(
            f"Autoregressive cache shape error, expected key shape {(*batch, 1, heads, depth)} instead got "
            f"{key.shape}: decoding takes one token a call."
        )
    zero = jnp.zeros((), index.dtype)
    start = (*(zero,) * len(batch), index, zero, zero)
    seen = jnp.broadcast_to(jnp.arange(length) <= index, (*batch, 1, 1, length))
    return (
        lax.dynamic_update_slice(cached_key, key, start),
        lax.dynamic_update_slice(cached_value, value, start),
        seen,
    )


def make_attention_mask(
    query_input: Array,
    key_input: Array,
    pairwise_fn: Callable[..., Any] = jnp.multiply,
    extra_batch_dims: int = 0,
    dtype: Dtype = jnp.float32,
) -> Array:
    """``pairwise_fn`` of each query's and each key's number: [batch..., 1, queries, keys], of ``dtype``.

    Args:
        query_input: [batch..., queries]; with the default ``pairwise_fn`` 1 for tokens and 0 for padding.
        key_input: [batch..., keys].
        extra_batch_dims: number of axes of size 1 to put in front.
    """
    mask = pairwise_fn(query_input[..., :, None], key_input[..., None, :])[..., None, :, :]
    return jnp.expand_dims(mask, tuple(range(extra_batch_dims))).astype(dtype)


def make_causal_mask(x: Array, extra_batch_dims: int = 0, dtype: Dtype = jnp.float32) -> Array:
    """The mask by which each position of ``x`` [batch..., length] sees itself and those before."""
    positions = jnp.broadcast_to(jnp.arange(x.shape[-1], dtype=jnp.int32), x.shape)
    return make_attention_mask(positions, positions, jnp.greater_equal, extra_batch_dims, dtype)


def combine_masks(*masks: Array | None, dtype: Dtype = jnp.float32) -> Array | None:
    """The mask that is true where all are, None ones aside; None if there are none. All have the same rank."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    check(all(mask.ndim == given[0].ndim for mask in given), "masks must have same rank", *given)
    return functools.reduce(jnp.logical_and, given).astype(dtype)
