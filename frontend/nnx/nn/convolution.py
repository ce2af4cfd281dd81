"""Convolutions: ``Conv`` and ``ConvTranspose``.

Inputs are [batch..., spatial..., channels] with as many spatial axes as the kernel has; there may be any number of
batch axes, also none. They share these arguments of constructors:

* ``in_features``, ``out_features``: channels of the input and of the output.
* ``kernel_size``: of each spatial axis; an integer stands for one axis.
* ``padding``: "SAME", "VALID", "CIRCULAR", or an integer, one integer an axis or one ``(low, high)`` pair an axis.
* ``mask``: of the kernel's shape; multiplies the kernel.
* others: as for ``Linear``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from distaff.frontend.layers.convolution import (
    Padding,
    Window,
    check_groups,
    convolve,
    convolve_transposed,
    masked,
    with_batch_axes,
    with_one_batch_axis,
)
from distaff.frontend.layers.fields import Initializer, PrecisionLike, PromoteDtype, as_tuple
from distaff.frontend.layers.initializers import default_kernel_init, zeros
from distaff.frontend.nnx.module import Module
from distaff.frontend.nnx.nn.dtypes import Array, Dtype, promote_dtype
from distaff.frontend.nnx.nn.fields import NO_METADATA, Metadata, given, optional_parameter, parameter, value_of
from distaff.frontend.nnx.rngs import Rngs


class Conv(Module):
    """A convolution.

    Attributes:
        kernel: ``Param`` [kernel_size..., in_features / feature_group_count, out_features].
        bias: ``Param`` [out_features], or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: Padding = "SAME",
        input_dilation: int | Sequence[int] | None = 1,
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        mask: Array | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = zeros,
        conv_general_dilated: Callable[..., Array] = lax.conv_general_dilated,
        promote_dtype: PromoteDtype = promote_dtype,
        preferred_element_type: Dtype | None = None,
        rngs: Rngs,
        kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Make the parameters.

        Args:
            strides: step of the window along each axis; here and below one integer or one an axis.
            padding: also "REFLECT", and "CAUSAL" for kernels with one spatial axis.
            input_dilation: steps between elements of the input, with zeros between them.
            kernel_dilation: steps between elements of the kernel.
            feature_group_count: splits the channels into groups that are convolved apart.
            conv_general_dilated: replaces ``jax.lax.conv_general_dilated``.
            others: see the module.

        Raises:
            ValueError: ``feature_group_count`` does not divide ``in_features``.
        """
        check_groups(in_features, feature_group_count)
        self.kernel_size = as_tuple(kernel_size)
        self.kernel_shape = (*self.kernel_size, in_features // feature_group_count, out_features)
        self.kernel = parameter(rngs, kernel_init, self.kernel_shape, param_dtype, kernel_metadata)
        self.bias = optional_parameter(use_bias, rngs, bias_init, (out_features,), param_dtype, bias_metadata)
        self.in_features = in_features
        self.out_features = out_features
        self.strides = strides
        self.padding = padding
        self.input_dilation = input_dilation
        self.kernel_dilation = kernel_dilation
        self.feature_group_count = feature_group_count
        self.use_bias = use_bias
        self.mask = mask
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.conv_general_dilated = conv_general_dilated
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Convolve ``inputs`` [batch..., spatial..., in_features]; ValueError if an argument does not fit the input."""
        window = Window(self.kernel_size, self.strides, self.padding, self.input_dilation, self.kernel_dilation)
        inputs, batch = with_one_batch_axis(inputs, len(self.kernel_size))
        inputs, steps = window.padded(inputs)
        arrays = (inputs, masked(self.kernel[...], self.mask), value_of(self.bias))
        inputs, kernel, bias = self.promote_dtype(arrays, dtype=self.dtype)
        options = {"feature_group_count": self.feature_group_count, "precision": self.precision}
        options |= given(out_sharding=out_sharding, preferred_element_type=self.preferred_element_type)
        y = convolve(inputs, kernel, bias, steps, self.conv_general_dilated, **options)
        return with_batch_axes(y, batch)


class ConvTranspose(Module):
    """A transposed convolution, as ``jax.lax.conv_transpose``.

    Attributes:
        kernel: ``Param`` [kernel_size..., in_features, out_features], or [kernel_size..., out_features, in_features]
            with ``transpose_kernel``.
        bias: ``Param`` [out_features], or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = None,
        *,
        padding: Padding = "SAME",
        kernel_dilation: int | Sequence[int] | None = None,
        use_bias: bool = True,
        mask: Array | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike | None = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = zeros,
        transpose_kernel: bool = False,
        promote_dtype: PromoteDtype = promote_dtype,
        preferred_element_type: Dtype | None = None,
        rngs: Rngs,
        kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Make the parameters.

        Args:
            strides: factor by which each spatial axis grows.
            kernel_dilation: steps between elements of the kernel.
            transpose_kernel: flip the kernel's spatial axes and swap the others, so that the layer is the transpose of
                a ``Conv`` with the same kernel.
            others: see the module.
        """
        self.kernel_size = as_tuple(kernel_size)
        channels = (out_features, in_features) if transpose_kernel else (in_features, out_features)
        self.kernel_shape = (*self.kernel_size, *channels)
        self.kernel = parameter(rngs, kernel_init, self.kernel_shape, param_dtype, kernel_metadata)
        self.bias = optional_parameter(use_bias, rngs, bias_init, (out_features,), param_dtype, bias_metadata)
        self.in_features = in_features
        self.out_features = out_features
        self.strides = strides
        self.padding = padding
        self.kernel_dilation = kernel_dilation
        self.use_bias = use_bias
        self.mask = mask
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.transpose_kernel = transpose_kernel
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type

    def __call__(self, inputs: Array) -> Array:
        """Convolve ``inputs`` [batch..., spatial..., in_features]; ValueError if an argument does not fit the input."""
        arrays = (inputs, masked(self.kernel[...], self.mask), value_of(self.bias))
        inputs, kernel, bias = self.promote_dtype(arrays, dtype=self.dtype)
        return convolve_transposed(
            inputs,
            kernel,
            bias,
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.kernel_dilation,
            transpose_kernel=self.transpose_kernel,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )
