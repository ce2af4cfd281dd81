"""Gemma 2 (arXiv:2408.00118): norms on both sides of attention and MLP, soft-capped scores and logits, and a sliding
window in every other layer. Norms scale by one plus their weight; token vectors are scaled by sqrt(hidden size).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from distaff.frontend import linen as nn
from distaff.frontend.models.attention import Attention
from distaff.frontend.models.config import ModelConfig
from distaff.frontend.models.layers import GatedMLP, RMSNorm, softcap, token_embedding, vocabulary_logits
from distaff.frontend.models.rope import Rotation


class Gemma2Block(nn.Module):
    """Attention and MLP, each between two norms and added to the stream."""

    config: ModelConfig
    window: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, rotation: Rotation) -> jax.Array:
        """``[B, S, embed]`` to the same shape."""
        y = self.norm("attention_norm")(x)
        y = Attention(self.config, self.window, name="attention")(y, rotation)
        x = x + self.norm("attention_output_norm")(y)
        y = self.norm("mlp_norm")(x)
        y = GatedMLP(self.config, name="mlp")(y)
        return x + self.norm("mlp_output_norm")(y)

    def norm(self, name: str) -> RMSNorm:
        """A norm that scales by one plus its weight."""
        return RMSNorm(self.config.norm_epsilon, offset=1.0, name=name)


class Gemma2(nn.Module):
    """A decoder-only language model."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 ``[B, S]`` to float32 logits ``[B, S, vocab]``."""
        config = self.config
        embed = token_embedding(config)
        rotation = config.rope.rotation(jnp.arange(tokens.shape[1]))
        x = embed(tokens)
        x = x * jnp.asarray(config.hidden_size**0.5, x.dtype)
        for i, window in enumerate(config.windows):
            x = Gemma2Block(config, window, name=f"layers_{i}")(x, rotation)
        x = RMSNorm(config.norm_epsilon, offset=1.0, name="norm")(x)
        return softcap(vocabulary_logits(config, embed, x), config.logit_softcap)
