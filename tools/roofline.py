"""What a run on a decoder-only model must read and compute at least, and what this machine can read and compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distaff.compiler.artifact import ITEM_BYTES, MANIFEST, Manifest

if TYPE_CHECKING:
    from distaff.frontend.models import ModelConfig


@dataclasses.dataclass(frozen=True)
class Work:
    """Bytes that one step of a request alone reads, and operations of all requests together."""

    step_bytes: float
    operations: float


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes of a model's weights as an engine has them, and of its cache for each token."""

    weights: int
    cache_per_token: int

    @classmethod
    def of(cls, path: Path, dtype: str, config: ModelConfig) -> Sizes:
        """Of an artifact, a GGUF file (llama.cpp's cache is float16), or a float32 folder that is run in ``dtype``."""
        if (path / MANIFEST).is_file():
            manifest = Manifest.load(path)
            return cls(manifest.weight_bytes, manifest.bytes_per_token)
        values = config.num_layers * 2 * config.num_kv_heads * config.head_dim
        if path.suffix == ".gguf":
            import gguf

            return cls(sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors), 2 * values)
        stored = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        return cls(stored // 4 * ITEM_BYTES[dtype], values * ITEM_BYTES[dtype])


def work(config: ModelConfig, sizes: Sizes, job: Mapping[str, Any]) -> Work:
    """What a job of `distaff.tools.bench_peers` asks of a model.

    A step of the request alone reads all weights once (one row of an embedding of its own is too little to count) and
    the keys and values of the tokens so far, on average over its output. Operations are multiplications and additions
    of products: with the matrices for every token, with the head for every output token, and of queries with keys and
    weights with values for every pair of tokens.
    """
    context = len(job["single_prompts"][-1]) + job["single_count"] / 2
    head_values = config.num_heads * config.head_dim
    projections = config.hidden_size * 2 * (head_values + config.num_kv_heads * config.head_dim)
    matrices = config.num_layers * (projections + 3 * config.hidden_size * config.intermediate_size)
    operations = 0
    for prompt, count in zip(job["prompts"], job["counts"], strict=True):
        tokens = len(prompt) + count - 1  # the last one is not fed back
        operations += 2 * matrices * tokens + 2 * config.vocab_size * config.hidden_size * count
        operations += 4 * config.num_layers * head_values * tokens * (tokens + 1) // 2
    return Work(sizes.weights + sizes.cache_per_token * context, operations)


def memory_bandwidth() -> float | None:
    """Bytes a second that all cores together read from memory for some seconds; None without the native kernels."""
    from distaff.kernels import native

    if not native.available():
        return None
    from distaff.tools.bench_roofline import READ_SECONDS, Roofline

    return Roofline(read_seconds=READ_SECONDS).read
