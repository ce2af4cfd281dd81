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
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from distaff.frontend.linen import initializers
from distaff.frontend.linen.class_transform import compact, nowrap
from distaff.frontend.linen.dtypes import Array, Dtype, promote_dtype
from distaff.frontend.linen.fields import Initializer, PrecisionLike, PromoteDtype, as_tuple
from distaff.frontend.linen.initializers import default_kernel_init
from distaff.frontend.linen.module import Module

Padding: TypeAlias = str | int | Sequence[int | tuple[int, int]]
# What lax takes.
LaxPadding: TypeAlias = str | list[tuple[int, int]]

_PAD_MODES = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


def _per_axis(value: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """One number for each spatial axis; None stands for 1."""
    return (1 if value is None else value,) * rank if value is None or isinstance(value, int) else tuple(value)


def canonicalize_padding(padding: Padding, rank: int) -> LaxPadding:
    """A padding as its name or one (low, high) pair for each of ``rank`` axes; ValueError if it is none."""
    if isinstance(padding, str):
        return padding
    pads = [padding] * rank if isinstance(padding, int) else list(padding)
    pairs = [(pad, pad) if isinstance(pad, int) else pad for pad in pads]
    if len(pairs) != rank or any(not isinstance(pair, tuple | list) or len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"Invalid padding format: {padding}, should be str, int, or a sequence of len {rank} where each element is "
            "an int or pair of ints."
        )
    return [(low, high) for low, high in pairs]


def _with_one_batch_axis(inputs: Array, rank: int) -> tuple[Array, tuple[int, ...]]:
    """The input with its batch axes made one, and their sizes."""
    if inputs.ndim <= rank:
        raise ValueError(
            f"A kernel of {rank} spatial axes needs an input [batch..., {rank} spatial axes, channels], got shape "
            f"{inputs.shape}."
        )
    batch = inputs.shape[: inputs.ndim - rank - 1]
    return inputs if len(batch) == 1 else inputs.reshape(math.prod(batch), *inputs.shape[len(batch) :]), batch


def _with_batch_axes(y: Array, batch: tuple[int, ...]) -> Array:
    """The inverse of ``_with_one_batch_axis``."""
    return y if len(batch) == 1 else y.reshape(*batch, *y.shape[1:])


def _kernel_and_bias(
    layer: _Convolution | ConvTranspose, kernel_shape: tuple[int, ...], bias_shape: tuple[int, ...]
) -> tuple[Array, Array | None]:
    """The layer's parameters, the kernel masked; ValueError if the mask has another shape."""
    if layer.mask is not None and layer.mask.shape != kernel_shape:
        raise ValueError(
            f"Mask needs to have the same shape as weights. Shapes are: {layer.mask.shape}, {kernel_shape}"
        )
    kernel = layer.param("kernel", layer.kernel_init, kernel_shape, layer.param_dtype)
    if layer.mask is not None:
        kernel *= layer.mask
    bias = layer.param("bias", layer.bias_init, bias_shape, layer.param_dtype) if layer.use_bias else None
    return kernel, bias


def _channels_last(ndim: int) -> lax.ConvDimensionNumbers:
    """Axes of [batch, spatial..., channels] with a kernel [spatial..., in, out]."""
    spatial = tuple(range(1, ndim - 1))
    lhs = (0, ndim - 1, *spatial)
    return lax.ConvDimensionNumbers(lhs, (ndim - 1, ndim - 2, *range(ndim - 2)), lhs)


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
        inputs, batch = _with_one_batch_axis(inputs, len(kernel_size))
        inputs, padding = self._padded(inputs, kernel_size)
        window: dict[str, Any] = {
            "window_strides": _per_axis(self.strides, len(kernel_size)),
            "padding": padding,
            "lhs_dilation": _per_axis(self.input_dilation, len(kernel_size)),
            "rhs_dilation": _per_axis(self.kernel_dilation, len(kernel_size)),
            "dimension_numbers": _channels_last(inputs.ndim),
        }
        return _with_batch_axes(self._convolve(inputs, kernel_size, window), batch)

    @nowrap
    def _padded(self, inputs: Array, kernel_size: tuple[int, ...]) -> tuple[Array, LaxPadding]:
        """The input, padded if lax does not know the kind of padding, and the padding that is left to do."""
        padding = canonicalize_padding(self.padding, len(kernel_size))
        if not isinstance(padding, str) or padding not in ("CAUSAL", *_PAD_MODES):
            return inputs, padding
        reach = [
            (k - 1) * d for k, d in zip(kernel_size, _per_axis(self.kernel_dilation, len(kernel_size)), strict=True)
        ]
        if padding == "CAUSAL":
            if len(kernel_size) != 1:
                raise ValueError(
                    f"Causal padding is only implemented for 1D convolutions. kernel_size is {kernel_size}."
                )
            return jnp.pad(inputs, [(0, 0), (reach[0], 0), (0, 0)]), "VALID"
        pads = [(0, 0), *((r // 2, (r + 1) // 2) for r in reach), (0, 0)]
        return jnp.pad(inputs, pads, mode=_PAD_MODES[padding]), "VALID"

    @nowrap
    def _operation(self) -> Callable[..., Array]:
        """``lax.conv_general_dilated`` or what replaces it."""
        if self.conv_general_dilated_cls is not None:
            return self.conv_general_dilated_cls()  # type: ignore[no-any-return]
        return self.conv_general_dilated or lax.conv_general_dilated

    @nowrap
    def _convolve(self, inputs: Array, kernel_size: tuple[int, ...], window: dict[str, Any]) -> Array:
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
    def _convolve(self, inputs: Array, kernel_size: tuple[int, ...], window: dict[str, Any]) -> Array:
        channels, groups = inputs.shape[-1], self.feature_group_count
        if channels % groups:
            raise ValueError(f"feature_group_count {groups} does not divide the number of input channels, {channels}.")
        kernel, bias = _kernel_and_bias(self, (*kernel_size, channels // groups, self.features), (self.features,))
        inputs, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        strides, padding = window.pop("window_strides"), window.pop("padding")
        y = self._operation()(
            inputs, kernel, strides, padding, feature_group_count=groups, precision=self.precision, **window
        )
        return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


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
    def _convolve(self, inputs: Array, kernel_size: tuple[int, ...], window: dict[str, Any]) -> Array:
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
        kernel_size = as_tuple(self.kernel_size)
        rank = len(kernel_size)
        inputs, batch = _with_one_batch_axis(inputs, rank)
        strides = _per_axis(self.strides, rank)
        padding = canonicalize_padding(self.padding, rank)
        circular = padding == "CIRCULAR"

        channels = (inputs.shape[-1], self.features)
        kernel_shape = (*kernel_size, *(reversed(channels) if self.transpose_kernel else channels))
        kernel, bias = _kernel_and_bias(self, kernel_shape, (self.features,))
        inputs, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        y = lax.conv_transpose(
            inputs,
            kernel,
            strides,
            "VALID" if circular else padding,
            rhs_dilation=_per_axis(self.kernel_dilation, rank),
            transpose_kernel=self.transpose_kernel,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )
        if circular:
            periods = [size * stride for size, stride in zip(inputs.shape[1:-1], strides, strict=True)]
            y = _wrapped(y, periods, longer_end=self.transpose_kernel)
        if bias is not None:
            y += bias.reshape((1,) * (y.ndim - 1) + (-1,))
        return _with_batch_axes(y, batch)


def _wrapped(y: Array, periods: Sequence[int], longer_end: bool) -> Array:
    """Wrap each spatial axis of ``y`` around a circle of its period: the sum of its turns.

    The middle of ``y`` stays in the middle; where that falls between two elements, one more is padded at the front, or
    with ``longer_end`` at the end, as ``Conv`` pads it.
    """
    for axis, period in enumerate(periods, start=1):
        # Whole turns around the first one: an odd number of them, so that the middle one holds the middle of ``y``.
        missing = (period - y.shape[axis]) % (2 * period)
        short, long = missing // 2, (missing + 1) // 2
        pads = [(0, 0)] * y.ndim
        pads[axis] = (short, long) if longer_end else (long, short)
        y = jnp.pad(y, pads)
        y = y.reshape(*y.shape[:axis], -1, period, *y.shape[axis + 1 :]).sum(axis)
    return y
