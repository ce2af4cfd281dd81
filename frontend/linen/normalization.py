"""Normalisation layers: ``LayerNorm``, ``RMSNorm``, ``GroupNorm``, ``InstanceNorm`` and ``BatchNorm``.

They share these fields:

* ``epsilon``: added to the variance.
* ``dtype``: of the output; by default the one that input and parameters promote to. Statistics are computed in it, but
  in float32 at least, unless ``force_float32_reductions`` is False.
* ``param_dtype``: dtype of the parameters; ``use_bias``, ``use_scale``, ``bias_init``, ``scale_init``: which there are,
  and their initialisers, zeros and ones.
* ``axis_name``, ``axis_index_groups``: average the statistics over this ``vmap`` or mesh axis as well.
* ``use_fast_variance``: the variance as E[x²] − E[x]², in one pass; otherwise as E[(x − E[x])²], which is more exact.

Calls take ``mask``, broadcastable to the input: which elements the statistics count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from distaff.frontend.linen import initializers
from distaff.frontend.linen.class_transform import compact, nowrap
from distaff.frontend.linen.dtypes import Array, Dtype, canonicalize_dtype
from distaff.frontend.linen.fields import Axes, Initializer, axes_from_front
from distaff.frontend.linen.module import Module, merge_param
from distaff.frontend.linen.weight_norms import SpectralNorm as SpectralNorm
from distaff.frontend.linen.weight_norms import WeightNorm as WeightNorm


def _axes(axes: Axes, ndim: int) -> tuple[int, ...]:
    """Axes counted from the front, each once, in order."""
    return tuple(dict.fromkeys(axes_from_front(axes, ndim)))


def _abs_sq(x: Array) -> Array:
    """|x|², real for complex x."""
    return lax.square(lax.real(x)) + lax.square(lax.imag(x)) if jnp.iscomplexobj(x) else lax.square(x)


def _for_statistics(layer: Any, x: Array) -> Array:
    """``x`` in the dtype that statistics are computed in."""
    dtype = jnp.result_type(x) if layer.dtype is None else layer.dtype
    return jnp.asarray(x, jnp.promote_types(dtype, jnp.float32) if layer.force_float32_reductions else dtype)


def _means(
    layer: Any, values: Sequence[Array], axes: tuple[int, ...], mask: Array | None, axis_name: str | None
) -> list[Array]:
    """The mean of each array over ``axes``, which are removed, and over the mapped axis ``axis_name``."""
    where = None if mask is None else jnp.asarray(mask, bool)
    local = [jnp.mean(value, axes, where=where) for value in values]
    if axis_name is None:
        return local
    return list(lax.pmean(jnp.stack(local), axis_name, axis_index_groups=layer.axis_index_groups))


def _mean_and_variance(
    layer: Any, x: Array, axes: tuple[int, ...], mask: Array | None, axis_name: str | None
) -> tuple[Array, Array]:
    x = _for_statistics(layer, x)
    if layer.use_fast_variance:
        mean, mean_square = _means(layer, [x, _abs_sq(x)], axes, mask, axis_name)
        return mean, jnp.maximum(0.0, mean_square - _abs_sq(mean))
    (mean,) = _means(layer, [x], axes, mask, axis_name)
    (var,) = _means(layer, [_abs_sq(x - jnp.expand_dims(mean, axes))], axes, mask, axis_name)
    return mean, var


def _normalize(
    layer: Any,
    x: Array,
    mean: Array | None,
    var: Array,
    reduction_axes: tuple[int, ...],
    feature_axes: tuple[int, ...],
) -> Array:
    """``(x - mean) / sqrt(var + epsilon)``, with the parameters ``scale`` and ``bias`` over ``feature_axes``.

    A layer that subtracts no mean adds no bias either.
    """
    param_shape = tuple(x.shape[axis] for axis in feature_axes)
    broadcast_shape = tuple(size if axis in feature_axes else 1 for axis, size in enumerate(x.shape))
    factor = lax.rsqrt(jnp.expand_dims(var, reduction_axes) + layer.epsilon)
    y = x if mean is None else x - jnp.expand_dims(mean, reduction_axes)
    inputs = [x]
    if layer.use_scale:
        scale = layer.param("scale", layer.scale_init, param_shape, layer.param_dtype).reshape(broadcast_shape)
        factor *= scale if layer.force_float32_reductions else jnp.asarray(scale, layer.param_dtype)
        inputs.append(scale)
    y *= factor
    if mean is not None and layer.use_bias:
        bias = layer.param("bias", layer.bias_init, param_shape, layer.param_dtype).reshape(broadcast_shape)
        y += bias if layer.force_float32_reductions else jnp.asarray(bias, layer.param_dtype)
        inputs.append(bias)
    return jnp.asarray(y, canonicalize_dtype(*inputs, dtype=layer.dtype))


def _normalized(
    layer: Any,
    x: Array,
    reduction_axes: tuple[int, ...],
    feature_axes: tuple[int, ...],
    mask: Array | None,
    subtract_mean: bool = True,
) -> Array:
    """``x``, normalised by its own statistics over ``reduction_axes``."""
    if subtract_mean:
        mean, var = _mean_and_variance(layer, x, reduction_axes, mask, layer.axis_name)
        return _normalize(layer, x, mean, var, reduction_axes, feature_axes)
    (mean_square,) = _means(layer, [_abs_sq(_for_statistics(layer, x))], reduction_axes, mask, layer.axis_name)
    return _normalize(layer, x, None, mean_square, reduction_axes, feature_axes)


class LayerNorm(Module):
    """Zero mean and unit variance over ``reduction_axes``, then scale and bias over ``feature_axes``.

    Parameters: ``scale`` and ``bias``, of the sizes of ``feature_axes``.
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    reduction_axes: Axes = -1
    feature_axes: Axes = -1
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @compact
    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        """Normalise ``x``."""
        return _normalized(self, x, _axes(self.reduction_axes, x.ndim), _axes(self.feature_axes, x.ndim), mask)


