"""``Dropout``."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from distaff.frontend.layers.stochastic import dropout
from distaff.frontend.linen.class_transform import compact
from distaff.frontend.linen.dtypes import Array
from distaff.frontend.linen.module import Module, merge_param


class Dropout(Module):
    """Zeroes each input with probability ``rate`` and scales the others by ``1 / (1 - rate)``.

    Args:
        rate: the probability, 0 to 1.
        broadcast_dims: axes along which all inputs share one draw.
        deterministic: leave the input as it is; may be passed to the call instead.
        rng_collection: the random stream to draw from.
    """

    rate: float
    broadcast_dims: Sequence[int] = ()
    deterministic: bool | None = None
    rng_collection: str = "dropout"

    @compact
    def __call__(self, inputs: Array, deterministic: bool | None = None, rng: jax.Array | None = None) -> Array:
        """Drop out inputs; draws from ``rng``, or by default from the stream (InvalidRngError if there is none)."""
        deterministic = merge_param("deterministic", self.deterministic, deterministic)
        if deterministic or self.rate == 0.0:
            return inputs
        if self.rate == 1.0:  # 1 / (1 - rate) would make gradients NaN
            return jnp.zeros_like(inputs)
        key = self.make_rng(self.rng_collection) if rng is None else rng
        return dropout(key, inputs, self.rate, self.broadcast_dims)
