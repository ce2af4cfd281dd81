"""Linear layers: ``Dense``, ``DenseGeneral``, ``Einsum`` and ``Embed``; and the convolutions' names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from distaff.frontend.core.initializer_shapes import makes_requested_shape
from distaff.frontend.layers.convolution import canonicalize_padding as canonicalize_padding
from distaff.frontend.layers.fields import Axes, DotGeneral, Initializer, PrecisionLike, as_tuple, axes_from_front
from distaff.frontend.layers.linear import check_equation, kernel_axes_of_result, look_up, project
from distaff.frontend.linen import initializers
from distaff.frontend.linen.class_transform import compact
from distaff.frontend.linen.convolution import Conv as Conv
from distaff.frontend.linen.convolution import ConvLocal as ConvLocal
from distaff.frontend.linen.convolution import ConvTranspose as ConvTranspose
from distaff.frontend.linen.dtypes import Array, Dtype, promote_dtype
from distaff.frontend.linen.initializers import default_kernel_init as default_kernel_init
from distaff.frontend.linen.module import Module, merge_param

default_embed_init = initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)


class Dense(Module):
    """``y = x @ kernel + bias`` over the last axis of ``x`` [..., inputs], to [..., features].

    Parameters: ``kernel`` [inputs, features], ``bias`` [features].

    Args:
        features: size of the last axis of the output.
        use_bias: add a bias.
        dtype: computes in this dtype; by default in the one that input and parameters promote to.
        param_dtype: dtype of the parameters.
        precision: of the product, as for ``jax.lax.dot_general``.
        kernel_init, bias_init: initialisers ``(key, shape, dtype)``.
        promote_dtype: brings input and parameters to ``dtype``.
        dot_general: replaces ``jax.lax.dot_general``.
        dot_general_cls: makes such a replacement, anew in every call; goes before ``dot_general``.
    """

    features: int
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer = initializers.zeros
    promote_dtype: Callable[..., list[Any]] = promote_dtype
    dot_general: DotGeneral | None = None
    dot_general_cls: Any = None

    @compact
    def __call__(self, inputs: Array) -> Array:
        """Apply the layer to ``inputs`` [..., inputs]."""
        return _project(self, inputs, (self.features,), axis=(inputs.ndim - 1,), batch_dims=())


class DenseGeneral(Module):
    """A linear layer over several axes, to several axes, optionally a separate one for each index of batch axes.

    For ``x`` [batch_dims..., others..., axis...] the output is [batch_dims..., others..., features...]. Parameters:
    ``kernel`` [batch_dims..., axis..., features...], ``bias`` [batch_dims..., features...].

    Args:
        features: size or sizes of the output axes.
        axis: axis or axes that are contracted.
        batch_dims: leading axes with a kernel of their own for each index.
        use_bias, dtype, param_dtype, precision, promote_dtype, dot_general, dot_general_cls: as for ``Dense``.
        kernel_init, bias_init: initialisers; called with the shape flattened to [inputs, features] and [features].
    """

    features: int | Sequence[int]
    axis: Axes = -1
    batch_dims: Sequence[int] = ()
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer = initializers.zeros
    precision: PrecisionLike = None
    promote_dtype: Callable[..., list[Any]] = promote_dtype
    dot_general: DotGeneral | None = None
    dot_general_cls: Any = None

    @compact
    def __call__(self, inputs: Array) -> Array:
        """Apply the layer; ValueError if ``batch_dims`` are not the leading axes."""
        batch_dims = axes_from_front(self.batch_dims, inputs.ndim)
        if batch_dims != tuple(range(len(batch_dims))):
            raise ValueError(f"batch_dims {self.batch_dims} must be consecutive leading dimensions starting from 0.")
        axis = axes_from_front(self.axis, inputs.ndim)
        return _project(self, inputs, as_tuple(self.features), axis, batch_dims)


def _project(
    layer: Dense | DenseGeneral,
    inputs: Array,
    features: tuple[int, ...],
    axis: tuple[int, ...],
    batch_dims: tuple[int, ...],
) -> Array:
    """Contract ``axis`` of the input with the layer's kernel, apart for each index of ``batch_dims``; add its bias."""
    batch_shape = inputs.shape[: len(batch_dims)]
    input_sizes = (*batch_shape, *(inputs.shape[i] for i in axis))
    flat_features = math.prod(features)
    kernel_init = _flattened(layer.kernel_init, (math.prod(input_sizes), flat_features), (*input_sizes, *features))
    kernel = layer.param("kernel", kernel_init, (*input_sizes, *features), layer.param_dtype)
    bias = None
    if layer.use_bias:
        bias_shape = (*batch_shape, *features)
        bias_init = _flattened(layer.bias_init, (math.prod(bias_shape),), bias_shape)
        bias = layer.param("bias", bias_init, bias_shape, layer.param_dtype)
    inputs, kernel, bias = layer.promote_dtype(inputs, kernel, bias, dtype=layer.dtype)

    dot_general = layer.dot_general_cls() if layer.dot_general_cls else layer.dot_general or lax.dot_general
    return project(inputs, kernel, bias, axis, batch_dims, dot_general, precision=layer.precision)


