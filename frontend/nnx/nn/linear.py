"""Linear layers: ``Linear``, ``LinearGeneral``, ``Einsum`` and ``Embed``; and the convolutions' names.

They share these arguments of constructors:

* ``use_bias``: add a bias.
* ``dtype``: compute in this dtype; by default in the one that input and parameters promote to.
* ``param_dtype``: dtype of the parameters.
* ``precision``: of products, as for ``jax.lax.dot_general``.
* ``kernel_init``, ``bias_init``: initialisers ``(key, shape, dtype)``.
* ``promote_dtype``: brings a tuple of input and parameters to ``dtype``.
* ``preferred_element_type``: dtype to accumulate in and to return.
* ``rngs``: the stream ``params`` gives the keys of the initialisers.
* ``kernel_metadata``, ``bias_metadata``: metadata of the parameters, such as ``out_sharding``.

and ``out_sharding`` of calls: the sharding of the result, on a mesh with explicit axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from distaff.frontend.core.frozen_dict import FrozenDict
from distaff.frontend.core.initializer_shapes import ignores_key
from distaff.frontend.layers.convolution import canonicalize_padding as canonicalize_padding
from distaff.frontend.layers.fields import (
    DotGeneral,
    Initializer,
    PrecisionLike,
    PromoteDtype,
    as_tuple,
    axes_from_front,
)
from distaff.frontend.layers.initializers import default_kernel_init as default_kernel_init
from distaff.frontend.layers.initializers import variance_scaling, zeros
from distaff.frontend.layers.linear import check_equation, kernel_axes_of_result, look_up, project
from distaff.frontend.nnx.module import Module
from distaff.frontend.nnx.nn.convolution import Conv as Conv
from distaff.frontend.nnx.nn.convolution import ConvTranspose as ConvTranspose
from distaff.frontend.nnx.nn.dtypes import Array, Dtype, promote_dtype
from distaff.frontend.nnx.nn.fields import (
    NO_METADATA,
    Metadata,
    first_from,
    given,
    missing,
    optional_parameter,
    parameter,
    value_of,
)
from distaff.frontend.nnx.rngs import Rngs
from distaff.frontend.nnx.variable_metadata import VariableMetadata

default_bias_init = zeros
default_embed_init = variance_scaling(1.0, "fan_in", "normal", out_axis=0)


class Linear(Module):
    """``y = x @ kernel + bias`` over the last axis of ``x`` [..., in_features], to [..., out_features].

    Attributes:
        kernel: ``Param`` [in_features, out_features].
        bias: ``Param`` [out_features], or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        dot_general: DotGeneral = lax.dot_general,
        promote_dtype: PromoteDtype = promote_dtype,
        preferred_element_type: Dtype | None = None,
        rngs: Rngs,
        kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Make the parameters. ``dot_general`` replaces ``jax.lax.dot_general``; others: see the module."""
        self.kernel = parameter(rngs, kernel_init, (in_features, out_features), param_dtype, kernel_metadata)
        self.bias = optional_parameter(use_bias, rngs, bias_init, (out_features,), param_dtype, bias_metadata)
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.dot_general = dot_general
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Apply the layer to ``inputs`` [..., in_features]."""
        arrays = (inputs, self.kernel[...], value_of(self.bias))
        inputs, kernel, bias = self.promote_dtype(arrays, dtype=self.dtype)
        options = given(out_sharding=out_sharding, preferred_element_type=self.preferred_element_type)
        axis = (inputs.ndim - 1,)
        return project(inputs, kernel, bias, axis, (), self.dot_general, precision=self.precision, **options)


class LinearGeneral(Module):
    """A linear layer over several axes, to several axes, optionally a separate one for each index of batch axes.

    For ``x`` [batch_axis..., others..., axis...] the output is [batch_axis..., others..., out_features...].

    Attributes:
        kernel: ``Param`` [batch_axis..., in_features..., out_features...].
        bias: ``Param`` [batch_axis..., out_features...], or None.
    """

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        *,
        axis: int | Sequence[int] = -1,
        batch_axis: Mapping[int, int] = FrozenDict({}),
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        precision: PrecisionLike = None,
        promote_dtype: PromoteDtype = promote_dtype,
        dot_general: DotGeneral | None = None,
        dot_general_cls: Any = None,
        preferred_element_type: Dtype | None = None,
        rngs: Rngs,
        kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Make the parameters.

        Args:
            in_features, out_features: sizes of the axes that are contracted and of those that come in their place.
            axis: the axes that are contracted.
            batch_axis: the leading axes with a kernel of their own for each index, and their sizes.
            kernel_init, bias_init: called with the shape flattened to [inputs, features] and [features].
            dot_general: replaces ``jax.lax.dot_general``.
            dot_general_cls: makes such a replacement, anew in every call; goes before ``dot_general``.
            others: see the module.

        Raises:
            ValueError: ``axis`` is not as long as ``in_features``, or ``batch_axis`` are not the leading axes.
        """
        self.in_features = as_tuple(in_features)
        self.out_features = as_tuple(out_features)
        self.axis = as_tuple(axis)
        self.batch_axis: FrozenDict[int, int] = FrozenDict(batch_axis)
        if len(self.in_features) != len(self.axis):
            raise ValueError(f"in_features and axis must have the same length. Got {self.in_features} and {self.axis}.")
        if set(batch_axis) != set(range(len(batch_axis))):
            raise ValueError(f"batch_dims {tuple(batch_axis)} must be consecutive leading dimensions starting from 0.")
        batch_shape = tuple(batch_axis.values())
        kernel_shape = (*batch_shape, *self.in_features, *self.out_features)
        features = math.prod(self.out_features)
        flat_shape = (math.prod(batch_shape) * math.prod(self.in_features), features)
        kernel_init = _flattened(kernel_init, flat_shape, kernel_shape)
        self.kernel = parameter(rngs, kernel_init, kernel_shape, param_dtype, kernel_metadata)
        bias_shape = (*batch_shape, *self.out_features)
        bias_init = _flattened(bias_init, (math.prod(bias_shape),), bias_shape)
        self.bias = optional_parameter(use_bias, rngs, bias_init, bias_shape, param_dtype, bias_metadata)
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.dot_general = dot_general
        self.dot_general_cls = dot_general_cls
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Apply the layer to ``inputs`` [batch_axis..., others and axis...]."""
        arrays = (inputs, self.kernel[...], value_of(self.bias))
        inputs, kernel, bias = self.promote_dtype(arrays, dtype=self.dtype)
        axis, batch_axis = axes_from_front(self.axis, inputs.ndim), tuple(range(len(self.batch_axis)))
        dot_general = self.dot_general_cls() if self.dot_general_cls else self.dot_general or lax.dot_general
        options = given(out_sharding=out_sharding, preferred_element_type=self.preferred_element_type)
        return project(inputs, kernel, bias, axis, batch_axis, dot_general, precision=self.precision, **options)


