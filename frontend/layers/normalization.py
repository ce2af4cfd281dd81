"""Statistics of arrays, and arrays normalised by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from distaff.frontend.layers.dtypes import Array, Dtype, canonicalize_dtype
from distaff.frontend.layers.fields import Axes, axes_from_front


class Statistics(NamedTuple):
    """How to compute statistics.

    Args:
        dtype: of the array, None for its own; statistics are computed in it, but in float32 at least.
        mask: broadcastable to the array: which elements count.
        axis_name, axis_index_groups: average over this ``vmap`` or mesh axis as well.
        use_fast_variance: the variance as E[x²] − E[x]², in one pass; otherwise as E[(x − E[x])²], which is more exact.
        float32: compute in float32 at least; otherwise in the dtype.
    """

    dtype: Dtype | None
    mask: Array | None = None
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    float32: bool = True

    def mean_and_variance(self, x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
        """The mean and the variance over ``axes``, which are removed."""
        x = self._converted(x)
        if self.use_fast_variance:
            mean, mean_square = self._means([x, _abs_sq(x)], axes)
            return mean, jnp.maximum(0.0, mean_square - _abs_sq(mean))
        (mean,) = self._means([x], axes)
        (var,) = self._means([_abs_sq(x - jnp.expand_dims(mean, axes))], axes)
        return mean, var

    def mean_square(self, x: Array, axes: tuple[int, ...]) -> Array:
        """The mean of |x|² over ``axes``, which are removed."""
        return self._means([_abs_sq(self._converted(x))], axes)[0]

    def of_groups(self, x: Array, groups: int, axes: tuple[int, ...]) -> tuple[Array, Array]:
        """The mean and the variance over ``axes`` within groups of the last axis: [..., channels], equal in a group.

        Args:
            x: [..., channels].
            groups: number of groups, which divides the channels.
            axes: axes counted from the front, in order, the last one included; the others are removed.
        """
        shape = (*x.shape[:-1], groups, x.shape[-1] // groups)
        mask = None if self.mask is None else jnp.broadcast_to(self.mask, x.shape).reshape(shape)
        statistics = self._replace(mask=mask).mean_and_variance(x.reshape(shape), (*axes[:-1], x.ndim))
        mean, var = (jnp.repeat(value, shape[-1], axis=-1) for value in statistics)
        return mean, var

    def _converted(self, x: Array) -> Array:
        dtype = jnp.result_type(x) if self.dtype is None else self.dtype
        return jnp.asarray(x, jnp.promote_types(dtype, jnp.float32) if self.float32 else dtype)

    def _means(self, values: Sequence[Array], axes: tuple[int, ...]) -> list[Array]:
        where = None if self.mask is None else jnp.asarray(self.mask, bool)
        local = [jnp.mean(value, axes, where=where) for value in values]
        if self.axis_name is None:
            return local
        return list(lax.pmean(jnp.stack(local), self.axis_name, axis_index_groups=self.axis_index_groups))


def _abs_sq(x: Array) -> Array:
    """|x|², real for complex x."""
    return lax.square(lax.real(x)) + lax.square(lax.imag(x)) if jnp.iscomplexobj(x) else lax.square(x)


def distinct_axes(axes: Axes, ndim: int) -> tuple[int, ...]:
    """Axes counted from the front, each once, in order."""
    return tuple(dict.fromkeys(axes_from_front(axes, ndim)))


def group_axes(reduction_axes: Axes | None, ndim: int) -> tuple[int, ...]:
    """The axes of ``GroupNorm``'s statistics, from the front; ValueError if the last one is not among them."""
    axes = tuple(range(1, ndim)) if reduction_axes is None else distinct_axes(reduction_axes, ndim)
    if ndim - 1 not in axes:
        raise ValueError(
            f"The reduction axes must include the final dimension, that of the channels: {reduction_axes}."
        )
    return axes


def instance_axes(feature_axes: Axes, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of ``InstanceNorm``'s statistics and the feature axes; ValueError if the first is among the latter."""
    features = distinct_axes(feature_axes, ndim)
    if 0 in features:
        raise ValueError(
            "The channel axes cannot include the leading dimension as this is assumed to be the batch axis. "
            f"feature_axes={feature_axes}"
        )
    return tuple(axis for axis in range(1, ndim) if axis not in features), features


def normalize(
    x: Array,
    mean: Array | None,
    var: Array,
    scale: Array | None,
    bias: Array | None,
    reduction_axes: tuple[int, ...],
    feature_axes: tuple[int, ...],
    epsilon: float,
    dtype: Dtype | None,
    param_dtype: Dtype | None = None,
) -> Array:
    """``(x - mean) / sqrt(var + epsilon) * scale + bias``.

    Args:
        x: of any shape.
        mean, var: of its shape without ``reduction_axes``; a mean of None is zero.
        scale, bias: of the sizes of ``feature_axes``, or None.
        reduction_axes, feature_axes: axes counted from the front, in order.
        epsilon: added to the variance.
        dtype: of the result; None for the one that input, scale and bias promote to.
        param_dtype: to bring scale and bias to; None to leave them.
    """
    shape = tuple(size if axis in feature_axes else 1 for axis, size in enumerate(x.shape))
    scale, bias = (None if param is None else lax.reshape(param, shape) for param in (scale, bias))
    dtype = canonicalize_dtype(x, scale, bias, dtype=dtype)
    if param_dtype is not None:
        scale, bias = (None if param is None else jnp.asarray(param, param_dtype) for param in (scale, bias))

    factor = lax.rsqrt(jnp.expand_dims(var, reduction_axes) + epsilon)
    y = x if mean is None else x - jnp.expand_dims(mean, reduction_axes)
    y *= factor if scale is None else factor * scale
    return jnp.asarray(y if bias is None else y + bias, dtype)


def number_of_groups(channels: int, num_groups: int | None, group_size: int | None) -> int:
    """The number of groups of ``channels``, from either of the others; ValueError if they do not divide them."""
    if (num_groups is None) == (group_size is None):
        raise ValueError(
            "Either `num_groups` or `group_size` should be specified; with group_size pass num_groups=None."
        )
    if group_size is not None:
        if channels % group_size:
            raise ValueError(f"Number of channels ({channels}) is not multiple of the group size ({group_size}).")
        return channels // group_size
    if not num_groups or num_groups < 0 or channels % num_groups:
        raise ValueError(f"Number of groups ({num_groups}) does not divide the number of channels ({channels}).")
    return num_groups
