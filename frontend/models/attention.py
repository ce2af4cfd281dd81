"""Causal self-attention with grouped key-value heads, written over the whole sequence.

Several query heads share one key-value head (arXiv:2305.13245). Scores and softmax are float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from distaff.frontend import linen as nn
from distaff.frontend.models.config import ModelConfig
from distaff.frontend.models.layers import RMSNorm, partitioned, softcap
from distaff.frontend.models.rope import Rotation


class Attention(nn.Module):
    """Self-attention in which a token sees itself and at most ``window - 1`` tokens before it (all, if None)."""

    config: ModelConfig
    window: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, rotation: Rotation) -> jax.Array:
        """``[B, S, embed]`` to the same shape."""
        config = self.config
        query = self.project("query", config.num_heads, "heads")(x)
        key = self.project("key", config.num_kv_heads, "kv_heads")(x)
        value = self.project("value", config.num_kv_heads, "kv_heads")(x)
        if config.qk_norm:
            query = RMSNorm(config.norm_epsilon, axis="head_dim", name="query_norm")(query)
            key = RMSNorm(config.norm_epsilon, axis="head_dim", name="key_norm")(key)
        heads = attend(config, self.window, rotation(query), rotation(key), value)
        return nn.DenseGeneral(
            config.hidden_size,
            axis=(-2, -1),
            use_bias=config.output_bias,
            dtype=config.dtype,
            kernel_init=partitioned("heads", "head_dim", "embed"),
            bias_init=partitioned("embed", init=nn.initializers.zeros),
            name="output",
        )(heads)

    def project(self, name: str, heads: int, axis: str) -> nn.DenseGeneral:
        """``[B, S, embed]`` to ``[B, S, heads, head_dim]``."""
        return nn.DenseGeneral(
            (heads, self.config.head_dim),
            use_bias=self.config.qkv_bias,
            dtype=self.config.dtype,
            kernel_init=partitioned("embed", axis, "head_dim"),
            bias_init=partitioned(axis, "head_dim", init=nn.initializers.zeros),
            name=name,
        )


def attend(config: ModelConfig, window: int | None, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Weighted means of values: query ``[B, S, heads, D]``, key and value ``[B, S, kv_heads, D]``."""
    batch, length = query.shape[:2]
    grouped = query.reshape(batch, length, config.num_kv_heads, -1, config.head_dim)
    scores = jnp.einsum("bqngd,bknd->bngqk", grouped, key, preferred_element_type=jnp.float32)
    scores = softcap(scores * config.attention_scale, config.attention_softcap)
    scores = jnp.where(visible(length, window), scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bngqk,bknd->bqngd", weights, value).reshape(query.shape)


def visible(length: int, window: int | None) -> jax.Array:
    """Which key each query sees: bool ``[S, S]``."""
    positions = jnp.arange(length)
    query, key = positions[:, None], positions[None, :]
    causal = key <= query
    return causal if window is None else causal & (key > query - window)
