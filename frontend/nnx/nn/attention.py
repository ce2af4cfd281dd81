"""Attention: the dot-product function, and ``MultiHeadAttention`` around it; and the names of the masks.

Arrays are [batch..., length, heads, depth]; weights, masks and biases are [batch..., heads, queries, keys] or broadcast
to that, and a mask is true where a query may see a key. Keys and values may have fewer heads than queries: each is then
shared by a group of these.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distaff.frontend.layers.attention import (
    cache_step,
    check,
    dropped_weights,
    softmax_weights,
    weighted_values,
)
from distaff.frontend.layers.attention import combine_masks as combine_masks
from distaff.frontend.layers.attention import make_attention_mask as make_attention_mask
from distaff.frontend.layers.attention import make_causal_mask as make_causal_mask
from distaff.frontend.layers.fields import DotGeneral, Initializer, PrecisionLike, PromoteDtype
from distaff.frontend.layers.initializers import default_kernel_init, zeros
from distaff.frontend.nnx.module import Module
from distaff.frontend.nnx.nn.dtypes import Array, Dtype, promote_dtype
from distaff.frontend.nnx.nn.fields import NO_METADATA, Metadata, first_from, missing
from distaff.frontend.nnx.nn.linear import LinearGeneral
from distaff.frontend.nnx.nn.normalization import LayerNorm
from distaff.frontend.nnx.pytrees import data
from distaff.frontend.nnx.rngs import Rngs, RngStream
from distaff.frontend.nnx.variable_kinds import Cache, Intermediate


def _check_heads(query: Array, key: Array, value: Array | None = None) -> None:
    given = [query, key] if value is None else [query, key, value]
    check(all(x.ndim == query.ndim for x in given), "q, k, v must have same rank", *given)
    check(all(x.shape[:-3] == query.shape[:-3] for x in given), "q, k, v batch dims must match", *given)
    check(query.shape[-1] == key.shape[-1], "q, k depths must match", query, key)
    check(query.shape[-2] % key.shape[-2] == 0, "Query heads must be a multiple of key heads", query, key)
    if value is not None:
        check(key.shape[-3] == value.shape[-3], "k, v lengths must match", key, value)
        check(query.shape[-2] % value.shape[-2] == 0, "Query heads must be multiple of Value heads", query, value)


def dot_product_attention_weights(
    query: Array,
    key: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Dtype | None = None,
    precision: PrecisionLike = None,
    module: Module | None = None,
    promote_dtype: PromoteDtype = promote_dtype,
    is_causal: bool = False,
) -> Array:
    """``softmax(query · key / sqrt(depth) + bias)`` where ``mask`` is true: [batch..., heads, queries, keys].

    Args:
        query: [batch..., queries, heads, depth].
        key: [batch..., keys, heads or a divisor of it, depth].
        bias: added to the products.
        mask: true where a query sees a key; a query that sees none attends to all keys alike.
        broadcast_dropout: drop the same weights in all batch rows and heads.
        dropout_rng, dropout_rate, deterministic: drop weights with this probability unless deterministic.
        dtype: to compute in; by default the one that query and key promote to.
        precision: of the product.
        module: sows the weights as ``attention_weights``, an ``Intermediate``.
        promote_dtype: brings a tuple of query and key to ``dtype``.
        is_causal: a query sees the keys at its own position and before.

    Raises:
        ValueError: the shapes do not fit together, or there is no ``dropout_rng`` to drop weights with.
    """
    query, key = promote_dtype((query, key), dtype=dtype)
    _check_heads(query, key)
    if is_causal:
        causal = jnp.tri(query.shape[-3], key.shape[-3], dtype=bool)
        mask = causal if mask is None else jnp.logical_and(mask, causal)
    weights = softmax_weights(query, key, bias, mask, functools.partial(jnp.einsum, precision=precision))
    if module is not None:
        module.sow(Intermediate, "attention_weights", weights)
    if deterministic or dropout_rate == 0.0:
        return weights
    return dropped_weights(weights, broadcast_dropout, dropout_rng, dropout_rate, query.dtype)


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Dtype | None = None,
    precision: PrecisionLike = None,
    module: Module | None = None,
    promote_dtype: PromoteDtype = promote_dtype,
    is_causal: bool = False,
) -> Array:
    """The values, weighted by ``dot_product_attention_weights``: [batch..., queries, heads, value depth].

    Where no weights are dropped or sown, ``jax.nn.dot_product_attention`` computes it, with the softmax in float32.

    Args:
        value: [batch..., keys, heads or a divisor of it, value depth].
        others: as for ``dot_product_attention_weights``.
    """
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
    _check_heads(query, key, value)
    if dropout_rate == 0.0 and module is None and precision is None and key.shape == value.shape:
        return _fused(query, key, value, bias, mask, is_causal)
    weights = dot_product_attention_weights(
        query,
        key,
        bias,
        mask,
        broadcast_dropout,
        dropout_rng,
        dropout_rate,
        deterministic,
        query.dtype,
        precision,
        module,
        promote_dtype,
        is_causal,
    )
    return weighted_values(weights, value, functools.partial(jnp.einsum, precision=precision))


def _fused(query: Array, key: Array, value: Array, bias: Array | None, mask: Array | None, is_causal: bool) -> Array:
    batch = query.shape[:-3]

    def with_one_batch_axis(x: Any) -> Any:
        if x is None or len(batch) < 2:
            return x
        return jnp.broadcast_to(x, (*batch, *x.shape[-3:])).reshape(math.prod(batch), *x.shape[-3:])

    query_, key, value = (with_one_batch_axis(x) for x in (query, key, value))
    bias, mask = with_one_batch_axis(bias), with_one_batch_axis(None if mask is None else mask.astype(bool))
    return jax.nn.dot_product_attention(query_, key, value, bias, mask, is_causal=is_causal).reshape(query.shape)


class MultiHeadAttention(Module):
    """Attention between projections of the inputs, and a projection of its output.

    Attributes:
        query, key, value: ``LinearGeneral`` to [heads, depth].
        query_ln, key_ln: ``LayerNorm`` of queries and keys, or None.
        out: ``LinearGeneral`` from [heads, depth].
        rngs: the ``RngStream`` that dropout draws from, or None.
        cached_key, cached_value: ``Cache`` [batch..., length, kv heads, depth], or None.
        cache_index: ``Cache``, int32, the number of tokens in the cache, or None.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        broadcast_dropout: bool = True,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer = zeros,
        out_bias_init: Initializer | None = None,
        use_bias: bool = True,
        attention_fn: Callable[..., Array] = dot_product_attention,
        decode: bool | None = None,
        normalize_qk: bool = False,
        qkv_promote_dtype: PromoteDtype = promote_dtype,
        out_promote_dtype: PromoteDtype = promote_dtype,
        ln_promote_dtype: PromoteDtype = promote_dtype,
        qkv_dot_general: DotGeneral | None = None,
        out_dot_general: DotGeneral | None = None,
        qkv_dot_general_cls: Any = None,
        out_dot_general_cls: Any = None,
        rngs: Rngs,
        keep_rngs: bool = True,
        kernel_metadata: Metadata = NO_METADATA,
        out_kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
        out_bias_metadata: Metadata = NO_METADATA,
        query_ln_scale_metadata: Metadata = NO_METADATA,
        key_ln_scale_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Make the parameters.

        Args:
            num_heads: number of heads.
            in_features, in_kv_features: sizes of the query input and of the inputs of keys and values.
            qkv_features: heads times depth; by default ``in_features``.
            out_features: size of the output; by default ``in_features``.
            num_kv_heads: number of heads of keys and values; by default ``num_heads``.
            dtype, param_dtype, precision, use_bias: as for ``LinearGeneral``.
            broadcast_dropout, dropout_rate, deterministic: dropout of weights, as for ``dot_product_attention``.
            kernel_init, out_kernel_init, bias_init, out_bias_init: initialisers; those for ``out`` default to the
                others, as their metadata do.
            attention_fn: called as ``dot_product_attention``.
            decode: keep keys and values in the cache of ``init_cache`` and take one token a call.
            normalize_qk: normalise queries and keys.
            qkv_promote_dtype, out_promote_dtype, ln_promote_dtype: ``promote_dtype`` of the projections and the norms.
            qkv_dot_general, out_dot_general, qkv_dot_general_cls, out_dot_general_cls: replace the products of the
                projections.
            rngs: the streams ``params`` and ``dropout``.
            keep_rngs: fork a stream for dropout; otherwise calls are given one.
            kernel_metadata, bias_metadata, ..._metadata: metadata of the parameters.

        Raises:
            ValueError: the heads do not divide the features, or those of keys not those of queries.
        """
        self.num_heads = num_heads
        self.in_features = in_features
        self.qkv_features = in_features if qkv_features is None else qkv_features
        self.out_features = in_features if out_features is None else out_features
        self.in_kv_features = in_features if in_kv_features is None else in_kv_features
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({num_heads}) must be divisible by num_kv_heads ({self.num_kv_heads}).")
        if self.qkv_features % num_heads:
            raise ValueError(
                f"Memory dimension ({self.qkv_features}) must be divisible by 'num_heads' heads ({num_heads})."
            )
        self.head_dim = self.qkv_features // num_heads
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.broadcast_dropout = broadcast_dropout
        self.dropout_rate = dropout_rate
        self.deterministic = deterministic
        self.precision = precision
        self.use_bias = use_bias
        self.attention_fn = attention_fn
        self.decode = decode
        self.normalize_qk = normalize_qk
        self.qkv_promote_dtype = qkv_promote_dtype
        self.out_promote_dtype = out_promote_dtype
        self.ln_promote_dtype = ln_promote_dtype
        self.qkv_dot_general = qkv_dot_general
        self.out_dot_general = out_dot_general
        self.qkv_dot_general_cls = qkv_dot_general_cls
        self.out_dot_general_cls = out_dot_general_cls

        of_all: dict[str, Any] = {
            "dtype": dtype,
            "param_dtype": param_dtype,
            "use_bias": use_bias,
            "precision": precision,
            "rngs": rngs,
        }
        of_qkv: dict[str, Any] = {
            **of_all,
            "kernel_init": kernel_init,
            "bias_init": bias_init,
            "promote_dtype": qkv_promote_dtype,
            "dot_general": qkv_dot_general,
            "dot_general_cls": qkv_dot_general_cls,
            "kernel_metadata": kernel_metadata,
            "bias_metadata": bias_metadata,
        }
        self.query = LinearGeneral(in_features, (num_heads, self.head_dim), **of_qkv)
        self.key = LinearGeneral(self.in_kv_features, (self.num_kv_heads, self.head_dim), **of_qkv)
        self.value = LinearGeneral(self.in_kv_features, (self.num_kv_heads, self.head_dim), **of_qkv)
        of_norms: dict[str, Any] = {
            "use_bias": False,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "promote_dtype": ln_promote_dtype,
            "rngs": rngs,
        }
        self.query_ln: Any = data(None)
        self.key_ln: Any = data(None)
        if normalize_qk:
            self.query_ln = LayerNorm(self.head_dim, scale_metadata=query_ln_scale_metadata, **of_norms)
            self.key_ln = LayerNorm(self.head_dim, scale_metadata=key_ln_scale_metadata, **of_norms)
        self.out = LinearGeneral(
            (num_heads, self.head_dim),
            self.out_features,
            axis=(-2, -1),
            kernel_init=out_kernel_init or kernel_init,
            bias_init=out_bias_init or bias_init,
            promote_dtype=out_promote_dtype,
            dot_general=out_dot_general,
            dot_general_cls=out_dot_general_cls,
            kernel_metadata=out_kernel_metadata or kernel_metadata,
            bias_metadata=out_bias_metadata or bias_metadata,
            **of_all,
        )
        self.rngs = rngs.dropout.fork() if keep_rngs and dropout_rate > 0 else None
        self.cached_key: Any = data(None)
        self.cached_value: Any = data(None)
        self.cache_index: Any = data(None)

    def __call__(
        self,
        inputs_q: Array,
        inputs_k: Array | None = None,
        inputs_v: Array | None = None,
        *,
        mask: Array | None = None,
        deterministic: bool | None = None,
        rngs: Rngs | RngStream | None = None,
        sow_weights: bool = False,
        decode: bool | None = None,
        is_causal: bool = False,
        out_sharding: Any = None,
        qkv_sharding: Any = None,
    ) -> Array:
        """Attend from ``inputs_q`` [batch..., queries, features] to ``inputs_k``, ``inputs_v`` [batch..., keys, ...].

        Args:
            inputs_q, inputs_k, inputs_v: keys default to the queries' input, values to the keys'.
            mask, is_causal: which keys a query sees.
            deterministic, decode: go before the constructor's.
            rngs: streams, or the stream, to draw dropout from in place of the layer's own.
            sow_weights: sow the attention weights.
            out_sharding, qkv_sharding: shardings of the output and of queries, keys and values.

        Raises:
            ValueError: the inputs do not fit; a setting or a stream is missing; or with ``decode`` there is no cache,
                or more than one token.
        """
        if inputs_k is None:
            if inputs_v is not None:
                raise ValueError(
                    "`inputs_k` cannot be None if `inputs_v` is not None. For both the same, pass inputs_k."
                )
            inputs_k = inputs_q
        if inputs_v is None:
            inputs_v = inputs_k
        if inputs_q.shape[-1] != self.in_features:
            raise ValueError(
                f"Incompatible input dimension, got {inputs_q.shape[-1]} but module expects {self.in_features}."
            )
        decode = first_from(decode, self.decode, error_msg=missing(self, "decode"))
        query = self.query(inputs_q, out_sharding=qkv_sharding)
        key = self.key(inputs_k, out_sharding=qkv_sharding)
        value = self.value(inputs_v, out_sharding=qkv_sharding)
        if self.normalize_qk:
            query, key = self.query_ln(query), self.key_ln(key)
        if decode:
            key, value, mask = self._cached(key, value, mask)
        dropout_rng = self._dropout_rng(deterministic, rngs)
        x = self.attention_fn(
            query,
            key,
            value,
            mask=mask,
            dropout_rng=dropout_rng,
            dropout_rate=self.dropout_rate,
            broadcast_dropout=self.broadcast_dropout,
            deterministic=dropout_rng is None,
            dtype=self.dtype,
            precision=self.precision,
            module=self if sow_weights else None,
            is_causal=is_causal,
        )
        return self.out(x, out_sharding=out_sharding)

    def _dropout_rng(self, deterministic: bool | None, rngs: Rngs | RngStream | None) -> Array | None:
        """The key to drop weights with; None to drop none."""
        if self.dropout_rate == 0.0:
            return None
        if first_from(deterministic, self.deterministic, error_msg=missing(self, "deterministic")):
            return None
        stream = self.rngs if rngs is None else rngs.dropout if isinstance(rngs, Rngs) else rngs
        if stream is None:
            raise ValueError(
                "'rngs' must be provided to __call__ method if MultiHeadAttention instance is defined with "
                "keep_rngs=False."
            )
        return stream()

    def _cached(self, key: Array, value: Array, mask: Array | None) -> tuple[Array, Array, Array | None]:
        """Put one token's key and value into the cache; all of them, and the mask of those before and at it."""
        if self.cached_key is None or self.cached_value is None or self.cache_index is None:
            raise ValueError("Autoregressive cache not initialized, call ``init_cache`` first.")
        index = self.cache_index[...]
        key, value, seen = cache_step(self.cached_key[...], self.cached_value[...], index, key, value)
        self.cached_key[...], self.cached_value[...], self.cache_index[...] = key, value, index + 1
        return key, value, combine_masks(mask, seen)

    def init_cache(self, input_shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> None:
        """Make an empty cache for inputs of the shape [batch..., length, features]."""
        shape = (*input_shape[:-1], self.num_kv_heads, self.head_dim)
        self.cached_key = Cache(jnp.zeros(shape, dtype))
        self.cached_value = Cache(jnp.zeros(shape, dtype))
        self.cache_index = Cache(jnp.array(0, jnp.int32))

    def set_view(
        self,
        deterministic: bool | None = None,
        decode: bool | None = None,
        batch_size: int | tuple[int, ...] | None = None,
        max_length: int | None = None,
    ) -> None:
        """What ``nnx.view`` calls.

        Args:
            deterministic: drop no attention weights.
            decode: take one token a call, with the cache.
            batch_size: with ``decode`` and ``max_length``: make an empty cache of these sizes, if there is none.
            max_length: number of tokens in the cache.

        Raises:
            TypeError: the cache was taken out of the module, and there are no sizes to make one.
        """
        if deterministic is not None:
            self.deterministic = deterministic
        if decode is not None:
            self.decode = decode
            self._make_missing_cache(batch_size, max_length)

    def _make_missing_cache(self, batch_size: int | tuple[int, ...] | None, max_length: int | None) -> None:
        if getattr(self, "cached_key", None) is not None:
            return
        if batch_size is not None and max_length is not None:
            batch = (batch_size,) if isinstance(batch_size, int) else batch_size
            self.init_cache((*batch, max_length, self.in_features), self.dtype or jnp.float32)
        elif not hasattr(self, "cached_key"):
            raise TypeError("'batch_size' and 'max_length' must be provided when initializing cache.")
