"""What decoder blocks of all families are built of, besides attention: norms, the gated MLP, embeddings.

Every parameter names its logical axes ("vocab", "embed", "heads", "kv_heads", "head_dim", "mlp"); rules map these to
a mesh. Matrix products run in ``config.dtype``, normalisation in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp

from distaff.frontend import linen as nn
from distaff.frontend.models.config import ModelConfig

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}
NORMAL = nn.initializers.normal(0.02)


def partitioned(*axes: str, init: nn.initializers.Initializer = NORMAL) -> nn.initializers.Initializer:
    """The initializer of a parameter whose dimensions have these logical names."""
    return cast(nn.initializers.Initializer, nn.with_logical_partitioning(init, axes))


class RMSNorm(nn.Module):
    """Root mean square normalisation over the last axis (arXiv:1910.07467), scaled by ``offset`` plus a weight."""

    epsilon: float
    offset: float = 0.0
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[..., size]`` to the same shape and dtype."""
        init = partitioned(self.axis, init=nn.initializers.constant(1.0 - self.offset))
        scale: jax.Array = self.param("scale", init, (x.shape[-1],))
        return rms_norm(x, scale, self.epsilon, self.offset)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float, offset: float = 0.0) -> jax.Array:
    """``x`` over its root mean square along the last axis, times ``offset + scale``; computed in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + epsilon)
    return (y * (offset + scale.astype(jnp.float32))).astype(x.dtype)


class GatedMLP(nn.Module):
    """``down(activation(gate(x)) * up(x))`` (arXiv:2002.05202)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[B, S, embed]`` to the same shape."""
        activation = ACTIVATIONS[self.config.activation]
        gate = self.linear("gate", self.config.intermediate_size, "embed", "mlp")(x)
        up = self.linear("up", self.config.intermediate_size, "embed", "mlp")(x)
        return self.linear("down", self.config.hidden_size, "mlp", "embed")(activation(gate) * up)

    def linear(self, name: str, size: int, source: str, target: str) -> nn.Dense:
        """A product with a matrix from axis ``source`` to axis ``target`` of ``size`` features."""
        return nn.Dense(
            size,
            use_bias=self.config.mlp_bias,
            dtype=self.config.dtype,
            kernel_init=partitioned(source, target),
            bias_init=partitioned(target, init=nn.initializers.zeros),
            name=name,
        )


def token_embedding(config: ModelConfig) -> nn.Embed:
    """The table of token vectors: int32 ``[B, S]`` to ``[B, S, embed]``."""
    return nn.Embed(
        config.vocab_size,
        config.hidden_size,
        dtype=config.dtype,
        embedding_init=partitioned("vocab", "embed"),
        name="embed",
    )


def vocabulary_logits(config: ModelConfig, embed: nn.Embed, x: jax.Array) -> jax.Array:
    """``[B, S, embed]`` to float32 ``[B, S, vocab]``, by the embedding table itself if the model ties the two."""
    if config.tied_embeddings:
        logits = embed.attend(x)
    else:
        init = partitioned("embed", "vocab")
        logits = nn.Dense(config.vocab_size, use_bias=False, dtype=config.dtype, kernel_init=init, name="head")(x)
    return logits.astype(jnp.float32)


def softcap(x: jax.Array, limit: float | None) -> jax.Array:
    """Squeezes ``x`` smoothly into (-limit, limit); leaves it alone if there is no limit."""
    return x if limit is None else limit * jnp.tanh(x / limit)
