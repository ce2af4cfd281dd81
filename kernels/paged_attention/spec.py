"""What an attention computes, apart from its arrays: scale, mask, and what is added to or squeezes the scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from distaff.kernels.paged_attention.rotary import Rotary

# What a running maximum of scores starts from: finite, so that a query that sees no key makes no NaN.
LOWEST = float(np.finfo(np.float32).min)


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """One kind of attention; hashable, so that equal layers share their trace.

    The score of query position i and key position j is ``scale * q.k``, then ``softcap * tanh(score / softcap)``,
    then minus ``slope * (i - j)`` with the head's entry of ``slopes`` (ALiBi, Press et al. 2022). Key j is visible if
    ``j <= i`` (``causal``), ``i - j < window`` and ``mask(i, j)``, whichever are given; ``window`` so counts the
    position itself. ``mask`` takes two int32 arrays that broadcast and returns bool; it must be traceable and depend
    on nothing else. A query that sees no key at all gives zeros. With ``rotary``, q and k are turned before all this,
    by tables that the call brings. Raises `ValueError` for a size that means nothing.
    """

    scale: float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    slopes: tuple[float, ...] | None = None
    mask: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    rotary: Rotary | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}; a query sees at least itself, or use None for no window")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap is {self.softcap}; it must be above 0, or None for no cap")

    def visible(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """Whether the key positions are visible from the query positions: bool of their broadcast shape."""
        distance = query - key
        seen = jnp.full(distance.shape, True)
        if self.causal:
            seen &= distance >= 0
        if self.window is not None:
            seen &= distance < self.window
        if self.mask is not None:
            seen &= self.mask(query, key)
        return seen

    def scores(self, products: jax.Array, slopes: jax.Array | None, query: jax.Array, key: jax.Array) -> jax.Array:
        """Scores from float32 products q.k; ``slopes`` (`slope_array`) and positions broadcast against them."""
        scores = products * self.scale
        if self.softcap is not None:
            scores = self.softcap * jnp.tanh(scores / self.softcap)
        if slopes is not None:
            scores -= slopes * (query - key)
        return scores

    def slope_array(self) -> jax.Array | None:
        """``slopes`` as float32 ``[H]``."""
        return None if self.slopes is None else jnp.asarray(self.slopes, jnp.float32)
