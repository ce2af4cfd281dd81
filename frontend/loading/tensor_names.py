"""Which tensor of a checkpoint fills which parameter of a module: one table a family, for every file format.

Names are Hugging Face's, with ``{}`` for the number of the layer. A row names a tensor, a parameter and the layout.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re

import numpy as np

from distaff.frontend.models import ModelConfig


class Layout(enum.Enum):
    """How a stored tensor relates to the parameter."""

    TABLE = "the same"
    VECTOR = "flattened"
    LINEAR = "[outputs, inputs], where the parameter is [inputs, outputs …]"
    FROM_HEADS = "[outputs, inputs], where the parameter is [heads, head size, outputs]"

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape for a parameter of ``shape``."""
        match self:
            case Layout.TABLE:
                return shape
            case Layout.VECTOR:
                return (math.prod(shape),)
            case Layout.LINEAR:
                return (math.prod(shape[1:]), shape[0])
            case Layout.FROM_HEADS:
                return (shape[-1], math.prod(shape[:-1]))

    def arrange(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor as the parameter of ``shape``; a view."""
        transposed = self in (Layout.LINEAR, Layout.FROM_HEADS)
        return (tensor.T if transposed else tensor).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Row:
    """The tensor ``name`` fills the parameter at ``path`` (keys joined by slashes)."""

    name: str
    path: str
    layout: Layout

    def of_layer(self, layer: int) -> Row:
        """The row of one layer."""
        return Row(self.name.format(layer), self.path.format(layer), self.layout)


_SHARED = (
    Row("model.embed_tokens.weight", "embed/embedding", Layout.TABLE),
    Row("model.norm.weight", "norm/scale", Layout.VECTOR),
    Row("lm_head.weight", "head/kernel", Layout.LINEAR),
    Row("model.layers.{}.input_layernorm.weight", "layers_{}/attention_norm/scale", Layout.VECTOR),
    Row("model.layers.{}.self_attn.q_proj.weight", "layers_{}/attention/query/kernel", Layout.LINEAR),
    Row("model.layers.{}.self_attn.q_proj.bias", "layers_{}/attention/query/bias", Layout.VECTOR),
    Row("model.layers.{}.self_attn.k_proj.weight", "layers_{}/attention/key/kernel", Layout.LINEAR),
    Row("model.layers.{}.self_attn.k_proj.bias", "layers_{}/attention/key/bias", Layout.VECTOR),
    Row("model.layers.{}.self_attn.v_proj.weight", "layers_{}/attention/value/kernel", Layout.LINEAR),
    Row("model.layers.{}.self_attn.v_proj.bias", "layers_{}/attention/value/bias", Layout.VECTOR),
    Row("model.layers.{}.self_attn.o_proj.weight", "layers_{}/attention/output/kernel", Layout.FROM_HEADS),
    Row("model.layers.{}.self_attn.o_proj.bias", "layers_{}/attention/output/bias", Layout.VECTOR),
    Row("model.layers.{}.mlp.gate_proj.weight", "layers_{}/mlp/gate/kernel", Layout.LINEAR),
    Row("model.layers.{}.mlp.gate_proj.bias", "layers_{}/mlp/gate/bias", Layout.VECTOR),
    Row("model.layers.{}.mlp.up_proj.weight", "layers_{}/mlp/up/kernel", Layout.LINEAR),
    Row("model.layers.{}.mlp.up_proj.bias", "layers_{}/mlp/up/bias", Layout.VECTOR),
    Row("model.layers.{}.mlp.down_proj.weight", "layers_{}/mlp/down/kernel", Layout.LINEAR),
    Row("model.layers.{}.mlp.down_proj.bias", "layers_{}/mlp/down/bias", Layout.VECTOR),
)

_LLAMA = (
    *_SHARED,
    Row("model.layers.{}.post_attention_layernorm.weight", "layers_{}/mlp_norm/scale", Layout.VECTOR),
)

_QWEN3 = (
    *_LLAMA,
    Row("model.layers.{}.self_attn.q_norm.weight", "layers_{}/attention/query_norm/scale", Layout.VECTOR),
    Row("model.layers.{}.self_attn.k_norm.weight", "layers_{}/attention/key_norm/scale", Layout.VECTOR),
)

_GEMMA2 = (
    *_SHARED,
    Row("model.layers.{}.post_attention_layernorm.weight", "layers_{}/attention_output_norm/scale", Layout.VECTOR),
    Row("model.layers.{}.pre_feedforward_layernorm.weight", "layers_{}/mlp_norm/scale", Layout.VECTOR),
    Row("model.layers.{}.post_feedforward_layernorm.weight", "layers_{}/mlp_output_norm/scale", Layout.VECTOR),
)

_TABLES = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _QWEN3, "gemma2": _GEMMA2}

_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")


def rows_by_path(config: ModelConfig) -> dict[str, Row]:
    """The rows of all layers by parameter path; some are for parameters that this config leaves out."""
    layers = range(config.num_layers)
    table = _TABLES[config.architecture]
    rows = [row.of_layer(i) for row in table for i in (layers if "{}" in row.name else (0,))]
    return {row.path: row for row in rows}


def is_redundant(name: str, config: ModelConfig) -> bool:
    """Whether a tensor holds nothing that the module lacks: stored rotary frequencies, a copy of a tied embedding."""
    return bool(_DERIVED.fullmatch(name)) or (name == "lm_head.weight" and config.tied_embeddings)
