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

from typing import Any

import jax.numpy as jnp

from distaff.frontend.layers.fields import Axes, Initializer
from distaff.frontend.layers.normalization import (
    Statistics,
    distinct_axes,
    group_axes,
    instance_axes,
    normalize,
    number_of_groups,
)
from distaff.frontend.linen import initializers
from distaff.frontend.linen.class_transform import compact
from distaff.frontend.linen.dtypes import Array, Dtype
from distaff.frontend.linen.module import Module, merge_param
from distaff.frontend.linen.weight_norms import SpectralNorm as SpectralNorm
from distaff.frontend.linen.weight_norms import WeightNorm as WeightNorm


def _statistics(layer: Any, mask: Array | None) -> Statistics:
    """How the layer computes statistics."""
    return Statistics(
        layer.dtype,
        mask,
        layer.axis_name,
        layer.axis_index_groups,
        layer.use_fast_variance,
        layer.force_float32_reductions,
    )


def _normalize(
    layer: Any,
    x: Array,
    mean: Array | None,
    var: Array,
    reduction_axes: tuple[int, ...],
    feature_axes: tuple[int, ...],
) -> Array:
    """``x`` normalised, with the parameters ``scale`` and ``bias``; without a mean there is no bias either."""
    shape = tuple(x.shape[axis] for axis in feature_axes)
    scale = layer.param("scale", layer.scale_init, shape, layer.param_dtype) if layer.use_scale else None
    has_bias = mean is not None and layer.use_bias
    bias = layer.param("bias", layer.bias_init, shape, layer.param_dtype) if has_bias else None
    param_dtype = None if layer.force_float32_reductions else layer.param_dtype
    return normalize(x, mean, var, scale, bias, reduction_axes, feature_axes, layer.epsilon, layer.dtype, param_dtype)


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
        axes = distinct_axes(self.reduction_axes, x.ndim)
        mean, var = _statistics(self, mask).mean_and_variance(x, axes)
        return _normalize(self, x, mean, var, axes, distinct_axes(self.feature_axes, x.ndim))


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
        axes = distinct_axes(self.reduction_axes, x.ndim)
        mean_square = _statistics(self, mask).mean_square(x, axes)
        return _normalize(self, x, None, mean_square, axes, distinct_axes(self.feature_axes, x.ndim))


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
        axes = group_axes(self.reduction_axes, x.ndim)
        groups = number_of_groups(x.shape[-1], self.num_groups, self.group_size)
        mean, var = _statistics(self, mask).of_groups(x, groups, axes)
        return _normalize(self, x, mean, var, axes[:-1], (x.ndim - 1,))


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
        axes, feature_axes = instance_axes(self.feature_axes, x.ndim)
        mean, var = _statistics(self, mask).mean_and_variance(x, axes)
        return _normalize(self, x, mean, var, axes, feature_axes)


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
        feature_axes = distinct_axes(self.axis, x.ndim)
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
            statistics = _statistics(self, mask)
            if self.is_initializing():  # outside the vmap
                statistics = statistics._replace(axis_name=None)
            mean, var = statistics.mean_and_variance(x, reduction_axes)
            if not self.is_initializing():
                for running, batch in (running_mean, mean), (running_var, var):
                    running.value = self.momentum * running.value + (1 - self.momentum) * batch
        return _normalize(self, x, mean, var, reduction_axes, feature_axes)
