"""Pooling: the maximum, minimum or mean of the elements in a sliding window, over [batch..., spatial..., channels]."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax import lax

from distaff.frontend.layers.dtypes import Array

# "SAME", "VALID", or one (low, high) pair a spatial axis.
Padding: TypeAlias = str | Sequence[tuple[int, int]]


def pool(
    inputs: Array,
    init: Any,
    reduce_fn: Callable[[Any, Any], Any],
    window_shape: Sequence[int],
    strides: Sequence[int] | None,
    padding: Padding,
) -> Array:
    """Reduce each window of ``inputs`` [batch..., spatial..., channels] by ``reduce_fn``, starting from ``init``.

    Args:
        window_shape: size of the window along each spatial axis; the axes before those are batch axes.
        strides: its step along each axis, by default 1.
        padding: "SAME", "VALID", or one (low, high) pair a spatial axis.

    Raises:
        ValueError: strides or padding are not one for each axis of the window, or the input has too few axes.
    """
    rank = len(window_shape)
    batch_axes = inputs.ndim - rank - 1
    if batch_axes < 0:
        raise ValueError(f"A window of {rank} axes needs an input of {rank + 1} axes at least, got {inputs.shape}.")
    strides = strides or (1,) * rank
    if len(strides) != rank:
        raise ValueError(f"strides {tuple(strides)} must have one step for each axis of the window, {rank}.")
    if not isinstance(padding, str):
        pairs = [tuple(pair) for pair in padding]
        if len(pairs) != rank or any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"padding {padding} must have one (low, high) pair for each axis of the window, {rank}.")
        padding = [(0, 0)] * batch_axes + pairs + [(0, 0)]  # type: ignore[assignment]
    ones = (1,) * batch_axes
    return lax.reduce_window(  # type: ignore[no-any-return]
        inputs, init, reduce_fn, (*ones, *window_shape, 1), (*ones, *strides, 1), padding
    )


def avg_pool(
    inputs: Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
    count_include_pad: bool = True,
) -> Array:
    """The mean of each window; with ``count_include_pad`` padding counts as zeros. Otherwise as ``pool``."""
    sums = pool(inputs, 0.0, lax.add, window_shape, strides, padding)
    if count_include_pad:
        return sums / math.prod(window_shape)
    spatial = inputs.shape[inputs.ndim - len(window_shape) - 1 : -1]
    ones = jnp.ones((1,) * (inputs.ndim - len(spatial) - 1) + spatial + (1,))
    return sums / pool(ones, 0.0, lax.add, window_shape, strides, padding)


def max_pool(
    inputs: Array, window_shape: Sequence[int], strides: Sequence[int] | None = None, padding: Padding = "VALID"
) -> Array:
    """The maximum of each window; padding does not count. Otherwise as ``pool``."""
    return pool(inputs, -jnp.inf, lax.max, window_shape, strides, padding)


def min_pool(
    inputs: Array, window_shape: Sequence[int], strides: Sequence[int] | None = None, padding: Padding = "VALID"
) -> Array:
    """The minimum of each window; padding does not count. Otherwise as ``pool``."""
    return pool(inputs, jnp.inf, lax.min, window_shape, strides, padding)
