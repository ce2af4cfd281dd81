"""Attention: the dot-product function, and multi-head layers around it; and the names of the masks.

Arrays are [batch..., length, heads, depth]; weights, masks and biases are [batch..., heads, queries, keys] or broadcast
to that, and a mask is true where a query may see a key.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from distaff.frontend.layers.attention import cache_step, check, dropped_weights, softmax_weights, weighted_values
from distaff.frontend.layers.attention import combine_masks as combine_masks
from distaff.frontend.layers.attention import make_attention_mask as make_attention_mask
from distaff.frontend.layers.attention import make_causal_mask as make_causal_mask
from distaff.frontend.layers.fields import DotGeneral, Initializer, PrecisionLike
from distaff.frontend.linen import initializers
from distaff.frontend.linen.class_transform import compact, nowrap
from distaff.frontend.linen.dtypes import Array, Dtype, promote_dtype
from distaff.frontend.linen.initializers import default_kernel_init
from distaff.frontend.linen.linear import DenseGeneral
from distaff.frontend.linen.module import Module, merge_param
from distaff.frontend.linen.normalization import LayerNorm

EinsumFunction: TypeAlias = Callable[..., Array]


def _einsum(precision: PrecisionLike, dot_general: DotGeneral | None, replacement: EinsumFunction | None) -> Any:
    """The ``einsum`` to use: the replacement, or JAX's with this precision and ``dot_general``."""
    if replacement is None:
        options = {} if dot_general is None else {"_dot_general": dot_general}
        return functools.partial(jnp.einsum, precision=precision, **options)
    if precision or dot_general:
        raise ValueError("Give either precision and einsum_dot_general, or a replacement for einsum, not both.")
    return replacement


def _promoted(query: Array, key: Array, value: Array | None, dtype: Dtype | None) -> list[Any]:
    """The arrays in the dtype to compute in; ValueError if their shapes do not fit together."""
    check(query.ndim == key.ndim, "query and key must have the same rank", query, key)
    check(query.shape[:-3] == key.shape[:-3], "query and key must have the same batch axes", query, key)
    check(query.shape[-2:] == key.shape[-2:], "query and key must have the same heads and depth", query, key)
    if value is not None:
        check(key.ndim == value.ndim, "key and value must have the same rank", key, value)
        check(
            key.shape[:-1] == value.shape[:-1], "key and value must have the same batch, length and heads", key, value
        )
    return promote_dtype(query, key, value, dtype=dtype)


def _softmax_weights(
    query: Array,
    key: Array,
    bias: Array | None,
    mask: Array | None,
    einsum: EinsumFunction,
    force_fp32: bool,
    module: Module | None,
) -> Array:
    """The weights before dropout, sown into ``module``."""
    weights = softmax_weights(query, key, bias, mask, einsum, force_fp32)
    if module is not None:
        module.sow("intermediates", "attention_weights", weights)
    return weights


def dot_product_attention_weights(
    query: Array,
    key: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Dtype | None = None,
    precision: PrecisionLike = None,
    module: Module | None = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: DotGeneral | None = None,
    einsum: EinsumFunction | None = None,
) -> Array:
    """``softmax(query · key / sqrt(depth) + bias)`` where ``mask`` is true: [batch..., heads, queries, keys].

    Args:
        query: [batch..., queries, heads, depth].
        key: [batch..., keys, heads, depth].
        bias: added to the products.
        mask: true where a query sees a key; a query that sees none attends to all keys alike.
        broadcast_dropout: drop the same weights in all batch rows and heads.
        dropout_rng, dropout_rate, deterministic: drop weights with this probability unless deterministic.
        dtype: to compute in; by default the one that query and key promote to.
        precision, einsum_dot_general: of the product; ``einsum`` replaces it as a whole.
        module: sows the weights as ``intermediates/attention_weights``.
        force_fp32_for_softmax: compute the softmax in float32 (and return it so).

    Raises:
        ValueError: the shapes do not fit together.
    """
    einsum = _einsum(precision, einsum_dot_general, einsum)
    query, key, _ = _promoted(query, key, None, dtype)
    weights = _softmax_weights(query, key, bias, mask, einsum, force_fp32_for_softmax, module)
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
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Dtype | None = None,
    precision: PrecisionLike = None,
    module: Module | None = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: DotGeneral | None = None,
    qk_attn_weights_einsum: EinsumFunction | None = None,
    attn_weights_value_einsum: EinsumFunction | None = None,
) -> Array:
    """The values, weighted by ``dot_product_attention_weights``: [batch..., queries, heads, value depth].

    Args:
        value: [batch..., keys, heads, value depth].
        qk_attn_weights_einsum, attn_weights_value_einsum: replace the two products; both or neither.
        others: as for ``dot_product_attention_weights``.
    """
    if (qk_attn_weights_einsum is None) != (attn_weights_value_einsum is None):
        raise ValueError("Give both of qk_attn_weights_einsum and attn_weights_value_einsum, or neither.")
    qk_einsum = _einsum(precision, einsum_dot_general, qk_attn_weights_einsum)
    value_einsum = _einsum(precision, einsum_dot_general, attn_weights_value_einsum)
    query, key, value = _promoted(query, key, value, dtype)
    weights = _softmax_weights(query, key, bias, mask, qk_einsum, force_fp32_for_softmax, module)
    if not deterministic and dropout_rate > 0.0:
        weights = dropped_weights(weights, broadcast_dropout, dropout_rng, dropout_rate, query.dtype)
    return weighted_values(weights, value, value_einsum)


