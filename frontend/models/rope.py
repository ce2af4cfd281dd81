"""Rotary position embeddings and the ways to stretch them beyond the trained length.

Pairs of a head's features turn with the position, each at its own frequency (RoFormer, arXiv:2104.09864). A scaling
lowers frequencies so that more positions fit in the trained range of angles.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np


class Rotation(NamedTuple):
    """Cosine and sine of each position's angles, float32 ``[S, head_dim / 2]``."""

    cos: jax.Array
    sin: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        """Turns ``x`` ``[B, S, heads, head_dim]``; feature i is paired with feature i + head_dim / 2."""
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        cos, sin = self.cos[:, None, :], self.sin[:, None, :]
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class RopeScaling(Protocol):
    """A change of the frequencies that lets a model reach beyond the length that it was first trained on."""

    @property
    def attention_factor(self) -> float:
        """What cosine and sine are multiplied with."""

    def max_positions(self, configured: int) -> int:
        """The longest sequence, where the config's ``max_position_embeddings`` is ``configured``."""

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """The scaled frequencies, radians per position."""


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding of heads of ``head_dim`` features with base ``theta``."""

    head_dim: int
    theta: float = 10_000.0
    scaling: RopeScaling | None = None

    def frequencies(self) -> np.ndarray:
        """Radians per position of each pair of features, float32 ``[head_dim / 2]``."""
        frequencies = self.theta ** -(np.arange(0, self.head_dim, 2) / self.head_dim)
        if self.scaling is not None:
            frequencies = self.scaling.scale(frequencies, self.theta)
        return frequencies.astype(np.float32)

    def rotation(self, positions: jax.Array) -> Rotation:
        """The rotation of tokens at ``positions``, int32 ``[S]``."""
        angles = positions.astype(jnp.float32)[:, None] * self.frequencies()
        factor = 1.0 if self.scaling is None else self.scaling.attention_factor
        return Rotation(jnp.cos(angles) * factor, jnp.sin(angles) * factor)


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """All positions are divided by ``factor`` (position interpolation, arXiv:2306.15595)."""

    factor: float
    attention_factor: float = 1.0

    def max_positions(self, configured: int) -> int:
        """The trained length stretched."""
        return int(configured * self.factor)

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Every frequency lowered alike."""
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Low frequencies are divided by ``factor``, high ones kept, with a ramp in between (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int
    attention_factor: float = 1.0

    def max_positions(self, configured: int) -> int:
        """The config's limit, which already counts the stretching."""
        return configured

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Kept by how many full turns a pair makes over the original length."""
        turns = self.original_max_positions * frequencies / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return _blend(frequencies, frequencies / self.factor, np.clip(kept, 0.0, 1.0))


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """Frequencies below ``beta_slow`` turns are interpolated, above ``beta_fast`` kept (YaRN, arXiv:2309.00071)."""

    factor: float
    original_max_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def max_positions(self, configured: int) -> int:
        """The original length stretched."""
        return int(self.original_max_positions * self.factor)

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """A linear ramp over the index of the pair, between those that make ``beta_fast`` and ``beta_slow`` turns."""
        first, last = self._pair(self.beta_fast, frequencies, theta), self._pair(self.beta_slow, frequencies, theta)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * frequencies.size - 1)
        ramp = (np.arange(frequencies.size) - first) / max(last - first, 1e-3)
        return _blend(frequencies, frequencies / self.factor, 1.0 - np.clip(ramp, 0.0, 1.0))

    def _pair(self, turns: float, frequencies: np.ndarray, theta: float) -> float:
        """The (fractional) index of the pair that makes ``turns`` turns over the original length."""
        return frequencies.size * math.log(self.original_max_positions / (turns * 2 * math.pi)) / math.log(theta)


@dataclasses.dataclass(frozen=True)
class TabulatedScaling:
    """Each pair's frequency is divided by its own factor: how GGUF files store any of the above."""

    factors: tuple[float, ...]
    attention_factor: float = 1.0

    def max_positions(self, configured: int) -> int:
        """The config's limit, which already counts the stretching."""
        return configured

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Pair by pair."""
        scaled: np.ndarray = frequencies / np.asarray(self.factors)
        return scaled


def _blend(kept: np.ndarray, lowered: np.ndarray, share_kept: np.ndarray) -> np.ndarray:
    blended: np.ndarray = share_kept * kept + (1.0 - share_kept) * lowered
    return blended
