"""Small random checkpoints of every family, made by transformers, which is the reference for their logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def make_reference(family: str, seed: int = 0, **changes: Any) -> Any:
    """A transformers model in float32 on random weights large enough that every part matters to the logits."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config_class = getattr(transformers, f"{family}Config")
    model_class = getattr(transformers, f"{family}ForCausalLM")
    config = config_class(**(SIZES | changes), attn_implementation="eager")
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if "norm" in name or "bias" in name else 0.15))
            if "norm" in name and family != "Gemma2":
                parameter.add_(1.0)
    return model


def save(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def reference_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.float().numpy()


def random_tokens(seed: int, batch: int = 2, length: int = 24, vocab: int = SIZES["vocab_size"]) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, (batch, length)).astype(np.int32)


def relative_error(found: Any, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.max(np.abs(np.asarray(found, np.float64) - expected)) / np.max(np.abs(expected)))
