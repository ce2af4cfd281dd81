"""Opening a Hugging Face folder: config.json, safetensors (whole or in shards), tokenizer files."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from distaff.frontend.loading.checkpoint import Checkpoint, StoredTensor, TokenizerFiles, token_ids
from distaff.frontend.loading.errors import CheckpointFormatError, TokenizerFormatError
from distaff.frontend.models import ModelConfig

_INDEX = "model.safetensors.index.json"
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def open_folder(root: Path, dtype: str) -> Checkpoint:
    """Opens the checkpoint in ``root``, to be computed in ``dtype``.

    Raises `CheckpointFormatError` or `TokenizerFormatError` naming the file at fault, `ConfigError` for its config.
    """
    config = read_json(root / "config.json")
    files = _weight_files(root)
    generation = read_json(root / "generation_config.json") if (root / "generation_config.json").is_file() else {}
    eos = token_ids(generation.get("eos_token_id", config.get("eos_token_id")))
    bos = token_ids(config.get("bos_token_id"))
    return Checkpoint(
        path=root,
        config=ModelConfig.from_hf(config, dtype=dtype),
        files=tuple(files),
        tensors={name: tensor for file in files for name, tensor in _tensors(file).items()},
        eos_token_ids=eos,
        bos_token_id=bos[0] if bos else None,
        tokenizer=_tokenizer(root, generation or {"eos_token_id": list(eos)}),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises `CheckpointFormatError`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointFormatError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointFormatError(f"{path} holds a {type(data).__name__}; an object was expected")
    return data


def _weight_files(root: Path) -> list[Path]:
    """The safetensors files, as the index lists them if there is one."""
    if (root / _INDEX).is_file():
        shards = read_json(root / _INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise CheckpointFormatError(f"{root / _INDEX} has no weight_map of tensor names to file names")
        files = [root / shard for shard in sorted(set(shards.values()))]
    elif (root / "model.safetensors").is_file():
        files = [root / "model.safetensors"]
    else:
        other = sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt") for path in root.glob(pattern))
        hint = (
            f" but {', '.join(other[:3])}, which is Python's pickle format and runs code when read; convert it with "
            "transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
            if other
            else ""
        )
        raise CheckpointFormatError(f"{root} holds no model.safetensors and no {_INDEX}{hint}")
    for file in files:
        if not file.is_file():
            raise CheckpointFormatError(f"{root / _INDEX} names {file.name}, which is missing: fetch the model again")
    return files


def _tensors(file: Path) -> dict[str, StoredTensor]:
    try:
        handle: Any = safetensors.safe_open(file, framework="np")
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointFormatError(f"{file} is damaged or cut short ({error}): fetch the model again") from error
    tensors = {}
    for name in handle.keys():  # noqa: SIM118 (not a mapping)
        view = handle.get_slice(name)
        shape, stored = tuple(view.get_shape()), view.get_dtype()
        if stored not in _BYTES:
            raise CheckpointFormatError(f"{file}: {name} is stored as {stored}; readable are {', '.join(_BYTES)}")
        read: Callable[[], np.ndarray] = functools.partial(handle.get_tensor, name)
        tensors[name] = StoredTensor(shape, math.prod(shape) * _BYTES[stored], read)
    return tensors


def _tokenizer(root: Path, generation_config: Mapping[str, Any]) -> TokenizerFiles | None:
    if not (root / "tokenizer.json").is_file():
        if (root / "tokenizer.model").is_file() or (root / "vocab.json").is_file():
            raise TokenizerFormatError(
                f"{root} has a tokenizer but no tokenizer.json; make one with transformers: "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        return None
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json", "chat_template.json"):
        if (root / name).is_file():
            config |= read_json(root / name)
    if templates := _chat_templates(root, config.get("chat_template")):
        config["chat_template"] = templates
    return TokenizerFiles((root / "tokenizer.json").read_text(encoding="utf-8"), config, generation_config)


def _chat_templates(root: Path, configured: object) -> object:
    """The template that ``chat_template.jinja`` gives, else the configured; with its named companions, if any."""
    main = root / "chat_template.jinja"
    default = main.read_text(encoding="utf-8") if main.is_file() else configured
    named = sorted((root / "additional_chat_templates").glob("*.jinja"))
    if not named:
        return default
    templates = [{"name": path.stem, "template": path.read_text(encoding="utf-8")} for path in named]
    return [{"name": "default", "template": default}, *templates] if isinstance(default, str) else templates
