"""The shape of a model, read from the ``config.json`` that Hugging Face checkpoints carry.

One dataclass serves all families: what is special to a family is a field here and a few lines in `_FAMILIES`. A field
that this reader does not know how to honour is refused, never ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Self

from distaff.frontend.models.config_fields import Fields
from distaff.frontend.models.errors import ConfigError, UnsupportedArchitectureError
from distaff.frontend.models.rope import Rope
from distaff.frontend.models.rope_config import read_rope

DTYPES = ("float32", "bfloat16", "float16")

_ACTIVATION_NAMES = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a decoder-only language model; ``dtype`` is what matrix products are computed in."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: Rope
    windows: tuple[int | None, ...]
    attention_scale: float
    norm_epsilon: float = 1e-6
    activation: str = "silu"
    tied_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    dtype: str = "float32"

    @property
    def max_model_len(self) -> int:
        """The longest sequence, in tokens, that the position embedding is made for."""
        scaling = self.rope.scaling
        configured = self.max_position_embeddings
        return configured if scaling is None else scaling.max_positions(configured)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, dtype: str = "float32") -> Self:
        """Reads the contents of a ``config.json``, as transformers 4 or 5 writes it.

        Raises `UnsupportedArchitectureError`, or `ConfigError` that names the field.
        """
        if dtype not in DTYPES:
            raise ConfigError(f"dtype is {dtype!r}; known are {', '.join(DTYPES)}")
        fields = Fields(config)
        family = _family(fields)
        if config.get("quantization_config") is not None:
            raise ConfigError("quantization_config: quantised checkpoints of this kind are not supported; use GGUF")
        heads = fields.size("num_attention_heads")
        kv_heads = fields.size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise fields.error("num_key_value_heads", f"must divide num_attention_heads ({heads})")
        head_dim = fields.size("head_dim", fields.size("hidden_size") // heads)
        if head_dim % 2:
            raise fields.error("head_dim", f"is {head_dim}; rotary embedding pairs features, so it must be even")
        max_positions = fields.size("max_position_embeddings")
        shared = dict(
            architecture=family,
            vocab_size=fields.size("vocab_size"),
            hidden_size=fields.size("hidden_size"),
            intermediate_size=fields.size("intermediate_size"),
            num_layers=fields.size("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rope=read_rope(fields, head_dim, max_positions),
            windows=(None,) * fields.size("num_hidden_layers"),
            attention_scale=head_dim**-0.5,
            norm_epsilon=fields.positive("rms_norm_eps", 1e-6),
            activation=_activation(fields, "hidden_act"),
            tied_embeddings=fields.flag("tie_word_embeddings", False),
            dtype=dtype,
        )
        return cls(**(shared | _FAMILIES[family](fields)))


def _llama(fields: Fields) -> dict[str, Any]:
    bias = fields.flag("attention_bias", False)
    return dict(qkv_bias=bias, output_bias=bias, mlp_bias=fields.flag("mlp_bias", False))


def _mistral(fields: Fields) -> dict[str, Any]:
    window = fields.optional_size("sliding_window", 4096)
    return dict(windows=(window,) * fields.size("num_hidden_layers"))


def _qwen2(fields: Fields) -> dict[str, Any]:
    """The last layers have a window, from ``max_window_layers`` on, if windows are switched on at all."""
    layers = fields.size("num_hidden_layers")
    window = fields.optional_size("sliding_window", 4096) if fields.flag("use_sliding_window", False) else None
    first = fields.whole("max_window_layers", 28)
    types = ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)]
    return dict(qkv_bias=True, windows=_windows(fields, window, types))


def _qwen3(fields: Fields) -> dict[str, Any]:
    fields.size("head_dim")
    bias = fields.flag("attention_bias", False)
    return _qwen2(fields) | dict(qkv_bias=bias, output_bias=bias, qk_norm=True)


def _gemma2(fields: Fields) -> dict[str, Any]:
    """Every other layer has a window, beginning with the first."""
    fields.size("head_dim")
    if fields.flag("use_bidirectional_attention", False):
        raise fields.error("use_bidirectional_attention", "is true; only causal attention can be served")
    bias = fields.flag("attention_bias", False)
    window = fields.optional_size("sliding_window", 4096)
    layers = fields.size("num_hidden_layers")
    types = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    return dict(
        qkv_bias=bias,
        output_bias=bias,
        windows=_windows(fields, window, types),
        attention_scale=fields.positive("query_pre_attn_scalar", 256) ** -0.5,
        activation=_activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
        attention_softcap=fields.optional_positive("attn_logit_softcapping", 50.0),
        logit_softcap=fields.optional_positive("final_logit_softcapping", 30.0),
        tied_embeddings=fields.flag("tie_word_embeddings", True),
    )


_FAMILIES: dict[str, Callable[[Fields], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
}

_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
}


def _family(fields: Fields) -> str:
    """``architectures`` says what the checkpoint holds; a config without it is taken by its ``model_type``."""
    names = fields.data.get("architectures")
    if isinstance(names, list) and names:
        family = _ARCHITECTURES.get(names[0]) if isinstance(names[0], str) else None
        found = names[0]
    else:
        found = fields.data.get("model_type")
        family = found if isinstance(found, str) and found in _FAMILIES else None
    if family is None:
        raise UnsupportedArchitectureError(found, sorted(_ARCHITECTURES))
    return family


def _activation(fields: Fields, name: str, default: str = "silu") -> str:
    found = fields.data.get(name) or default
    if not isinstance(found, str) or found not in _ACTIVATION_NAMES:
        raise fields.error(name, f"is {found!r}; known are {', '.join(_ACTIVATION_NAMES)}")
    return _ACTIVATION_NAMES[found]


def _windows(fields: Fields, window: int | None, default_types: list[str]) -> tuple[int | None, ...]:
    """The window of each layer: ``window`` where ``layer_types`` says that attention is sliding."""
    types = fields.data.get("layer_types") or default_types
    known = {"full_attention": None, "sliding_attention": window}
    listed = isinstance(types, list) and len(types) == len(default_types)
    if not listed or not all(isinstance(t, str) and t in known for t in types):
        raise fields.error("layer_types", f"must list {len(default_types)} of {', '.join(known)}")
    return tuple(known[t] for t in types)
