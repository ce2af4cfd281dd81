"""Llama and its kin: SmolLM2, Mistral, Qwen2 and Qwen3 differ from it by a few switches of the config.

Sources: arXiv:2307.09288 (Llama 2), arXiv:2407.21783 (Llama 3), arXiv:2310.06825 (Mistral, sliding window),
arXiv:2407.10671 (Qwen2, biases of queries, keys and values), arXiv:2505.09388 (Qwen3, norms of queries and keys).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from distaff.frontend import linen as nn
from distaff.frontend.models.attention import Attention
from distaff.frontend.models.config import ModelConfig
from distaff.frontend.models.layers import GatedMLP, RMSNorm, token_embedding, vocabulary_logits
from distaff.frontend.models.rope import Rotation


class LlamaBlock(nn.Module):
    """Attention and MLP, each on a normalised input and added to the stream."""

    config: ModelConfig
    window: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, rotation: Rotation) -> jax.Array:
        """``[B, S, embed]`` to the same shape."""
        epsilon = self.config.norm_epsilon
        y = RMSNorm(epsilon, name="attention_norm")(x)
        x = x + Attention(self.config, self.window, name="attention")(y, rotation)
        y = RMSNorm(epsilon, name="mlp_norm")(x)
        return x + GatedMLP(self.config, name="mlp")(y)


class Llama(nn.Module):
    """A decoder-only language model."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 ``[B, S]`` to float32 logits ``[B, S, vocab]``."""
        config = self.config
        embed = token_embedding(config)
        rotation = config.rope.rotation(jnp.arange(tokens.shape[1]))
        x = embed(tokens)
        for i, window in enumerate(config.windows):
            x = LlamaBlock(config, window, name=f"layers_{i}")(x, rotation)
        x = RMSNorm(config.norm_epsilon, name="norm")(x)
        return vocabulary_logits(config, embed, x)