class MultiHeadDotProductAttention(Module):
    """Attention between projections of the inputs, and a projection of its output.

    Submodules: ``query``, ``key`` and ``value`` (``DenseGeneral`` to [heads, depth]), ``out``, and with
    ``normalize_qk`` ``query_ln`` and ``key_ln``.

    Args:
        num_heads: number of heads.
        dtype, param_dtype, precision, use_bias: as for ``DenseGeneral``.
        qkv_features: heads times depth; by default the size of the query input.
        out_features: size of the output; by default that of the query input.
        broadcast_dropout, dropout_rate, deterministic: dropout of weights, as for ``dot_product_attention``.
        kernel_init, out_kernel_init, bias_init, out_bias_init: initialisers; those for ``out`` default to the others.
        attention_fn: ``(query, key, value, mask=, ...)``; is given those arguments that it takes.
        decode: keep keys and values in the collection ``cache`` and take one token a call. ``init`` with an input of
            the maximum length makes the cache.
        normalize_qk: normalise queries and keys.
        force_fp32_for_softmax: as for ``dot_product_attention``.
        qkv_dot_general, out_dot_general, qkv_dot_general_cls, out_dot_general_cls: replace the products of the
            projections, qk_attn_weights_einsum_cls and attn_weights_value_einsum_cls those of the attention.
    """

    num_heads: int
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    qkv_features: int | None = None
    out_features: int | None = None
    broadcast_dropout: bool = True
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    precision: PrecisionLike = None
    kernel_init: Initializer = default_kernel_init
    out_kernel_init: Initializer | None = None
    bias_init: Initializer = initializers.zeros
    out_bias_init: Initializer | None = None
    use_bias: bool = True
    attention_fn: Callable[..., Array] = dot_product_attention
    decode: bool = False
    normalize_qk: bool = False
    force_fp32_for_softmax: bool = False
    qkv_dot_general: DotGeneral | None = None
    out_dot_general: DotGeneral | None = None
    qkv_dot_general_cls: Any = None
    out_dot_general_cls: Any = None
    qk_attn_weights_einsum_cls: Callable[..., EinsumFunction] | None = None
    attn_weights_value_einsum_cls: Callable[..., EinsumFunction] | None = None

    @compact
    def __call__(
        self,
        inputs_q: Array,
        inputs_k: Array | None = None,
        inputs_v: Array | None = None,
        *,
        inputs_kv: Array | None = None,
        mask: Array | None = None,
        deterministic: bool | None = None,
        dropout_rng: jax.Array | None = None,
        sow_weights: bool = False,
    ) -> Array:
        """Attend from ``inputs_q`` [batch..., queries, features] to ``inputs_k``, ``inputs_v`` [batch..., keys, ...].

        Keys default to the queries' input, values to the keys'. ``sow_weights`` sows the attention weights.
        """
        inputs_k, inputs_v = _key_value_inputs(inputs_q, inputs_k, inputs_v, inputs_kv)
        qkv_features = self.qkv_features or inputs_q.shape[-1]
        if qkv_features % self.num_heads:
            raise ValueError(f"The {qkv_features} features must be divisible by number of heads, {self.num_heads}.")
        project = functools.partial(
            self._dense,
            features=(self.num_heads, qkv_features // self.num_heads),
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            dot_general=self.qkv_dot_general,
            dot_general_cls=self.qkv_dot_general_cls,
        )
        query, key, value = (
            project(name="query")(inputs_q),
            project(name="key")(inputs_k),
            project(name="value")(inputs_v),
        )
        if self.normalize_qk:
            norm = functools.partial(LayerNorm, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
            query, key = norm(name="query_ln")(query), norm(name="key_ln")(key)
        if self.decode:
            key, value, mask = self._cached(key, value, mask)
        x = self._attend(query, key, value, mask, deterministic, dropout_rng, sow_weights)
        return self._dense(
            features=self.out_features or inputs_q.shape[-1],
            axis=(-2, -1),
            kernel_init=self.out_kernel_init or self.kernel_init,
            bias_init=self.out_bias_init or self.bias_init,
            dot_general=self.out_dot_general,
            dot_general_cls=self.out_dot_general_cls,
            name="out",
        )(x)

    @nowrap
    def _dense(self, **options: Any) -> DenseGeneral:
        return DenseGeneral(
            use_bias=self.use_bias, dtype=self.dtype, param_dtype=self.param_dtype, precision=self.precision, **options
        )

    @nowrap
    def _attend(
        self,
        query: Array,
        key: Array,
        value: Array,
        mask: Array | None,
        deterministic: bool | None,
        dropout_rng: jax.Array | None,
        sow_weights: bool,
    ) -> Array:
        deterministic = self.dropout_rate == 0.0 or merge_param("deterministic", self.deterministic, deterministic)
        if not deterministic and dropout_rng is None:
            dropout_rng = self.make_rng("dropout")
        weights_einsum, value_einsum = self.qk_attn_weights_einsum_cls, self.attn_weights_value_einsum_cls
        offered = {
            "mask": mask,
            "dropout_rng": dropout_rng,
            "dropout_rate": self.dropout_rate,
            "broadcast_dropout": self.broadcast_dropout,
            "deterministic": deterministic,
            "dtype": self.dtype,
            "precision": self.precision,
            "force_fp32_for_softmax": self.force_fp32_for_softmax,
            "qk_attn_weights_einsum": weights_einsum and weights_einsum(),
            "attn_weights_value_einsum": value_einsum and value_einsum(),
        }
        taken = inspect.signature(self.attention_fn).parameters
        options: dict[str, Any] = {name: option for name, option in offered.items() if name in taken}
        if sow_weights:
            options["module"] = self
        return self.attention_fn(query, key, value, **options)

    @nowrap
    def _cached(self, key: Array, value: Array, mask: Array | None) -> tuple[Array, Array, Array | None]:
        """Put one token's key and value into the cache; all of them, and the mask of those before and at it."""
        is_initialized = self.has_variable("cache", "cached_key")
        cached_key = self.variable("cache", "cached_key", jnp.zeros, key.shape, key.dtype)
        cached_value = self.variable("cache", "cached_value", jnp.zeros, value.shape, value.dtype)
        cache_index = self.variable("cache", "cache_index", lambda: jnp.array(0, jnp.int32))
        if not is_initialized:
            return key, value, mask
        key, value, seen = cache_step(cached_key.value, cached_value.value, cache_index.value, key, value)
        cached_key.value, cached_value.value, cache_index.value = key, value, cache_index.value + 1
        return key, value, combine_masks(mask, seen)


def _key_value_inputs(
    inputs_q: Array, inputs_k: Array | None, inputs_v: Array | None, inputs_kv: Array | None
) -> tuple[Array, Array]:
    if inputs_kv is not None:
        if inputs_k is not None or inputs_v is not None:
            raise ValueError(
                "If either `inputs_k` or `inputs_v` is not None, `inputs_kv` must be None. Pass inputs_k and inputs_v."
            )
        warnings.warn(
            "The inputs_kv arg will be deprecated soon. Pass it as inputs_k.", DeprecationWarning, stacklevel=4
        )
        return inputs_kv, inputs_kv
    if inputs_k is None:
        if inputs_v is not None:
            raise ValueError("`inputs_k` cannot be None if `inputs_v` is not None. For both the same, pass inputs_k.")
        inputs_k = inputs_q
    if inputs_v is None:
        return inputs_k, inputs_k
    if inputs_v.shape[-1] == inputs_v.shape[-2]:
        warnings.warn(
            f"inputs_v has the shape {inputs_v.shape}, which looks like a mask's. Pass a mask as mask=…: the function "
            "signature of MultiHeadDotProductAttention's `__call__` method has changed.",
            DeprecationWarning,
            stacklevel=4,
        )
    return inputs_k, inputs_v


class MultiHeadAttention(MultiHeadDotProductAttention):
    """The same as ``MultiHeadDotProductAttention``."""


class SelfAttention(MultiHeadDotProductAttention):
    """``MultiHeadDotProductAttention`` of one input to itself; use that one in new code."""

    @compact
    def __call__(  # type: ignore[override]
        self,
        inputs_q: Array,
        mask: Array | None = None,
        deterministic: bool | None = None,
        dropout_rng: jax.Array | None = None,
        sow_weights: bool = False,
    ) -> Array:
        """Attend from ``inputs_q`` to itself."""
        warnings.warn(
            "SelfAttention will be deprecated soon. Use `MultiHeadDotProductAttention.__call__(inputs_q)` instead.",
            DeprecationWarning,
            stacklevel=2,
        )
        return super().__call__(
            inputs_q, mask=mask, deterministic=deterministic, dropout_rng=dropout_rng, sow_weights=sow_weights
        )
