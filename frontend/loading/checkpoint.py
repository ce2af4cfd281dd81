"""What every kind of checkpoint is opened as: a config, tensors under their Hugging Face names, and a tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distaff.compiler.ir import StoredBlocks
from distaff.frontend.models import ModelConfig


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its logical ``shape``, its size in the file in bytes, and how to read it.

    ``read`` gives floating point numbers of any width, dequantised if need be; the array may be a view of the file.
    ``blocks`` are what it is dequantised from, if it is a quantised matrix.
    """

    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], np.ndarray]
    blocks: StoredBlocks | None = None

    def reordered(self, order: Callable[[np.ndarray], np.ndarray]) -> StoredTensor:
        """The tensor with its rows as ``order`` gives them; it may look at nothing but the first dimension."""

        def after(read: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
            return lambda: order(read())

        blocks = self.blocks and dataclasses.replace(self.blocks, read=after(self.blocks.read))
        return dataclasses.replace(self, read=after(self.read), blocks=blocks)


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as Hugging Face stores it: the text of ``tokenizer.json`` and the contents of two JSON files."""

    tokenizer: str
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json (with the chat template) and generation_config.json."""
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        (root / "tokenizer.json").write_text(self.tokenizer, encoding="utf-8")
        for name, content in (("tokenizer_config", self.config), ("generation_config", self.generation_config)):
            text = json.dumps(content, indent=1, ensure_ascii=False)
            (root / f"{name}.json").write_text(text, encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model on disk, opened but not read. ``path`` is the folder or file, ``files`` what the tensors are read from.

    ``tensors`` are by Hugging Face name, in Hugging Face layout.
    """

    path: Path
    config: ModelConfig
    files: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    tokenizer: TokenizerFiles | None

    @property
    def fingerprint(self) -> str:
        """Changes with the config, the tokenizer, and any file's name, size or time of change; reads no tensor."""
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        known = self.config, self.eos_token_ids, self.bos_token_id, self.tokenizer, stats
        return hashlib.sha256(repr(known).encode()).hexdigest()


def token_ids(value: object) -> tuple[int, ...]:
    """The ids in a field that holds one, several or none; in order, without repetitions."""
    values: Iterable[object] = value if isinstance(value, list | tuple) else (value,)
    return tuple(dict.fromkeys(v for v in values if isinstance(v, int) and not isinstance(v, bool)))
