"""`load_model`: the one call that turns a name, a folder or a file into a model that can be run or compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jax
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from distaff.compiler.ir import StoredBlocks
from distaff.frontend import linen as nn
from distaff.frontend import nnx
from distaff.frontend.loading.checkpoint import Checkpoint, TokenizerFiles
from distaff.frontend.loading.convert import load_params, stored_blocks
from distaff.frontend.loading.gguf_file import open_gguf
from distaff.frontend.loading.huggingface import open_folder
from distaff.frontend.loading.source import locate
from distaff.frontend.models import ConfigError, ModelConfig, build_model, nnx_llama


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model in memory: ``module.apply({"params": params}, tokens)``, or `apply`, gives its logits.

    With ``api="nnx"``, ``module`` is an object of NNX that holds the parameters, and ``module(tokens)`` gives them;
    ``params`` are its arrays, in the tree that a module of Linen has.

    ``eos_token_ids`` end a generation; ``max_model_len`` is the longest sequence in tokens; ``tokenizer`` is None if
    the checkpoint has none; ``fingerprint`` changes whenever the files, the config, the tokenizer or the dtype do.
    ``blocks`` are the parameters that the checkpoint holds quantised, as it has them, by path ("embed.embedding");
    the compiler can keep them so. In ``params`` they are dequantised.
    """

    name: str
    architecture: str
    config: ModelConfig
    module: nn.Module | nnx.Module
    params: dict[str, Any]
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    max_model_len: int
    tokenizer: TokenizerFiles | None
    fingerprint: str
    blocks: Mapping[str, StoredBlocks]

    def apply(self, params: dict[str, Any], tokens: jax.Array) -> jax.Array:
        """The plain forward pass: int32 tokens ``[B, S]`` to float32 logits ``[B, S, vocab]``."""
        logits: jax.Array
        if isinstance(self.module, nn.Module):
            logits = self.module.apply({"params": params}, tokens)
        else:
            logits = nnx_llama.Llama.from_params(self.config, params)(tokens)
        return logits


def load_model(
    source: str | Path,
    *,
    dtype: str = "auto",
    progress: bool = True,
    max_model_len: int | None = None,
    api: Literal["linen", "nnx"] = "linen",
) -> LoadedModel:
    """Loads a model.

    ``source`` is a Hugging Face folder, a ``.gguf`` file, a name on the Hugging Face hub ("org/name"), or
    "smollm2-135m", the demo model. Weights are kept and computed in ``dtype``: "float32", "bfloat16", "float16", or
    "auto", which is float32 on a CPU and bfloat16 elsewhere. ``max_model_len`` lowers the model's limit.
    ``api`` says whether the module is one of Linen or of NNX.

    Raises `CheckpointError` (`SourceNotFoundError`, `DownloadError`, `CheckpointFormatError`, `TensorMismatchError`,
    …) for files, `ConfigError` for a model that is not implemented (so) or a limit beyond the model's own, and
    ValueError for an ``api`` that there is not.
    """
    if api not in ("linen", "nnx"):
        raise ValueError(f'api is {api!r}; modules are of "linen" or of "nnx".')
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    located = locate(source)
    opener = open_gguf if located.path.is_file() else open_folder
    checkpoint = opener(located.path, dtype)
    limit = _max_model_len(checkpoint.config, max_model_len)
    module = build_model(checkpoint.config)
    if api == "nnx":
        nnx_llama.check_architecture(checkpoint.config)
    with _progress(located.name, checkpoint, progress) as advance:
        params = load_params(checkpoint, module, dtype, advance)
    return LoadedModel(
        name=located.name,
        architecture=checkpoint.config.architecture,
        config=checkpoint.config,
        module=nnx_llama.Llama.from_params(checkpoint.config, params) if api == "nnx" else module,
        params=params,
        eos_token_ids=checkpoint.eos_token_ids,
        bos_token_id=checkpoint.bos_token_id,
        max_model_len=limit,
        tokenizer=checkpoint.tokenizer,
        fingerprint=checkpoint.fingerprint,
        blocks=stored_blocks(checkpoint, module),
    )


def _max_model_len(config: ModelConfig, wanted: int | None) -> int:
    if wanted is None:
        return config.max_model_len
    if not 1 <= wanted <= config.max_model_len:
        raise ConfigError(f"max_model_len is {wanted}; this model has positions for 1 to {config.max_model_len} tokens")
    return wanted


@contextmanager
def _progress(name: str, checkpoint: Checkpoint, show: bool) -> Iterator[Callable[[int], None]]:
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bar:
        total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        task = bar.add_task(f"loading {name}", total=total)
        yield lambda nbytes: bar.advance(task, nbytes)
        bar.update(task, completed=total)
