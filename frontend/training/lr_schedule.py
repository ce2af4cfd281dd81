"""Learning rates as functions of the step, under the names that Flax has them. Optax's schedules do more.

All take a base rate, the number of steps an epoch, and ``warmup_length`` epochs in which the rate rises from 0
(arXiv:1706.02677).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

Schedule = Callable[[Any], Any]


def _with_warmup(rate: Schedule, steps_per_epoch: int, warmup_length: float) -> Schedule:
    if warmup_length <= 0.0:
        return rate
    return lambda step: rate(step) * jnp.minimum(1.0, step / float(warmup_length) / steps_per_epoch)


def create_constant_learning_rate_schedule(
    base_learning_rate: float, steps_per_epoch: int, warmup_length: float = 0.0
) -> Schedule:
    """The base rate throughout."""
    return _with_warmup(lambda step: base_learning_rate, steps_per_epoch, warmup_length)


def create_stepped_learning_rate_schedule(
    base_learning_rate: float,
    steps_per_epoch: int,
    lr_sched_steps: Sequence[Sequence[float]],
    warmup_length: float = 0.0,
) -> Schedule:
    """The base rate times the factor of the last of ``lr_sched_steps``, pairs of epoch and factor, that has passed."""
    boundaries = np.round(np.array([epoch for epoch, _ in lr_sched_steps]) * steps_per_epoch).astype(int)
    rates = np.array([1.0, *(factor for _, factor in lr_sched_steps)]) * base_learning_rate

    def rate(step: Any) -> Any:
        return jnp.take(rates, jnp.sum(boundaries < step))

    return _with_warmup(rate, steps_per_epoch, warmup_length)


def create_cosine_learning_rate_schedule(
    base_learning_rate: float, steps_per_epoch: int, halfcos_epochs: float, warmup_length: float = 0.0
) -> Schedule:
    """The base rate falling to 0 along half a cosine, which takes ``halfcos_epochs`` epochs."""
    half_wave = halfcos_epochs * steps_per_epoch

    def rate(step: Any) -> Any:
        return base_learning_rate * (jnp.cos(step * jnp.pi / half_wave) * 0.5 + 0.5)

    return _with_warmup(rate, steps_per_epoch, warmup_length)
