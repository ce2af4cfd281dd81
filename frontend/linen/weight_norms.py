"""Layers that run with normalised weights: ``SpectralNorm`` and ``WeightNorm``.

The wrapped layer keeps its own place in the variables, and its parameters are as they would be without the wrapper; it
is called with normalised ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from distaff.frontend.layers.fields import Axes, Initializer, axes_from_front
from distaff.frontend.layers.weight_norms import spectrally_normalized, weight_normalized
from distaff.frontend.linen import initializers, transforms
from distaff.frontend.linen.class_transform import compact, nowrap
from distaff.frontend.linen.dtypes import Array, Dtype, canonicalize_dtype
from distaff.frontend.linen.module import Module


def _call_with(
    wrapper: SpectralNorm | WeightNorm, normalize: Callable[[str, Array], Array], mutable: bool, args: Any, kwargs: Any
) -> Any:
    """The output of the wrapped layer with each parameter, named by its path from the wrapper, normalised."""
    layer = wrapper.layer_instance

    def run(layer: Any) -> Any:
        return layer(*args, **kwargs)

    def normalized(variables: Any) -> Any:
        def at_path(path: tuple[Any, ...], value: Any) -> Array:
            below = jax.tree_util.keystr(path[1:], simple=True, separator="/")
            return normalize(f"{layer.name}/{below}", value)

        return jax.tree_util.tree_map_with_path(at_path, variables)

    mapped = transforms.map_variables(run, trans_in_fn=normalized, init=wrapper.is_initializing(), mutable=mutable)
    return mapped(layer)


class SpectralNorm(Module):
    """A layer whose weight matrices are divided by their largest singular value (https://arxiv.org/abs/1802.05957).

    The singular value is approximated by power iteration from the vector of the step before. Variables of
    ``collection_name``, for each matrix: ``<path>/u`` [1, columns], that vector, and ``<path>/sigma``, the value.
    Scalars and vectors stay as they are; arrays of more axes count as matrices of their last axis and the others.

    Args:
        layer_instance: the layer.
        n_steps: steps of the iteration in each call; with none, weights stay as they are.
        epsilon: added to squared norms.
        dtype: of the weights that the layer is called with.
        param_dtype: dtype of the variables.
        error_on_non_matrix: refuse arrays of more than two axes.
        collection_name: collection of the variables.
    """

    layer_instance: Module
    n_steps: int = 1
    epsilon: float = 1e-12
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    error_on_non_matrix: bool = False
    collection_name: str = "batch_stats"

    @compact
    def __call__(self, *args: Any, update_stats: bool, **kwargs: Any) -> Any:
        """Call the layer; with ``update_stats`` store the iteration's results, so the collection must be mutable.

        ValueError: an array has more than two axes, with ``error_on_non_matrix``.
        """
        normalize = functools.partial(self._normalized, update_stats=update_stats)
        return _call_with(self, normalize, True, args, kwargs)

    @nowrap
    def _normalized(self, path: str, weights: Array, update_stats: bool) -> Array:
        weights = jnp.asarray(weights)
        if weights.ndim <= 1 or self.n_steps < 1:
            return weights
        if weights.ndim > 2 and self.error_on_non_matrix:
            raise ValueError(
                f"Input is {weights.ndim}D but error_on_non_matrix is True: {path} has the shape {weights.shape}."
            )
        stored_u = self.variable(self.collection_name, f"{path}/u", self._first_u, weights.shape[-1])
        stored_sigma = self.variable(self.collection_name, f"{path}/sigma", jnp.ones, (), self.param_dtype)

        normalized, u, sigma = spectrally_normalized(weights, stored_u.value, self.n_steps, self.epsilon)
        if update_stats:
            stored_u.value, stored_sigma.value = u, sigma
        return jnp.asarray(normalized, canonicalize_dtype(weights, u, sigma, dtype=self.dtype))

    @nowrap
    def _first_u(self, columns: int) -> Array:
        return jax.random.normal(self.make_rng("params"), (1, columns), self.param_dtype)


class WeightNorm(Module):
    """A layer whose weights have unit norm, times a learned scale (https://arxiv.org/abs/1602.07868).

    Parameters, for each normalised array and unless ``use_scale`` is False: ``<path>/scale``, of the sizes of
    ``feature_axes``.

    Args:
        layer_instance: the layer.
        epsilon: added to squared norms.
        dtype: of the weights that the layer is called with.
        param_dtype, scale_init: dtype and initialiser of the scales.
        use_scale: multiply by a scale.
        feature_axes: axes with a norm for each index; norms are taken over the others. None: one norm for all.
        variable_filter: normalise arrays with one of these strings in their path; None or empty: all.
    """

    layer_instance: Module
    epsilon: float = 1e-12
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_scale: bool = True
    scale_init: Initializer = initializers.ones
    feature_axes: Axes | None = -1
    variable_filter: Iterable[str] | None = dataclasses.field(default_factory=lambda: {"kernel"})

    @compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer with normalised weights."""
        return _call_with(self, self._normalized, False, args, kwargs)

    @nowrap
    def _normalized(self, path: str, weights: Array) -> Array:
        weights = jnp.asarray(weights)
        if self.variable_filter and not any(part in path for part in self.variable_filter):
            return weights
        feature_axes = () if self.feature_axes is None else axes_from_front(self.feature_axes, weights.ndim)
        scale = None
        if self.use_scale:
            shape = tuple(weights.shape[axis] for axis in feature_axes)
            scale = self.param(f"{path}/scale", self.scale_init, shape, self.param_dtype)
        normalized = weight_normalized(weights, scale, feature_axes, self.epsilon)
        return jnp.asarray(normalized, canonicalize_dtype(weights, scale, dtype=self.dtype))
