"""Writes GGUF files as llama.cpp's converter does, from the weights of a transformers model."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

ARCHITECTURES = {"Llama": "llama", "Mistral": "llama", "Qwen2": "qwen2", "Qwen3": "qwen3", "Gemma2": "gemma2"}

STEMS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA2_STEMS = STEMS | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """From halves to interleaved pairs, head by head, index by index."""
    size = rows.shape[0] // heads
    order = [head * size + part * size // 2 + i for head in range(heads) for i in range(size // 2) for part in (0, 1)]
    return rows[order]


def converted(model: Any, family: str) -> dict[str, np.ndarray]:
    """The model's tensors under GGUF names, in float32, changed as the converter changes them."""
    config, tensors = model.config, {}
    stems = GEMMA2_STEMS if family == "Gemma2" else STEMS
    for name, tensor in model.state_dict().items():
        value = tensor.float().numpy().copy()
        if family in ("Llama", "Mistral") and ".q_proj." in name:
            value = permute(value, config.num_attention_heads)
        if family in ("Llama", "Mistral") and ".k_proj." in name:
            value = permute(value, config.num_key_value_heads)
        if family == "Gemma2" and name.endswith("norm.weight"):
            value += 1
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        tensors[_gguf_name(name, stems)] = value
    return tensors


def _gguf_name(name: str, stems: Mapping[str, str]) -> str:
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
        return f"blk.{match[1]}.{stems[match[2]]}.{match[3]}"
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, kind = name.rpartition(".")
    return f"{whole[stem]}.{kind}"


def numpy_tensors(hidden=8, vocab=20, seed=0):
    """A llama of one layer, hand-made: 2 heads, 1 kv head, head_dim hidden // 2."""
    rng = np.random.default_rng(seed)
    size = hidden // 2
    shapes = {
        "token_embd.weight": (vocab, hidden),
        "output_norm.weight": (hidden,),
        "blk.0.attn_norm.weight": (hidden,),
        "blk.0.ffn_norm.weight": (hidden,),
        "blk.0.attn_q.weight": (hidden, hidden),
        "blk.0.attn_k.weight": (size, hidden),
        "blk.0.attn_v.weight": (size, hidden),
        "blk.0.attn_output.weight": (hidden, hidden),
        "blk.0.ffn_gate.weight": (hidden, hidden),
        "blk.0.ffn_up.weight": (hidden, hidden),
        "blk.0.ffn_down.weight": (hidden, hidden),
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def metadata(hidden=8, **changes):
    fields = {
        "context_length": 64,
        "embedding_length": hidden,
        "feed_forward_length": hidden,
        "block_count": 1,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": hidden // 2,
    } | changes
    return {name: value for name, value in fields.items() if value is not None}


def write_gguf(
    path: Path,
    architecture: str,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, Any],
    quantise: Callable[[str, np.ndarray], Any] = lambda name, value: None,
) -> Path:
    """Writes the file; ``quantise`` gives the type to store a tensor in, or None to leave it float32.

    Metadata names without a dot in front belong to the architecture; values say their own type, see `_add`.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for name, value in metadata.items():
        _add(writer, name if name.startswith(("tokenizer.", "general.", "split.")) else f"{architecture}.{name}", value)
    for name, value in tensors.items():
        kind = quantise(name, value)
        if kind is None:
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, name: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(name, value)
        case int():
            writer.add_uint32(name, value)
        case float():
            writer.add_float32(name, value)
        case str():
            writer.add_string(name, value)
        case list():
            writer.add_array(name, value)
        case _:
            raise TypeError(f"{name}: {value!r}")


def model_metadata(config: Any, architecture: str) -> dict[str, Any]:
    """What the converter writes of a transformers config."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    metadata = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "vocab_size": config.vocab_size,
    }
    if architecture == "llama":
        metadata["rope.dimension_count"] = head_dim
    if architecture == "gemma2":
        metadata["attention.sliding_window"] = config.sliding_window
        metadata["attn_logit_softcapping"] = config.attn_logit_softcapping
        metadata["final_logit_softcapping"] = config.final_logit_softcapping
    return metadata


def reference_from_gguf(path: Path, config: Any = None) -> Any:
    """The transformers model of a file, by transformers' own reading of its tensors (and config), in float32."""
    import gguf
    import torch
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    if config is None:
        config = transformers.AutoConfig.for_model(**load_gguf_checkpoint(str(path))["config"])
    config._attn_implementation = "eager"
    model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        names_only = model_class(config)
    # transformers makes this map, which is slow to make, for each submodule
    with mock.patch.object(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)):
        tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=names_only)["tensors"]
    return model_class.from_pretrained(None, config=config, state_dict=tensors).eval()
