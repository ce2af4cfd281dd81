"""Rotary position embedding (Su et al. 2021): queries and keys turned by an angle that depends on their position."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

# Cosines and signed sines by position, float32 [P, size] each.
RotaryTables: TypeAlias = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Which of a head's values are turned together: among the first ``size`` (even), pairs of partners.

    ``half`` pairs value i with i + size / 2, as Llama does; ``interleaved`` pairs 2 i with 2 i + 1, as GPT-J does.
    Value i becomes ``x[i] * cos[position, i] + x[partner] * sin[position, i]``, so the sign belongs to the table.
    Raises `ValueError` for a size that has no pairs.
    """

    kind: Literal["half", "interleaved"]
    size: int

    def __post_init__(self) -> None:
        if self.kind not in ("half", "interleaved"):
            raise ValueError(f"kind is {self.kind!r}; it must be 'half' or 'interleaved'")
        if self.size < 2 or self.size % 2:
            raise ValueError(f"size is {self.size}; values turn in pairs, so it must be even and above 0")

    def partners(self, values: jax.Array) -> jax.Array:
        """The last axis, which has ``size`` values, with each in its partner's place."""
        if self.kind == "half":
            return jnp.roll(values, self.size // 2, axis=-1)
        pairs = values.reshape(*values.shape[:-1], self.size // 2, 2)
        return pairs[..., ::-1].reshape(values.shape)


def rotate(rotary: Rotary, cos: jax.Array, sin: jax.Array, positions: jax.Array, rows: jax.Array) -> jax.Array:
    """``rows[T, heads, D]`` turned for ``positions[T]`` by tables ``[P, size]``; computed and returned in float32."""
    rows = rows.astype(jnp.float32)
    turned, rest = rows[..., : rotary.size], rows[..., rotary.size :]
    turned = turned * cos[positions][:, None] + rotary.partners(turned) * sin[positions][:, None]
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
