"""Llama and its kin as NNX modules: the config, arithmetic and parameter tree of ``models.llama``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distaff.frontend import nnx
from distaff.frontend.models.attention import attend
from distaff.frontend.models.config import ModelConfig
from distaff.frontend.models.errors import UnsupportedArchitectureError
from distaff.frontend.models.layers import ACTIVATIONS, NORMAL, rms_norm
from distaff.frontend.models.rope import Rotation


def _axes(*names: str) -> dict[str, Any]:
    """Metadata of a variable whose dimensions have these logical names; it is laid out where rules and a mesh are."""
    return {"out_sharding": names, "eager_sharding": False}


class RMSNorm(nnx.Module):
    """Root mean square normalisation over the last axis."""

    def __init__(self, size: int, epsilon: float, axis: str = "embed") -> None:
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(size), **_axes(axis))

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[..., size]`` to the same shape and dtype."""
        return rms_norm(x, self.scale[...], self.epsilon)


class GatedMLP(nnx.Module):
    """``down(activation(gate(x)) * up(x))``."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        def linear(sizes: tuple[int, int], source: str, target: str) -> nnx.Linear:
            return nnx.Linear(
                *sizes,
                use_bias=config.mlp_bias,
                dtype=config.dtype,
                kernel_init=NORMAL,
                kernel_metadata=_axes(source, target),
                bias_metadata=_axes(target),
                rngs=rngs,
            )

        outer, inner = config.hidden_size, config.intermediate_size
        self.activation = config.activation
        self.gate = linear((outer, inner), "embed", "mlp")
        self.up = linear((outer, inner), "embed", "mlp")
        self.down = linear((inner, outer), "mlp", "embed")

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[B, S, embed]`` to the same shape."""
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))


class Attention(nnx.Module):
    """Self-attention in which a token sees itself and at most ``window - 1`` tokens before it (all, if None)."""

    def __init__(self, config: ModelConfig, window: int | None, rngs: nnx.Rngs) -> None:
        def project(heads: int, axis: str) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                config.hidden_size,
                (heads, config.head_dim),
                use_bias=config.qkv_bias,
                dtype=config.dtype,
                kernel_init=NORMAL,
                kernel_metadata=_axes("embed", axis, "head_dim"),
                bias_metadata=_axes(axis, "head_dim"),
                rngs=rngs,
            )

        self.config = config
        self.window = window
        self.query = project(config.num_heads, "heads")
        self.key = project(config.num_kv_heads, "kv_heads")
        self.value = project(config.num_kv_heads, "kv_heads")
        if config.qk_norm:
            self.query_norm = RMSNorm(config.head_dim, config.norm_epsilon, "head_dim")
            self.key_norm = RMSNorm(config.head_dim, config.norm_epsilon, "head_dim")
        self.output = nnx.LinearGeneral(
            (config.num_heads, config.head_dim),
            config.hidden_size,
            axis=(-2, -1),
            use_bias=config.output_bias,
            dtype=config.dtype,
            kernel_init=NORMAL,
            kernel_metadata=_axes("heads", "head_dim", "embed"),
            bias_metadata=_axes("embed"),
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, rotation: Rotation) -> jax.Array:
        """``[B, S, embed]`` to the same shape."""
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        return self.output(attend(self.config, self.window, rotation(query), rotation(key), value))


class LlamaBlock(nnx.Module):
    """Attention and MLP, each on a normalised input and added to the stream."""

    def __init__(self, config: ModelConfig, window: int | None, rngs: nnx.Rngs) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.attention = Attention(config, window, rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.mlp = GatedMLP(config, rngs)

    def __call__(self, x: jax.Array, rotation: Rotation) -> jax.Array:
        """``[B, S, embed]`` to the same shape."""
        x = x + self.attention(self.attention_norm(x), rotation)
        return x + self.mlp(self.mlp_norm(x))


def check_architecture(config: ModelConfig) -> None:
    """Raise UnsupportedArchitectureError if the config is of a family with another block."""
    if config.architecture == "gemma2":
        raise UnsupportedArchitectureError(
            "gemma2", ["llama and its kin; gemma2 is offered in Linen: build_model(config)"]
        )


class Llama(nnx.Module):
    """A decoder-only language model.

    >>> model = Llama(config, rngs=nnx.Rngs(0))
    >>> model = load_model("smollm2-135m", api="nnx").module  # of a checkpoint
    >>> graphdef, params = nnx.split(model)
    >>> compile_model(lambda params, tokens: nnx.merge(graphdef, params)(tokens), params, output=folder, ...)
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        """Make the parameters.

        Raises:
            UnsupportedArchitectureError: the config is of a family with another block.
        """
        check_architecture(config)
        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=config.dtype,
            embedding_init=NORMAL,
            embedding_metadata=_axes("vocab", "embed"),
            rngs=rngs,
        )
        for i, window in enumerate(config.windows):
            setattr(self, f"layers_{i}", LlamaBlock(config, window, rngs))
        self.norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        if not config.tied_embeddings:
            self.head = nnx.Linear(
                config.hidden_size,
                config.vocab_size,
                use_bias=False,
                dtype=config.dtype,
                kernel_init=NORMAL,
                kernel_metadata=_axes("embed", "vocab"),
                rngs=rngs,
            )

    @classmethod
    def from_params(cls, config: ModelConfig, params: Mapping[str, Any]) -> Llama:
        """The model of a parameter tree, as ``load_model`` gives it: ``{"embed": {"embedding": ...}, ...}``.

        Raises:
            ValueError: the tree has other parameters than the model.
        """
        graphdef, state = nnx.split(nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0))))
        nnx.replace_by_pure_dict(state, dict(params))
        missing = [path for path, v in nnx.to_flat_state(state) if isinstance(v.get_raw_value(), jax.ShapeDtypeStruct)]
        if missing:
            raise ValueError(
                f"The parameters {['.'.join(map(str, path)) for path in missing]} are not in the tree given."
            )
        model: Llama = nnx.merge(graphdef, state)
        return model

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 ``[B, S]`` to float32 logits ``[B, S, vocab]``."""
        rotation = self.config.rope.rotation(jnp.arange(tokens.shape[1]))
        x = self.embed(tokens)
        for i in range(self.config.num_layers):
            x = getattr(self, f"layers_{i}")(x, rotation)
        x = self.norm(x)
        logits = self.embed.attend(x) if self.config.tied_embeddings else self.head(x)
        return logits.astype(jnp.float32)
