"""Random zeros."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from distaff.frontend.layers.dtypes import Array


def dropout(
    key: jax.Array, x: Array, rate: float, broadcast_dims: Sequence[int] = (), out_sharding: Any = None
) -> Array:
    """``x`` with each element zero with probability ``rate`` and the others scaled by ``1 / (1 - rate)``.

    Args:
        key: a random key.
        x: of any shape.
        rate: above 0 and below 1.
        broadcast_dims: axes along which all elements share one draw.
        out_sharding: of the draws, on a mesh with explicit axes.
    """
    keep = 1.0 - rate
    shape = list(x.shape)
    for axis in broadcast_dims:
        shape[axis] = 1
    mask = jnp.broadcast_to(jax.random.bernoulli(key, keep, tuple(shape), out_sharding=out_sharding), x.shape)
    return lax.select(mask, x / keep, jnp.zeros_like(x))
