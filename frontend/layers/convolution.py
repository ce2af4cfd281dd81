"""Convolutions of [batch..., spatial..., channels], with any number of batch axes, also none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from jax import lax

from distaff.frontend.layers.dtypes import Array, Dtype
from distaff.frontend.layers.fields import PrecisionLike, per_axis

# A name, an integer, or one integer or one (low, high) pair an axis.
Padding: TypeAlias = str | int | Sequence[int | tuple[int, int]]
# What lax takes.
LaxPadding: TypeAlias = str | list[tuple[int, int]]

_PAD_MODES = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


def canonicalize_padding(padding: Padding, rank: int) -> LaxPadding:
    """A padding as its name or one (low, high) pair for each of ``rank`` axes; ValueError if it is none."""
    if isinstance(padding, str):
        return padding
    pads = [padding] * rank if isinstance(padding, int) else list(padding)
    pairs = [(pad, pad) if isinstance(pad, int) else pad for pad in pads]
    if len(pairs) != rank or any(not isinstance(pair, tuple | list) or len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"Invalid padding format: {padding}. Give a name such as 'SAME', one int, or for each of {rank} axes one "
            "or a pair (low, high)."
        )
    return [(low, high) for low, high in pairs]


def with_one_batch_axis(inputs: Array, rank: int) -> tuple[Array, tuple[int, ...]]:
    """The input with its batch axes made one, and their sizes."""
    if inputs.ndim <= rank:
        raise ValueError(
            f"A kernel of {rank} spatial axes needs an input [batch..., {rank} spatial axes, channels], got shape "
            f"{inputs.shape}."
        )
    batch = inputs.shape[: inputs.ndim - rank - 1]
    return inputs if len(batch) == 1 else inputs.reshape(math.prod(batch), *inputs.shape[len(batch) :]), batch


def with_batch_axes(y: Array, batch: tuple[int, ...]) -> Array:
    """The inverse of ``with_one_batch_axis``."""
    return y if len(batch) == 1 else y.reshape(*batch, *y.shape[1:])


def _channels_last(ndim: int) -> lax.ConvDimensionNumbers:
    """Axes of [batch, spatial..., channels] with a kernel [spatial..., in, out]."""
    spatial = tuple(range(1, ndim - 1))
    lhs = (0, ndim - 1, *spatial)
    return lax.ConvDimensionNumbers(lhs, (ndim - 1, ndim - 2, *range(ndim - 2)), lhs)


class Window(NamedTuple):
    """The steps of a convolution's window.

    Args:
        kernel_size: sizes of the kernel's spatial axes.
        strides: step of the window along each axis; here and below one integer, one an axis, or None for 1.
        padding: "SAME", "VALID", "CIRCULAR", "REFLECT", "CAUSAL" (for one axis), or as ``canonicalize_padding`` has it.
        input_dilation: steps between elements of the input, with zeros between them.
        kernel_dilation: steps between elements of the kernel.
    """

    kernel_size: tuple[int, ...]
    strides: int | Sequence[int] | None
    padding: Padding
    input_dilation: int | Sequence[int] | None
    kernel_dilation: int | Sequence[int] | None

    def padded(self, inputs: Array) -> tuple[Array, dict[str, Any]]:
        """The input [batch, spatial..., channels], padded if lax has no such padding, and lax's other arguments."""
        rank = len(self.kernel_size)
        inputs, padding = self._padded(inputs, canonicalize_padding(self.padding, rank))
        return inputs, {
            "window_strides": per_axis(self.strides, rank),
            "padding": padding,
            "lhs_dilation": per_axis(self.input_dilation, rank),
            "rhs_dilation": per_axis(self.kernel_dilation, rank),
            "dimension_numbers": _channels_last(rank + 2),
        }

    def _padded(self, inputs: Array, padding: LaxPadding) -> tuple[Array, LaxPadding]:
        if not isinstance(padding, str) or padding not in ("CAUSAL", *_PAD_MODES):
            return inputs, padding
        rank = len(self.kernel_size)
        dilation = per_axis(self.kernel_dilation, rank)
        reach = [(k - 1) * d for k, d in zip(self.kernel_size, dilation, strict=True)]
        if padding == "CAUSAL":
            if rank != 1:
                raise ValueError(
                    f"Causal padding is only implemented for 1D convolutions. kernel_size is {self.kernel_size}."
                )
            return jnp.pad(inputs, [(0, 0), (reach[0], 0), (0, 0)]), "VALID"
        pads = [(0, 0), *((r // 2, (r + 1) // 2) for r in reach), (0, 0)]
        return jnp.pad(inputs, pads, mode=_PAD_MODES[padding]), "VALID"


def masked(kernel: Array, mask: Array | None) -> Array:
    """The kernel times its mask; ValueError if that has another shape."""
    if mask is None:
        return kernel
    if mask.shape != kernel.shape:
        raise ValueError(f"Mask needs to have the same shape as weights. Shapes are: {mask.shape}, {kernel.shape}")
    return kernel * mask


def convolve(
    inputs: Array,
    kernel: Array,
    bias: Array | None,
    window: dict[str, Any],
    operation: Callable[..., Array],
    **options: Any,
) -> Array:
    """A convolution of [batch, spatial..., channels], plus the bias [features].

    Args:
        inputs, window: as ``Window.padded`` returns them.
        kernel: [kernel size..., channels / groups, features].
        bias: [features] or None.
        operation: as ``jax.lax.conv_general_dilated``.
        options: keyword arguments for it.
    """
    window = dict(window)
    strides, padding = window.pop("window_strides"), window.pop("padding")
    y = operation(inputs, kernel, strides, padding, **window, **options)
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def check_groups(channels: int, groups: int) -> None:
    """ValueError if the groups do not divide the channels."""
    if channels % groups:
        raise ValueError(f"feature_group_count {groups} does not divide the number of input channels, {channels}.")


def convolve_transposed(
    inputs: Array,
    kernel: Array,
    bias: Array | None,
    *,
    strides: int | Sequence[int] | None,
    padding: Padding,
    kernel_dilation: int | Sequence[int] | None,
    transpose_kernel: bool,
    precision: PrecisionLike,
    preferred_element_type: Dtype | None,
) -> Array:
    """A transposed convolution of [batch..., spatial..., channels], as ``jax.lax.conv_transpose``, plus the bias.

    Args:
        inputs: [batch..., spatial..., channels].
        kernel: [kernel size..., channels, features], or [kernel size..., features, channels] with ``transpose_kernel``.
        bias: [features] or None.
        strides: factor by which each spatial axis grows.
        padding: also "CIRCULAR".
        kernel_dilation, transpose_kernel, precision, preferred_element_type: as for ``jax.lax.conv_transpose``.
    """
    rank = kernel.ndim - 2
    inputs, batch = with_one_batch_axis(inputs, rank)
    strides = per_axis(strides, rank)
    lax_padding = canonicalize_padding(padding, rank)
    circular = lax_padding == "CIRCULAR"
    y = lax.conv_transpose(
        inputs,
        kernel,
        strides,
        "VALID" if circular else lax_padding,
        rhs_dilation=per_axis(kernel_dilation, rank),
        transpose_kernel=transpose_kernel,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    if circular:
        periods = [size * stride for size, stride in zip(inputs.shape[1:-1], strides, strict=True)]
        y = _wrapped(y, periods, longer_end=transpose_kernel)
    if bias is not None:
        y += bias.reshape((1,) * (y.ndim - 1) + (-1,))
    return with_batch_axes(y, batch)


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
