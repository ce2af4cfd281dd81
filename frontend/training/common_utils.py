"""Small helpers of data-parallel training loops with ``jax.pmap``, under the names that Flax has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def shard(xs: Any) -> Any:
    """Reshape the arrays of a tree from ``[B, …]`` to ``[local devices, B / local devices, …]``."""
    count = jax.local_device_count()
    return jax.tree.map(lambda x: x.reshape((count, -1) + x.shape[1:]), xs)


def shard_prng_key(prng_key: jax.Array) -> jax.Array:
    """One random key for each local device."""
    return jax.random.split(prng_key, jax.local_device_count())


def stack_forest(forest: Sequence[Any]) -> Any:
    """A sequence of trees of the same structure as one tree of stacked leaves."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *forest)


def get_metrics(device_metrics: Sequence[Any]) -> Any:
    """Metrics of successive steps, each replicated over devices, as one tree of arrays over the steps."""
    first = jax.tree.map(lambda x: x.addressable_shards[0].data.squeeze(0), device_metrics)
    return stack_forest(jax.device_get(first))


def onehot(labels: jax.Array, num_classes: int, on_value: float = 1.0, off_value: float = 0.0) -> jax.Array:
    """float32 ``[…, num_classes]`` with ``on_value`` at the label and ``off_value`` elsewhere."""
    return jnp.where(labels[..., None] == jnp.arange(num_classes), on_value, off_value).astype(jnp.float32)
