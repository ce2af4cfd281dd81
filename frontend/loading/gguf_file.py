"""Opening a GGUF file: tensors under their Hugging Face names and in Hugging Face layout, dequantised as they are read.

The blocks of quantised matrices can be had as they are, too.

llama.cpp's converter stores three things otherwise than Hugging Face does, and they are undone here: in architecture
"llama" the rows of queries and keys are reordered for interleaved rotary pairs, Gemma's norms contain their "one
plus", and stretched rotary frequencies come as the tensor ``rope_freqs.weight``.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import numpy as np

from distaff.compiler.ir import StoredBlocks
from distaff.frontend.loading.checkpoint import Checkpoint, StoredTensor
from distaff.frontend.loading.errors import CheckpointFormatError, MissingDependencyError
from distaff.frontend.loading.gguf_config import config_of_metadata, end_tokens
from distaff.frontend.models import ConfigError, ModelConfig
from distaff.frontend.models.rope import TabulatedScaling

_ROPE_FACTORS = "rope_freqs.weight"

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "blk.{}.attn_k_norm": "model.layers.{}.self_attn.k_norm",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}

_GEMMA2_NAMES = _NAMES | {
    "blk.{}.post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_norm": "model.layers.{}.pre_feedforward_layernorm",
    "blk.{}.post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
}


def open_gguf(path: Path, dtype: str) -> Checkpoint:
    """Opens a GGUF file, to be computed in ``dtype``.

    Raises `CheckpointFormatError`, `TokenizerFormatError`, `MissingDependencyError`, or `ConfigError`.
    """
    try:
        import gguf

        from distaff.frontend.loading.gguf_tokenizer import tokenizer_of_metadata
    except ImportError as error:
        raise MissingDependencyError(error.name or "gguf", "gguf", f"reading {path.name}") from None
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise CheckpointFormatError(f"{path} is not a whole GGUF file: {error}") from error
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    if metadata.get("split.count", 1) > 1:
        raise CheckpointFormatError(f"{path} is a part of a split file; join the parts with llama.cpp's gguf-split")
    stored = {tensor.name: _tensor(tensor, path) for tensor in reader.tensors}
    factors = stored.pop(_ROPE_FACTORS, None)
    config = ModelConfig.from_hf(config_of_metadata(metadata, stored), dtype=dtype)
    if factors is not None:
        config = _with_rope_factors(config, factors)
    architecture = metadata["general.architecture"]
    tensors = {_hf_name(name, architecture): _undo(name, t, architecture, config) for name, t in stored.items()}
    return Checkpoint(
        path=path,
        config=config,
        files=(path,),
        tensors=tensors,
        eos_token_ids=end_tokens(metadata),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        tokenizer=tokenizer_of_metadata(metadata),
    )


def _tensor(tensor: Any, path: Path) -> StoredTensor:
    """A tensor as it lies in the file. GGUF names dimensions from the innermost out."""
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return StoredTensor(
        shape, int(tensor.n_bytes), functools.partial(_dequantize, tensor, shape, path), _blocks(tensor, shape)
    )


def _blocks(tensor: Any, shape: tuple[int, ...]) -> StoredBlocks | None:
    import gguf

    block_size, _ = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    if block_size == 1 or len(shape) != 2:
        return None
    return StoredBlocks(tensor.tensor_type.name, (shape[0], shape[1]), lambda: tensor.data.reshape(shape[0], -1))


def _dequantize(tensor: Any, shape: tuple[int, ...], path: Path) -> np.ndarray:
    import gguf

    try:
        values: np.ndarray = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        kind = tensor.tensor_type.name
        raise CheckpointFormatError(f"{path}: {tensor.name} is stored as {kind}, which cannot be read") from None
    return values.reshape(shape)


def _hf_name(name: str, architecture: str) -> str:
    """The Hugging Face name; an unknown one is left as it is, to be listed as not part of the model."""
    stem, _, kind = name.rpartition(".")
    layer = re.match(r"blk\.(\d+)\.", stem)
    pattern = stem if layer is None else f"blk.{{}}.{stem[layer.end() :]}"
    known = (_GEMMA2_NAMES if architecture == "gemma2" else _NAMES).get(pattern)
    return name if known is None else f"{known.format(layer[1] if layer else '')}.{kind}"


def _undo(name: str, tensor: StoredTensor, architecture: str, config: ModelConfig) -> StoredTensor:
    """The tensor with the converter's change undone, if it made one."""
    if architecture == "llama" and re.search(r"\.attn_q\.(weight|bias)$", name):
        return tensor.reordered(functools.partial(_halves_together, heads=config.num_heads))
    if architecture == "llama" and re.search(r"\.attn_k\.(weight|bias)$", name):
        return tensor.reordered(functools.partial(_halves_together, heads=config.num_kv_heads))
    if architecture == "gemma2" and name.endswith("norm.weight"):
        return dataclasses.replace(tensor, read=lambda: tensor.read() - 1, blocks=None)
    return tensor


def _halves_together(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from rotary pairs side by side to first halves, then second halves."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _with_rope_factors(config: ModelConfig, tensor: StoredTensor) -> ModelConfig:
    if config.rope.scaling is not None:
        raise ConfigError(f"the file scales rotary frequencies twice: in its metadata and by {_ROPE_FACTORS}")
    factors = tuple(float(factor) for factor in tensor.read().reshape(-1))
    if len(factors) != config.head_dim // 2:
        raise ConfigError(f"{_ROPE_FACTORS} holds {len(factors)} factors; expected {config.head_dim // 2}")
    return dataclasses.replace(config, rope=dataclasses.replace(config.rope, scaling=TabulatedScaling(factors)))
