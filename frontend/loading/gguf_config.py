"""A GGUF file's metadata as a Hugging Face config, so that one reader serves both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from distaff.frontend.loading.checkpoint import StoredTensor, token_ids
from distaff.frontend.loading.errors import CheckpointFormatError
from distaff.frontend.models import ConfigError, UnsupportedArchitectureError

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
}

# Control tokens that end a turn whatever the metadata says, as llama.cpp has it.
_TURN_ENDS = {"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"}
_CONTROL = 3
_GEMMA2_27B_LAYERS = 46


def config_of_metadata(metadata: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """The ``config.json`` of the model in the file.

    Raises `UnsupportedArchitectureError`, `ConfigError`, or `CheckpointFormatError` for a file without a model.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise UnsupportedArchitectureError(architecture, sorted(_ARCHITECTURES))
    if "token_embd.weight" not in tensors:
        raise CheckpointFormatError("the GGUF file holds no token_embd.weight: it is not a language model")
    model = _Section(metadata, architecture)
    if model.get("expert_count"):
        raise ConfigError("the file holds a mixture of experts, which is not implemented for GGUF")
    heads = model.get("attention.head_count")
    config = {
        "architectures": [_ARCHITECTURES[architecture]],
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": model.get("embedding_length"),
        "intermediate_size": model.get("feed_forward_length"),
        "num_hidden_layers": model.get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": model.get("attention.head_count_kv"),
        "max_position_embeddings": model.get("context_length"),
        "rms_norm_eps": model.get("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "rope_theta": model.get("rope.freq_base"),
        "rope_scaling": _rope_scaling(model),
    }
    if not config["hidden_size"] or not heads:
        raise ConfigError(f"the GGUF file's metadata lack {architecture}.embedding_length or .attention.head_count")
    config["head_dim"] = model.get("attention.key_length") or config["hidden_size"] // heads
    config["partial_rotary_factor"] = (model.get("rope.dimension_count") or config["head_dim"]) / config["head_dim"]
    return config | _of_family(architecture, model, config)


def end_tokens(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end a generation, the declared end-of-sequence token first."""
    declared = [metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
    tokens, types = metadata.get("tokenizer.ggml.tokens", ()), metadata.get("tokenizer.ggml.token_type", ())
    pairs = enumerate(zip(tokens, types, strict=False))
    known = [i for i, (token, kind) in pairs if kind == _CONTROL and token in _TURN_ENDS]
    return token_ids([*declared, *known])


class _Section:
    """The metadata of one architecture."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self.metadata, self.architecture = metadata, architecture

    def get(self, name: str) -> Any:
        """The value, None if there is none; one that is given for each layer must be the same for all."""
        value = self.metadata.get(f"{self.architecture}.{name}")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise ConfigError(f"{self.architecture}.{name} differs between layers, which is not implemented")
            return value[0]
        return value


def _rope_scaling(model: _Section) -> dict[str, Any] | None:
    kind = model.get("rope.scaling.type")
    if kind in (None, "none"):
        return None
    factor = model.get("rope.scaling.factor")
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = model.get("rope.scaling.original_context_length")
        scaling["beta_fast"] = model.get("rope.scaling.yarn_beta_fast")
        scaling["beta_slow"] = model.get("rope.scaling.yarn_beta_slow")
        if (attention := model.get("rope.scaling.attn_factor")) is not None:
            scaling["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    return scaling


def _of_family(architecture: str, model: _Section, config: Mapping[str, Any]) -> dict[str, Any]:
    window = model.get("attention.sliding_window")
    if architecture == "llama" and window:
        return {"architectures": ["MistralForCausalLM"], "sliding_window": window}
    if architecture != "gemma2":
        return {}
    wide = config["num_hidden_layers"] == _GEMMA2_27B_LAYERS
    per_head = config["hidden_size"] // config["num_attention_heads"]
    return {
        "sliding_window": window,
        "attn_logit_softcapping": model.get("attn_logit_softcapping"),
        "final_logit_softcapping": model.get("final_logit_softcapping"),
        # Not in the metadata; llama.cpp goes by the model's size too.
        "query_pre_attn_scalar": per_head if wide else config["head_dim"],
    }