class RMSNorm(Module):
    """Unit mean square over ``reduction_axes``, then scale over ``feature_axes`` (https://arxiv.org/abs/1910.07467).

    Parameters: ``scale``, of the sizes of ``feature_axes``.
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_scale: bool = True
    scale_init: Initializer = initializers.ones
    reduction_axes: Axes = -1
    feature_axes: Axes = -1
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @compact
    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        """Normalise ``x``."""
        axes, feature_axes = _axes(self.reduction_axes, x.ndim), _axes(self.feature_axes, x.ndim)
        return _normalized(self, x, axes, feature_axes, mask, subtract_mean=False)


class GroupNorm(Module):
    """Zero mean and unit variance over groups of channels and all axes between the first and the last.

    Parameters: ``scale`` and ``bias`` [channels] (https://arxiv.org/abs/1803.08494).

    Args:
        num_groups: number of groups; None if ``group_size``, the number of channels in each, is given.
        reduction_axes: axes of the statistics, the last one included; by default all but the first.
    """

    num_groups: int | None = 32
    group_size: int | None = None
    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    reduction_axes: Axes | None = None
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @compact
    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        """Normalise ``x`` [batch, ..., channels]; ValueError if the groups do not divide the channels."""
        last = x.ndim - 1
        axes = _axes((*range(1, last), last) if self.reduction_axes is None else self.reduction_axes, x.ndim)
        if axes[-1] != last:
            raise ValueError(
                f"The reduction axes must include the final dimension, that of the channels: {self.reduction_axes}."
            )
        groups = self._number_of_groups(x.shape[-1])
        group_size = x.shape[-1] // groups
        if mask is not None:
            mask = jnp.broadcast_to(mask, x.shape).reshape(*x.shape[:-1], groups, group_size)
        grouped = x.reshape(*x.shape[:-1], groups, group_size)
        mean, var = _mean_and_variance(self, grouped, (*axes[:-1], last + 1), mask, self.axis_name)
        mean, var = jax.tree.map(lambda value: jnp.repeat(value, group_size, axis=-1), (mean, var))
        return _normalize(self, x, mean, var, axes[:-1], (last,))

    @nowrap
    def _number_of_groups(self, channels: int) -> int:
        if (self.num_groups is None) == (self.group_size is None):
            raise ValueError(
                "Either `num_groups` or `group_size` should be specified; with group_size pass num_groups=None."
            )
        if self.group_size is not None:
            if channels % self.group_size:
                raise ValueError(
                    f"Number of channels ({channels}) is not multiple of the group size ({self.group_size})."
                )
            return channels // self.group_size
        if not self.num_groups or self.num_groups < 0 or channels % self.num_groups:
            raise ValueError(
                f"Number of groups ({self.num_groups}) does not divide the number of channels ({channels})."
            )
        return self.num_groups


class InstanceNorm(Module):
    """Zero mean and unit variance over all axes but the first and ``feature_axes`` (https://arxiv.org/abs/1607.08022).

    Parameters: ``scale`` and ``bias``, of the sizes of ``feature_axes``, which may not include the first axis, that of
    the batch.
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    feature_axes: Axes = -1
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @compact
    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        """Normalise ``x``; ValueError if the first axis is among ``feature_axes``."""
        feature_axes = _axes(self.feature_axes, x.ndim)
        if 0 in feature_axes:
            raise ValueError(
                "The channel axes cannot include the leading dimension as this is assumed to be the batch axis. "
                f"feature_axes={self.feature_axes}"
            )
        axes = tuple(axis for axis in range(1, x.ndim) if axis not in feature_axes)
        return _normalized(self, x, axes, feature_axes, mask)


class BatchNorm(Module):
    """Zero mean and unit variance over all axes but ``axis``, with running statistics for inference.

    Parameters: ``scale`` and ``bias``; variables of the collection ``batch_stats``: ``mean`` and ``var``; all of the
    sizes of ``axis`` (https://arxiv.org/abs/1502.03167).

    Args:
        use_running_average: normalise by the stored statistics; may be passed to the call instead. If False, those of
            the batch are used, and the stored ones updated, so call ``apply`` with ``mutable=["batch_stats"]``.
        axis: the feature axis or axes.
        momentum: share of the old statistics in an update.
    """

    use_running_average: bool | None = None
    axis: Axes = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @compact
    def __call__(self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None) -> Array:
        """Normalise ``x``."""
        use_running_average = merge_param("use_running_average", self.use_running_average, use_running_average)
        feature_axes = _axes(self.axis, x.ndim)
        reduction_axes = tuple(axis for axis in range(x.ndim) if axis not in feature_axes)
        shape = tuple(x.shape[axis] for axis in feature_axes)
        stats_dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, stats_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, stats_dtype)
        if use_running_average:
            mean, var = running_mean.value, running_var.value
            if not self.force_float32_reductions:
                mean, var = jnp.asarray(mean, self.param_dtype), jnp.asarray(var, self.param_dtype)
        else:
            axis_name = None if self.is_initializing() else self.axis_name  # init runs outside the vmap
            mean, var = _mean_and_variance(self, x, reduction_axes, mask, axis_name)
            if not self.is_initializing():
                for running, batch in (running_mean, mean), (running_var, var):
                    running.value = self.momentum * running.value + (1 - self.momentum) * batch
        return _normalize(self, x, mean, var, reduction_axes, feature_axes)
