"""Convolutions: ``Conv``, ``ConvLocal`` and ``ConvTranspose``.

Inputs are [batch..., spatial..., channels] with as many spatial axes as the kernel has; there may be any number of
batch axes, also none. They share these fields:

* ``features``: channels of the output.
* ``kernel_size``: of each spatial axis; an integer stands for one axis.
* ``padding``: "SAME", "VALID", "CIRCULAR", or an integer, one integer an axis or one ``(low, high)`` pair an axis.
* ``use_bias``, ``dtype``, ``param_dtype``, ``precision``, ``kernel_init``, ``bias_init``, ``promote_dtype``: as for
  ``Dense``.
* ``mask``: of the kernel's shape; multiplies the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
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
from distaff.frontend.linen import initializers
from distaff.frontend.linen.class_transform import compact, nowrap
from distaff.frontend.linen.dtypes import Array, Dtype, promote_dtype
from distaff.frontend.linen.initializers import default_kernel_init
from distaff.frontend.linen.module import Module


def _kernel_and_bias(
    layer: _Convolution | ConvTranspose, kernel_shape: tuple[int, ...], bias_shape: tuple[int, ...]
) -> tuple[Array, Array | None]:
    """The layer's parameters, the kernel masked; ValueError if the mask has another shape."""
    kernel = masked(layer.param("kernel", layer.kernel_init, kernel_shape, layer.param_dtype), layer.mask)
    bias = layer.param("bias", layer.bias_init, bias_shape, layer.param_dtype) if layer.use_bias else None
    return kernel, bias


class _Convolution(Module):
    """``Conv`` and ``ConvLocal``, which differ in their parameters' shapes and in the operation."""

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] | None = 1
    padding: Padding = "SAME"
    input_dilation: int | Sequence[int] | None = 1
    kernel_dilation: int | Sequence[int] | None = 1
    feature_group_count: int = 1
    use_bias: bool = True
    mask: Array | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer = initializers.zeros
    promote_dtype: PromoteDtype = promote_dtype
    conv_general_dilated: Callable[..., Array] | None = None
    conv_general_dilated_cls: Any = None

    @compact
    def __call__(self, inputs: Array) -> Array:
        """Convolve ``inputs`` [batch..., spatial..., channels]; ValueError if a field does not fit the input."""
        kernel_size = as_tuple(self.kernel_size)
        window = Window(kernel_size, self.strides, self.padding, self.input_dilation, self.kernel_dilation)
        inputs, batch = with_one_batch_axis(inputs, len(kernel_size))
        return with_batch_axes(self._convolve(*window.padded(inputs), kernel_size), batch)

    @nowrap
    def _operation(self) -> Callable[..., Array]:
        """``lax.conv_general_dilated`` or what replaces it."""
        if self.conv_general_dilated_cls is not None:
            return self.conv_general_dilated_cls()  # type: ignore[no-any-return]
        return self.conv_general_dilated or lax.conv_general_dilated

    @nowrap
    def _convolve(self, inputs: Array, window: dict[str, Any], kernel_size: tuple[int, ...]) -> Array:
        raise NotImplementedError


class Conv(_Convolution):
    """A convolution.

    Parameters: ``kernel`` [kernel_size..., channels / feature_group_count, features], ``bias`` [features].

    Args:
        strides: step of the window along each axis; here and below one integer or one an axis.
        padding: also "REFLECT", and "CAUSAL" for kernels with one spatial axis.
        input_dilation: steps between elements of the input, with zeros between them.
        kernel_dilation: steps between elements of the kernel.
        feature_group_count: splits the channels into groups that are convolved apart.
        conv_general_dilated, conv_general_dilated_cls: replace ``lax.conv_general_dilated``, as ``Dense`` has it for
            ``dot_general``.
        others: see the module.
    """

    @nowrap
    def _convolve(self, inputs: Array, window: dict[str, Any], kernel_size: tuple[int, ...]) -> Array:
        channels, groups = inputs.shape[-1], self.feature_group_count
        check_groups(channels, groups)
        kernel, bias = _kernel_and_bias(self, (*kernel_size, channels // groups, self.features), (self.features,))
        inputs, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        options = {"feature_group_count": groups, "precision": self.precision}
        return convolve(inputs, kernel, bias, window, self._operation(), **options)


class ConvLocal(_Convolution):
    """A convolution with a kernel of its own at each place of the output.

    Parameters: ``kernel`` [output spatial..., kernel elements × channels, features], ``bias`` [output spatial...,
    features].

    Args:
        strides, input_dilation, kernel_dilation: as for ``Conv``.
        feature_group_count: must be 1; NotImplementedError otherwise.
        others: see the module.
    """

    @nowrap
    def _convolve(self, inputs: Array, window: dict[str, Any], kernel_size: tuple[int, ...]) -> Array:
        if self.feature_group_count != 1:
            raise NotImplementedError(f"ConvLocal has no feature groups, got {self.feature_group_count=}.")
        channels = inputs.shape[-1]
        shared = jax.ShapeDtypeStruct((*kernel_size, channels, self.features), inputs.dtype)
        operation = self._operation()
        out_shape = jax.eval_shape(lambda lhs, rhs: operation(lhs=lhs, rhs=rhs, **window), inputs, shared).shape[1:]
        kernel_shape = (*out_shape[:-1], math.prod(kernel_size) * channels, self.features)
        kernel, bias = _kernel_and_bias(self, kernel_shape, out_shape)
        inputs, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        y = lax.conv_general_dilated_local(inputs, kernel, filter_shape=kernel_size, precision=self.precision, **window)
        return y if bias is None else y + bias[None]


class ConvTranspose(Module):
    """A transposed convolution, as ``jax.lax.conv_transpose``.

    Parameters: ``kernel`` [kernel_size..., channels, features], or [kernel_size..., features, channels] with
    ``transpose_kernel``; ``bias`` [features].

    Args:
        strides: factor by which each spatial axis grows.
        kernel_dilation: steps between elements of the kernel.
        transpose_kernel: flip the kernel's spatial axes and swap the others, so that the layer is the transpose of a
            ``Conv`` with the same kernel.
        preferred_element_type: dtype to accumulate in and to return.
        others: see the module.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: Sequence[int] | None = None
    padding: Padding = "SAME"
    kernel_dilation: Sequence[int] | None = None
    use_bias: bool = True
    mask: Array | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer = initializers.zeros
    transpose_kernel: bool = False
    promote_dtype: PromoteDtype = promote_dtype
    preferred_element_type: Dtype | None = None

    @compact
    def __call__(self, inputs: Array) -> Array:
        """Convolve ``inputs`` [batch..., spatial..., channels]; ValueError if a field does not fit the input."""
        channels = (inputs.shape[-1], self.features)
        kernel_shape = (*as_tuple(self.kernel_size), *(reversed(channels) if self.transpose_kernel else channels))
        kernel, bias = _kernel_and_bias(self, kernel_shape, (self.features,))
        inputs, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
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
