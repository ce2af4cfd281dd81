"""``Dropout``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distaff.frontend.layers.stochastic import dropout
from distaff.frontend.nnx.module import Module
from distaff.frontend.nnx.nn.dtypes import Array
from distaff.frontend.nnx.nn.fields import first_from, missing
from distaff.frontend.nnx.pytrees import data
from distaff.frontend.nnx.rngs import Rngs, RngStream


class Dropout(Module):
    """Zeroes each input with probability ``rate`` and scales the others by ``1 / (1 - rate)``.

    Attributes:
        rngs: the ``RngStream`` that the layer draws from, or None.
    """

    def __init__(
        self,
        rate: float,
        *,
        broadcast_dims: Sequence[int] = (),
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: Rngs | RngStream | None = None,
    ) -> None:
        """Take a stream of its own.

        Args:
            rate: the probability, 0 to 1.
            broadcast_dims: axes along which all inputs share one draw.
            deterministic: leave the input as it is; may be passed to the call instead.
            rng_collection: name of the stream of ``rngs``.
            rngs: where the layer's own stream is forked from; None if calls will be given one.

        Raises:
            TypeError: ``rngs`` is none of these.
        """
        self.rate = rate
        self.broadcast_dims = broadcast_dims
        self.deterministic = deterministic
        self.rng_collection = rng_collection
        if isinstance(rngs, Rngs):
            self.rngs = rngs[rng_collection].fork()
        elif isinstance(rngs, RngStream):
            self.rngs = rngs.fork()
        elif rngs is None:
            self.rngs = data(None)
        else:
            raise TypeError(f"rngs must be a Rngs, RngStream or None, but got {type(rngs)}.")

    def __call__(
        self, inputs: Array, *, deterministic: bool | None = None, rngs: Rngs | RngStream | jax.Array | None = None
    ) -> Array:
        """Drop out inputs.

        Args:
            inputs: of any shape.
            deterministic: goes before the constructor's.
            rngs: streams, a stream or a key to draw from, in place of the layer's own stream.

        Raises:
            ValueError: there is neither ``deterministic`` nor, unless that is True, anything to draw from.
            TypeError: ``rngs`` is none of these.
        """
        deterministic = first_from(deterministic, self.deterministic, error_msg=missing(self, "deterministic"))
        if deterministic or self.rate == 0.0:
            return inputs
        if self.rate == 1.0:  # 1 / (1 - rate) would make gradients NaN
            return jnp.zeros_like(inputs)
        no_rngs = "`deterministic` is False, but no" + missing(self, "rngs").removeprefix("No")
        key = self._key(first_from(rngs, self.rngs, error_msg=no_rngs))
        return dropout(key, inputs, self.rate, self.broadcast_dims, jax.typeof(inputs).sharding)

    def _key(self, rngs: Any) -> jax.Array:
        if isinstance(rngs, Rngs):
            return rngs[self.rng_collection]()
        if isinstance(rngs, RngStream):
            return rngs()
        if isinstance(rngs, jax.Array):
            return rngs
        raise TypeError(f"rngs must be a Rngs, RngStream or jax.Array, but got {type(rngs)}.")

    def set_view(self, deterministic: bool | None = None) -> None:
        """What ``nnx.view`` calls.

        Args:
            deterministic: leave inputs as they are.
        """
        if deterministic is not None:
            self.deterministic = deterministic
