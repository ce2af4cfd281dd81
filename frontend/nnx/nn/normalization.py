"""Normalisation layers: ``BatchNorm``, ``LayerNorm``, ``RMSNorm``, ``GroupNorm`` and ``InstanceNorm``.

They share these arguments of constructors:

* ``num_features``: size of the feature axis.
* ``epsilon``: added to the variance.
* ``dtype``: of the output; by default the one that input and parameters promote to. Statistics are computed in it, but
  in float32 at least.
* ``param_dtype``: dtype of the parameters; ``use_bias``, ``use_scale``, ``bias_init``, ``scale_init``: which there are,
  and their initialisers, zeros and ones; ``bias_metadata``, ``scale_metadata``: their metadata.
* ``axis_name``, ``axis_index_groups``: average the statistics over this ``vmap`` or mesh axis as well.
* ``use_fast_variance``: the variance as E[x²] − E[x]², in one pass; otherwise as E[(x − E[x])²], which is more exact.
* ``promote_dtype``: brings a tuple of input and parameters to ``dtype``.
* ``rngs``: the stream ``params`` gives the keys of the initialisers.

Calls take ``mask``, broadcastable to the input: which elements the statistics count. The attributes ``scale`` and
``bias`` are ``Param`` [num_features], or None.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from distaff.frontend.layers.fields import Axes, Initializer, PromoteDtype
from distaff.frontend.layers.initializers import ones, zeros
from distaff.frontend.layers.normalization import (
    Statistics,
    distinct_axes,
    group_axes,
    instance_axes,
    normalize,
    number_of_groups,
)
from distaff.frontend.nnx.module import Module
from distaff.frontend.nnx.nn.dtypes import Array, Dtype, promote_dtype
from distaff.frontend.nnx.nn.fields import NO_METADATA, Metadata, first_from, missing, optional_parameter, value_of
from distaff.frontend.nnx.nn.weight_norms import SpectralNorm as SpectralNorm
from distaff.frontend.nnx.nn.weight_norms import WeightNorm as WeightNorm
from distaff.frontend.nnx.rngs import Rngs
from distaff.frontend.nnx.variable_kinds import BatchStat


class _Norm(Module):
    """What all have."""

    scale: Any
    bias: Any = None

    def _set_common(
        self,
        epsilon: float,
        dtype: Dtype | None,
        param_dtype: Dtype,
        axis_name: str | None,
        axis_index_groups: Any,
        use_fast_variance: bool,
        promote_dtype: PromoteDtype,
    ) -> None:
        """Set the attributes that all have."""
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype

    def _statistics(self, mask: Array | None) -> Statistics:
        return Statistics(self.dtype, mask, self.axis_name, self.axis_index_groups, self.use_fast_variance)

    def _promoted(self, x: Array, *others: Array) -> tuple[Any, ...]:
        """The input, the others, scale and bias in one dtype."""
        arrays = (x, *others, value_of(self.scale), value_of(self.bias))
        return tuple(self.promote_dtype(arrays, dtype=self.dtype))


class BatchNorm(_Norm):
    """Zero mean and unit variance over all axes but ``axis``, with running statistics for inference.

    Attributes:
        mean, var: ``BatchStat`` [num_features], the running statistics (https://arxiv.org/abs/1502.03167).
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: Rngs,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Make parameters and statistics.

        Args:
            use_running_average: normalise by the stored statistics; may be passed to the call instead. If False, those
                of the batch are used, and the stored ones updated.
            axis: the feature axis.
            momentum: share of the old statistics in an update.
            others: see the module.
        """
        shape = (num_features,)
        self.mean = BatchStat(jnp.zeros(shape, jnp.float32))
        self.var = BatchStat(jnp.ones(shape, jnp.float32))
        self.scale = optional_parameter(use_scale, rngs, scale_init, shape, param_dtype, scale_metadata)
        self.bias = optional_parameter(use_bias, rngs, bias_init, shape, param_dtype, bias_metadata)
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.use_bias = use_bias
        self.use_scale = use_scale
        self._set_common(epsilon, dtype, param_dtype, axis_name, axis_index_groups, use_fast_variance, promote_dtype)

    def __call__(self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None) -> Array:
        """Normalise ``x``.

        Raises:
            ValueError: neither the constructor nor the call was given ``use_running_average``.
        """
        use_running_average = first_from(
            use_running_average, self.use_running_average, error_msg=missing(self, "use_running_average")
        )
        feature_axes = distinct_axes(self.axis, x.ndim)
        reduction_axes = tuple(axis for axis in range(x.ndim) if axis not in feature_axes)
        x, mean, var, scale, bias = self._promoted(x, self.mean[...], self.var[...])
        if not use_running_average:
            mean, var = self._statistics(mask).mean_and_variance(x, reduction_axes)
            for running, batch in (self.mean, mean), (self.var, var):
                running[...] = lax.stop_gradient(self.momentum * running[...] + (1 - self.momentum) * batch)
        return normalize(x, mean, var, scale, bias, reduction_axes, feature_axes, self.epsilon, self.dtype)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What ``nnx.view`` calls.

        Args:
            use_running_average: normalise by the stored statistics instead of those of the batch.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average


class LayerNorm(_Norm):
    """Zero mean and unit variance over ``reduction_axes``, then scale and bias over ``feature_axes``."""

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: Rngs,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Make the parameters."""
        shape = (num_features,)
        self.scale = optional_parameter(use_scale, rngs, scale_init, shape, param_dtype, scale_metadata)
        self.bias = optional_parameter(use_bias, rngs, bias_init, shape, param_dtype, bias_metadata)
        self.num_features = num_features
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.reduction_axes = reduction_axes
        self.feature_axes = feature_axes
        self._set_common(epsilon, dtype, param_dtype, axis_name, axis_index_groups, use_fast_variance, promote_dtype)

    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        """Normalise ``x``."""
        axes, feature_axes = distinct_axes(self.reduction_axes, x.ndim), distinct_axes(self.feature_axes, x.ndim)
        x, scale, bias = self._promoted(x)
        mean, var = self._statistics(mask).mean_and_variance(x, axes)
        return normalize(x, mean, var, scale, bias, axes, feature_axes, self.epsilon, self.dtype)


class RMSNorm(_Norm):
    """Unit mean square over ``reduction_axes``, then scale over ``feature_axes`` (https://arxiv.org/abs/1910.07467)."""

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_scale: bool = True,
        scale_init: Initializer = ones,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: Rngs,
        scale_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Make the parameters."""
        shape = (num_features,)
        self.scale = optional_parameter(use_scale, rngs, scale_init, shape, param_dtype, scale_metadata)
        self.num_features = num_features
        self.use_scale = use_scale
        self.reduction_axes = reduction_axes
        self.feature_axes = feature_axes
        self._set_common(epsilon, dtype, param_dtype, axis_name, axis_index_groups, use_fast_variance, promote_dtype)

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Normalise ``x``."""
        axes, feature_axes = distinct_axes(self.reduction_axes, x.ndim), distinct_axes(self.feature_axes, x.ndim)
        x, scale, _ = self._promoted(x)
        mean_square = self._statistics(mask).mean_square(x, axes)
        return normalize(x, None, mean_square, scale, None, axes, feature_axes, self.epsilon, self.dtype)


class GroupNorm(_Norm):
    """Zero mean and unit variance over groups of channels and all axes between the first and the last.

    See https://arxiv.org/abs/1803.08494.
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = 32,
        group_size: int | None = None,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        reduction_axes: Axes | None = None,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: Rngs,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Make the parameters.

        Args:
            num_groups: number of groups; None if ``group_size``, the number of channels in each, is given.
            group_size: see ``num_groups``.
            reduction_axes: axes of the statistics, the last one included; by default all but the first.
            others: see the module.

        Raises:
            ValueError: the groups do not divide the channels.
        """
        self.num_groups = number_of_groups(num_features, num_groups, group_size)
        self.group_size = num_features // self.num_groups
        shape = (num_features,)
        self.scale = optional_parameter(use_scale, rngs, scale_init, shape, param_dtype, scale_metadata)
        self.bias = optional_parameter(use_bias, rngs, bias_init, shape, param_dtype, bias_metadata)
        self.feature_axis = -1
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.reduction_axes = reduction_axes
        self._set_common(epsilon, dtype, param_dtype, axis_name, axis_index_groups, use_fast_variance, promote_dtype)

    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        """Normalise ``x`` [batch, ..., channels]; ValueError if ``reduction_axes`` lack the last axis."""
        axes = group_axes(self.reduction_axes, x.ndim)
        x, scale, bias = self._promoted(x)
        mean, var = self._statistics(mask).of_groups(x, self.num_groups, axes)
        return normalize(x, mean, var, scale, bias, axes[:-1], (x.ndim - 1,), self.epsilon, self.dtype)


class InstanceNorm(_Norm):
    """Zero mean and unit variance over all axes but the first and ``feature_axes`` (https://arxiv.org/abs/1607.08022)."""

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        feature_axes: Axes = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: Rngs,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Make the parameters; ``feature_axes`` may not include the first axis, that of the batch."""
        shape = (num_features,)
        self.scale = optional_parameter(use_scale, rngs, scale_init, shape, param_dtype, scale_metadata)
        self.bias = optional_parameter(use_bias, rngs, bias_init, shape, param_dtype, bias_metadata)
        self.num_features = num_features
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.feature_axes = feature_axes
        self._set_common(epsilon, dtype, param_dtype, axis_name, axis_index_groups, use_fast_variance, promote_dtype)

    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        """Normalise ``x``; ValueError if the first axis is among ``feature_axes``."""
        axes, feature_axes = instance_axes(self.feature_axes, x.ndim)
        x, scale, bias = self._promoted(x)
        mean, var = self._statistics(mask).mean_and_variance(x, axes)
        return normalize(x, mean, var, scale, bias, axes, feature_axes, self.epsilon, self.dtype)
