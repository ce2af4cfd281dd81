"""Layers that run with normalised weights: ``SpectralNorm`` and ``WeightNorm``.

Each call normalises the weights of the wrapped layer in place: what is stored there is what the layer ran with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from distaff.frontend.core.initializer_shapes import ignores_key
from distaff.frontend.layers.fields import Axes, Initializer, PromoteDtype, axes_from_front
from distaff.frontend.layers.initializers import normal, ones
from distaff.frontend.layers.weight_norms import spectrally_normalized, weight_normalized
from distaff.frontend.nnx.filters import Filter, PathContains, PathParts, to_predicate
from distaff.frontend.nnx.graph_functions import state
from distaff.frontend.nnx.module import Module
from distaff.frontend.nnx.nn.dtypes import Array, Dtype, canonicalize_dtype, promote_dtype
from distaff.frontend.nnx.pytrees import data
from distaff.frontend.nnx.rngs import Rngs
from distaff.frontend.nnx.state import to_flat_state
from distaff.frontend.nnx.variable_kinds import BatchStat, Param
from distaff.frontend.nnx.variables import Variable


def _parameters(layer: Any) -> Iterator[tuple[PathParts, Variable[Array]]]:
    """The paths and parameters of a layer."""
    return iter(to_flat_state(state(layer, Param)))


def _known(table: dict[PathParts, Any], path: PathParts, what: str) -> Any:
    if path not in table:
        raise RuntimeError(
            f"Could not find the {what} of the parameter {path}: the parameters of the layer must stay those that it "
            "had when it was wrapped."
        )
    return table[path]


class SpectralNorm(Module):
    """A layer whose weight matrices are divided by their largest singular value (https://arxiv.org/abs/1802.05957).

    The singular value is approximated by power iteration from the vector of the step before. Scalars and vectors stay
    as they are; arrays of more axes count as matrices of their last axis and the others.

    Attributes:
        layer_instance: the layer.
        batch_stats: ``BatchStat`` for each matrix: ``(*path, "u")`` [1, columns], that vector, and
            ``(*path, "sigma")``, the value.
    """

    def __init__(
        self,
        layer_instance: Module,
        *,
        n_steps: int = 1,
        epsilon: float = 1e-12,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        error_on_non_matrix: bool = False,
        update_stats: bool = True,
        rngs: Rngs,
    ) -> None:
        """Wrap a layer.

        Args:
            layer_instance: the layer.
            n_steps: steps of the iteration in each call; with none, weights stay as they are.
            epsilon: added to squared norms.
            dtype: of the weights that the layer is called with.
            param_dtype: dtype of the statistics.
            error_on_non_matrix: refuse arrays of more than two axes.
            update_stats: whether calls store the iteration's results.
            rngs: the stream ``params`` gives the first vectors.

        Raises:
            ValueError: an array has more than two axes, with ``error_on_non_matrix``.
        """
        self.layer_instance = layer_instance
        self.n_steps = n_steps
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.error_on_non_matrix = error_on_non_matrix
        self.use_running_average = not update_stats
        stats: dict[PathParts, Any] = {}
        for path, weights in self._matrices():
            key = rngs.params()
            stats[(*path, "u")] = BatchStat(normal()(key, (1, weights.shape[-1]), param_dtype))
            stats[(*path, "sigma")] = BatchStat(jnp.ones((), param_dtype))
        self.batch_stats = data(stats)

    def _matrices(self) -> Iterator[tuple[PathParts, Variable[Array]]]:
        for path, weights in _parameters(self.layer_instance):
            if weights.ndim > 2 and self.error_on_non_matrix:
                raise ValueError(
                    f"SpectralNorm with error_on_non_matrix=True: {path} has {weights.ndim} axes, {weights.shape}."
                )
            if weights.ndim > 1 and self.n_steps > 0:
                yield path, weights

    def __call__(self, x: Any, update_stats: bool | None = None) -> Any:
        """Normalise the layer's weights and call it.

        Args:
            x: its input.
            update_stats: store the iteration's results; goes before the constructor's.

        Raises:
            RuntimeError: the layer has other parameters than when it was wrapped.
        """
        update_stats = not self.use_running_average if update_stats is None else update_stats
        for path, weights in self._matrices():
            stored_u = _known(self.batch_stats, (*path, "u"), "vector u")
            stored_sigma = _known(self.batch_stats, (*path, "sigma"), "singular value")
            normalized, u, sigma = spectrally_normalized(weights[...], stored_u[...], self.n_steps, self.epsilon)
            if update_stats:
                stored_u[...], stored_sigma[...] = u, sigma
            weights[...] = jnp.asarray(normalized, canonicalize_dtype(normalized, u, sigma, dtype=self.dtype))
        return self.layer_instance(x)  # type: ignore[operator]


class WeightNorm(Module):
    """A layer whose weights have unit norm, times a scale (https://arxiv.org/abs/1602.07868).

    Attributes:
        layer_instance: the layer.
        scales: an array for each normalised parameter by its path, of the sizes of ``feature_axes``; or None.
    """

    def __init__(
        self,
        layer_instance: Module,
        *,
        feature_axes: Axes | None = -1,
        use_scale: bool = True,
        scale_init: Initializer = ones,
        epsilon: float = 1e-12,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        variable_filter: Filter = PathContains("kernel"),  # noqa: B008
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: Rngs,
    ) -> None:
        """Wrap a layer.

        Args:
            layer_instance: the layer.
            feature_axes: axes with a norm for each index; norms are taken over the others. None: one norm for all.
            use_scale, scale_init, param_dtype: multiply by a scale; its initialiser and dtype.
            epsilon: added to squared norms.
            dtype: of the weights that the layer is called with.
            variable_filter: which variables to normalise.
            promote_dtype: kept as an attribute.
            rngs: the stream ``params`` gives the keys of initialisers that use them.
        """
        self.layer_instance = layer_instance
        self.feature_axes = () if feature_axes is None else feature_axes
        self.use_scale = use_scale
        self.scale_init = scale_init
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.variable_filter = to_predicate(variable_filter)
        self.promote_dtype = promote_dtype
        self.scales: Any = None
        if use_scale:
            self.scales = data({path: self._first_scale(weights, rngs) for path, weights in self._normalized()})

    def _normalized(self) -> Iterator[tuple[PathParts, Variable[Array]]]:
        return ((path, x) for path, x in _parameters(self.layer_instance) if self.variable_filter(path, x))

    def _first_scale(self, weights: Variable[Array], rngs: Rngs) -> Array:
        shape = tuple(weights.shape[axis] for axis in axes_from_front(self.feature_axes, weights.ndim))
        key = None if ignores_key(self.scale_init) else rngs.params()
        return self.scale_init(key, shape, self.param_dtype)  # type: ignore[no-any-return]

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Normalise the layer's weights and call it.

        Raises:
            RuntimeError: the layer has other parameters than when it was wrapped.
        """
        for path, weights in self._normalized():
            scale = _known(self.scales, path, "scale") if self.use_scale else None
            feature_axes = axes_from_front(self.feature_axes, weights.ndim)
            value = weight_normalized(weights[...], scale, feature_axes, self.epsilon)
            weights[...] = jnp.asarray(value, canonicalize_dtype(weights[...], scale, dtype=self.dtype))
        return self.layer_instance(x, *args, **kwargs)  # type: ignore[operator]
