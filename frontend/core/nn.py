"""Layers as functions of a scope, for models written without modules: ``y = scope.child(nn.dense)(x, features)``.

Each is the Linen layer of the same name, with its parameters in the scope. Unlike those, they compute in float32 unless
told otherwise. Attention is in ``distaff.frontend.linen``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distaff.frontend import struct
from distaff.frontend.core.scope import Scope
from distaff.frontend.layers.fields import Axes, Initializer
from distaff.frontend.linen import activation as activation
from distaff.frontend.linen import convolution, initializers, linear, normalization
from distaff.frontend.linen.activation import celu as celu
from distaff.frontend.linen.activation import elu as elu
from distaff.frontend.linen.activation import gelu as gelu
from distaff.frontend.linen.activation import glu as glu
from distaff.frontend.linen.activation import leaky_relu as leaky_relu
from distaff.frontend.linen.activation import log_sigmoid as log_sigmoid
from distaff.frontend.linen.activation import log_softmax as log_softmax
from distaff.frontend.linen.activation import relu as relu
from distaff.frontend.linen.activation import sigmoid as sigmoid
from distaff.frontend.linen.activation import silu as silu
from distaff.frontend.linen.activation import soft_sign as soft_sign
from distaff.frontend.linen.activation import softmax as softmax
from distaff.frontend.linen.activation import softplus as softplus
from distaff.frontend.linen.activation import swish as swish
from distaff.frontend.linen.activation import tanh as tanh
from distaff.frontend.linen.pooling import avg_pool as avg_pool
from distaff.frontend.linen.pooling import max_pool as max_pool
from distaff.frontend.linen.stochastic import Dropout

Array = jax.Array


def dense(
    scope: Scope,
    inputs: Array,
    features: int,
    bias: bool = True,
    dtype: Any = jnp.float32,
    precision: Any = None,
    kernel_init: Initializer = linear.default_kernel_init,
    bias_init: Initializer = initializers.zeros,
) -> Array:
    """``x @ kernel + bias`` over the last axis."""
    layer = linear.Dense(
        features, bias, dtype, precision=precision, kernel_init=kernel_init, bias_init=bias_init, parent=scope
    )
    return layer(inputs)


def dense_general(
    scope: Scope,
    inputs: Array,
    features: int | Sequence[int],
    axis: Axes = -1,
    batch_dims: Sequence[int] = (),
    bias: bool = True,
    dtype: Any = jnp.float32,
    kernel_init: Initializer = linear.default_kernel_init,
    bias_init: Initializer = initializers.zeros,
    precision: Any = None,
) -> Array:
    """A product over several axes, into several; along ``batch_dims`` each index has a kernel of its own."""
    layer = linear.DenseGeneral(
        features, axis, batch_dims, bias, dtype, kernel_init=kernel_init, bias_init=bias_init, precision=precision,
        parent=scope,
    )  # fmt: skip
    return layer(inputs)


def conv(
    scope: Scope,
    inputs: Array,
    features: int,
    kernel_size: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Any = "SAME",
    input_dilation: Sequence[int] | None = None,
    kernel_dilation: Sequence[int] | None = None,
    feature_group_count: int = 1,
    bias: bool = True,
    dtype: Any = jnp.float32,
    precision: Any = None,
    kernel_init: Initializer = linear.default_kernel_init,
    bias_init: Initializer = initializers.zeros,
) -> Array:
    """A convolution of [batch, spatial axes..., channels]."""
    layer = convolution.Conv(
        features, kernel_size, strides, padding, input_dilation, kernel_dilation, feature_group_count, bias,
        dtype=dtype, precision=precision, kernel_init=kernel_init, bias_init=bias_init, parent=scope,
    )  # fmt: skip
    return layer(inputs)


def conv_transpose(
    scope: Scope,
    inputs: Array,
    features: int,
    kernel_size: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Any = "SAME",
    kernel_dilation: Sequence[int] | None = None,
    bias: bool = True,
    dtype: Any = jnp.float32,
    precision: Any = None,
    kernel_init: Initializer = linear.default_kernel_init,
    bias_init: Initializer = initializers.zeros,
) -> Array:
    """A transposed convolution of [batch, spatial axes..., channels]."""
    layer = convolution.ConvTranspose(
        features, kernel_size, strides, padding, kernel_dilation, bias, dtype=dtype, precision=precision,
        kernel_init=kernel_init, bias_init=bias_init, parent=scope,
    )  # fmt: skip
    return layer(inputs)


@struct.dataclass
class Embedding:
    """A table of vectors [num_embeddings, features]."""

    table: Array

    def lookup(self, indices: Array) -> Array:
        """The vectors at ``indices``, of any shape; ValueError if they are not integers."""
        if not jnp.issubdtype(indices.dtype, jnp.integer):
            raise ValueError(f"Input type must be an integer or unsigned integer, got {indices.dtype}.")
        return self.table[indices]

    def attend(self, query: Array) -> Array:
        """The products of ``query`` [..., features] with all vectors."""
        return jnp.dot(query, self.table.T)


def embedding(
    scope: Scope, num_embeddings: int, features: int, init_fn: Initializer = linear.default_embed_init
) -> Embedding:
    """A table, the parameter ``table`` of the scope."""
    return Embedding(scope.param("table", init_fn, (num_embeddings, features)))


def batch_norm(
    scope: Scope,
    x: Array,
    use_running_average: bool = False,
    axis: Axes = -1,
    momentum: float = 0.99,
    epsilon: float = 1e-5,
    dtype: Any = jnp.float32,
    bias: bool = True,
    scale: bool = True,
    bias_init: Initializer = initializers.zeros,
    scale_init: Initializer = initializers.ones,
    axis_name: str | None = None,
    axis_index_groups: Any = None,
    kind: str = "batch_stats",
) -> Array:
    """Normalise by the statistics of the batch, or their running average, which is kept in ``batch_stats``.

    ``NotImplementedError``: another collection (``kind``).
    """
    if kind != "batch_stats":
        raise NotImplementedError(f"batch_norm keeps its averages in the collection batch_stats, not in {kind!r}.")
    layer = normalization.BatchNorm(
        use_running_average, axis, momentum, epsilon, dtype, use_bias=bias, use_scale=scale, bias_init=bias_init,
        scale_init=scale_init, axis_name=axis_name, axis_index_groups=axis_index_groups, parent=scope,
    )  # fmt: skip
    return layer(x)


def layer_norm(
    scope: Scope,
    x: Array,
    epsilon: float = 1e-6,
    dtype: Any = jnp.float32,
    bias: bool = True,
    scale: bool = True,
    bias_init: Initializer = initializers.zeros,
    scale_init: Initializer = initializers.ones,
) -> Array:
    """Normalise each vector of the last axis."""
    layer = normalization.LayerNorm(
        epsilon, dtype, use_bias=bias, use_scale=scale, bias_init=bias_init, scale_init=scale_init, parent=scope
    )
    return layer(x)


def group_norm(
    scope: Scope,
    x: Array,
    num_groups: int | None = 32,
    group_size: int | None = None,
    epsilon: float = 1e-6,
    dtype: Any = jnp.float32,
    bias: bool = True,
    scale: bool = True,
    bias_init: Initializer = initializers.zeros,
    scale_init: Initializer = initializers.ones,
) -> Array:
    """Normalise groups of channels. Its parameters have the rank of ``x``: [1, ..., channels]."""
    layer = normalization.GroupNorm(
        num_groups, group_size, epsilon, jnp.float32, use_bias=False, use_scale=False, parent=scope
    )
    y = layer(x)
    shape = (*(1,) * (x.ndim - 1), x.shape[-1])
    if scale:
        y = y * scope.param("scale", scale_init, shape)
    if bias:
        y = y + scope.param("bias", bias_init, shape)
    return y.astype(dtype)


def dropout(scope: Scope, inputs: Array, rate: float, deterministic: bool = False, rng: Array | None = None) -> Array:
    """Zero a random part ``rate`` of the elements and scale the others, with a key of the stream ``dropout``."""
    return Dropout(rate, parent=scope)(inputs, deterministic=deterministic, rng=rng)