def _flattened(init: Initializer, flat_shape: tuple[int, ...], shape: tuple[int, ...]) -> Initializer:
    """``init`` for an array of ``shape`` that is initialised as one of ``flat_shape``, with the fans of that."""
    if shape == flat_shape or ignores_key(init):  # those have no fans
        return init

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: Dtype) -> Any:
        value = init(key, flat_shape, dtype)
        if isinstance(value, VariableMetadata):
            value.raw_value = jnp.reshape(value.raw_value, shape)
            return value
        return jnp.reshape(value, shape)

    return initialize


class Einsum(Module):
    """``y = einsum(einsum_str, x, kernel) + bias``.

    Attributes:
        kernel: ``Param`` of ``kernel_shape``.
        bias: ``Param`` of ``bias_shape``, or None.
    """

    def __init__(
        self,
        einsum_str: str,
        kernel_shape: int | Sequence[int],
        bias_shape: int | Sequence[int] | None = None,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        promote_dtype: PromoteDtype = promote_dtype,
        einsum_op: Callable[..., Array] = jnp.einsum,
        preferred_element_type: Dtype | None = None,
        rngs: Rngs,
        kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Make the parameters.

        Args:
            einsum_str: the equation, with "->" and two operands.
            kernel_shape: shape of the kernel.
            bias_shape: shape of the bias: the axes of the output that come from the kernel. None: no bias.
            einsum_op: replaces ``jax.numpy.einsum``.
            others: see the module.

        Raises:
            ValueError: the equation does not have the form "…,…->…".
        """
        self.einsum_str = check_equation(einsum_str)
        self.kernel = parameter(rngs, kernel_init, as_tuple(kernel_shape), param_dtype, kernel_metadata)
        has_bias, shape = bias_shape is not None, as_tuple(() if bias_shape is None else bias_shape)
        self.bias = optional_parameter(has_bias, rngs, bias_init, shape, param_dtype, bias_metadata)
        self.kernel_shape = kernel_shape
        self.bias_shape = bias_shape
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.promote_dtype = promote_dtype
        self.einsum_op = einsum_op
        self.preferred_element_type = preferred_element_type

    def __call__(self, inputs: Array, einsum_str: str | None = None, out_sharding: Any = None) -> Array:
        """Apply the layer; ``einsum_str`` goes before the constructor's.

        Raises:
            ValueError: the equation does not have the form "…,…->…".
        """
        equation = check_equation(first_from(einsum_str, self.einsum_str, error_msg=missing(self, "einsum_str")))
        arrays = (inputs, self.kernel[...], value_of(self.bias))
        inputs, kernel, bias = self.promote_dtype(arrays, dtype=self.dtype)
        options = given(out_sharding=out_sharding, preferred_element_type=self.preferred_element_type)
        y = self.einsum_op(equation, inputs, kernel, precision=self.precision, **options)
        if bias is None:
            return y
        shape = kernel_axes_of_result(equation, inputs.ndim, kernel.shape)
        return y + jnp.reshape(bias, tuple(1 if size is None else size for size in shape))


class Embed(Module):
    """A table of vectors, looked up by integers of any shape: [...] to [..., features].

    Attributes:
        embedding: ``Param`` [num_embeddings, features].
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        embedding_init: Initializer = default_embed_init,
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: Rngs,
        embedding_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Make the table.

        Args:
            num_embeddings: number of vectors. Indices out of range give NaN.
            features: size of each.
            dtype: of the output; by default that of the table.
            embedding_init, embedding_metadata: initialiser and metadata of the table.
            others: see the module.
        """
        self.embedding = parameter(rngs, embedding_init, (num_embeddings, features), param_dtype, embedding_metadata)
        self.num_embeddings = num_embeddings
        self.features = features
        self.dtype = dtype or self.embedding.dtype
        self.param_dtype = param_dtype
        self.promote_dtype = promote_dtype

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """The vectors at the integers ``inputs``; ValueError if they are not integers."""
        (embedding,) = self.promote_dtype((self.embedding[...],), dtype=self.dtype, inexact=False)
        return look_up(embedding, inputs, out_sharding)

    def attend(self, query: Array, out_sharding: Any = None) -> Array:
        """Logits [..., num_embeddings] of ``query`` [..., features]: its products with all vectors (tied weights)."""
        query, embedding = self.promote_dtype((query, self.embedding[...]), dtype=self.dtype)
        return jnp.dot(query, embedding.T, **given(out_sharding=out_sharding))