def _flattened(init_fn: Initializer, flat_shape: tuple[int, ...], shape: tuple[int, ...]) -> Initializer:
    """``init_fn`` for an array of ``shape`` that is initialised as one of ``flat_shape``, with the fans of that."""
    if shape == flat_shape:
        return init_fn

    @makes_requested_shape
    def init(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Any:
        # The value is the one leaf, be it in a box or not; a box's names are those of the axes of ``shape``.
        return jax.tree.map(lambda value: jnp.reshape(value, shape), init_fn(key, flat_shape, dtype))

    return init


class Einsum(Module):
    """``y = einsum(einsum_str, x, kernel) + bias``.

    Parameters: ``kernel`` of ``shape``; ``bias`` with the axes of the output that come from the kernel.

    Args:
        shape: shape of the kernel.
        einsum_str: the equation, with "->" and two operands; may be passed to the call instead.
        use_bias, dtype, param_dtype, precision, kernel_init, bias_init, promote_dtype: as for ``Dense``.
        preferred_element_type: dtype to accumulate in and to return.
    """

    shape: Sequence[int]
    einsum_str: str | None = None
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer = initializers.zeros
    promote_dtype: Callable[..., list[Any]] = promote_dtype
    preferred_element_type: Dtype | None = None

    @compact
    def __call__(self, inputs: Array, einsum_str: str | None = None) -> Array:
        """Apply the layer; ValueError if the equation does not have the form "…,…->…"."""
        equation = check_equation(merge_param("einsum_str", self.einsum_str, einsum_str))
        kernel = self.param("kernel", self.kernel_init, self.shape, self.param_dtype)
        bias, broadcast_shape = None, None
        if self.use_bias:
            broadcast_shape = kernel_axes_of_result(equation, inputs.ndim, kernel.shape)
            bias_shape = tuple(size for size in broadcast_shape if size is not None)
            bias = self.param("bias", self.bias_init, bias_shape, self.param_dtype)
        inputs, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        y = jnp.einsum(
            equation, inputs, kernel, precision=self.precision, preferred_element_type=self.preferred_element_type
        )
        if broadcast_shape is not None:
            y += jnp.reshape(bias, tuple(1 if size is None else size for size in broadcast_shape))
        return y


class Embed(Module):
    """A table of vectors, looked up by integers of any shape: [...] to [..., features].

    Parameters: ``embedding`` [num_embeddings, features].

    Args:
        num_embeddings: number of vectors. Indices out of range give NaN.
        features: size of each.
        dtype: of the output; by default that of the table.
        param_dtype: dtype of the table.
        embedding_init: initialiser ``(key, shape, dtype)``.
        promote_dtype: as for ``Dense``.
    """

    num_embeddings: int
    features: int
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    embedding_init: Initializer = default_embed_init
    promote_dtype: Callable[..., list[Any]] = promote_dtype

    def setup(self) -> None:
        """Declare the table."""
        shape = (self.num_embeddings, self.features)
        self.embedding = self.param("embedding", self.embedding_init, shape, self.param_dtype)

    def __call__(self, inputs: Array) -> Array:
        """The vectors at the integers ``inputs``; ValueError if they are not integers."""
        (embedding,) = self.promote_dtype(self.embedding, dtype=self.dtype, inexact=False)
        return look_up(embedding, inputs)

    def attend(self, query: Array) -> Array:
        """Logits [..., num_embeddings] of ``query`` [..., features]: its products with all vectors (tied weights)."""
        query, embedding = self.promote_dtype(query, self.embedding, dtype=self.dtype)
        return jnp.dot(query, embedding.T)
