"""Weights with unit norm, and with unit largest singular value."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from distaff.frontend.layers.dtypes import Array


def unit_norm(x: Array, axis: tuple[int, ...] | None, epsilon: float) -> Array:
    """``x`` over its L2 norm along ``axis`` (None: all), with ``epsilon`` added to the square of that."""
    return x * lax.rsqrt(jnp.sum(x * x, axis=axis, keepdims=True) + epsilon)


def weight_normalized(weights: Array, scale: Array | None, feature_axes: tuple[int, ...], epsilon: float) -> Array:
    """Weights with a norm of ``scale``, or of one, for each index of ``feature_axes``.

    Args:
        weights: of any shape (https://arxiv.org/abs/1602.07868).
        scale: of the sizes of ``feature_axes``, in their order.
        feature_axes: axes counted from the front, in order; norms are taken over the others.
        epsilon: added to squared norms.
    """
    others = tuple(axis for axis in range(weights.ndim) if axis not in feature_axes)
    normalized = unit_norm(weights, others, epsilon)
    return normalized if scale is None else normalized * jnp.expand_dims(scale, others)


def spectrally_normalized(weights: Array, u: Array, n_steps: int, epsilon: float) -> tuple[Array, Array, Array]:
    """Weights over their largest singular value, found by power iteration (https://arxiv.org/abs/1802.05957).

    Args:
        weights: [..., columns], a matrix of its last axis and all others.
        u: [1, columns], where the iteration starts.
        n_steps: steps of it, one at least.
        epsilon: added to squared norms.

    Returns:
        The weights, the vector ``u`` to start the next iteration from, and the singular value.
    """
    matrix = weights.reshape(-1, weights.shape[-1])
    for _ in range(n_steps):
        v = unit_norm(u @ matrix.T, None, epsilon)
        u = unit_norm(v @ matrix, None, epsilon)
    u, v = lax.stop_gradient(u), lax.stop_gradient(v)
    sigma = (v @ matrix @ u.T)[0, 0]
    return (matrix / jnp.where(sigma != 0, sigma, 1)).reshape(weights.shape), u, sigma
