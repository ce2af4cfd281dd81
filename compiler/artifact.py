"""The artifact: the one door between the compiler, which writes it, and the runtime, which serves it.

A folder with a versioned ``manifest.json`` that describes everything else in it. This module knows the manifest and
the folder's layout and imports no JAX, so that tools can look into an artifact in milliseconds.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
PROGRAMS = "programs"
EXECUTABLES = "executables"
WEIGHTS = "weights"
TOKENIZER = "tokenizer"


# Bytes of one value of each dtype that caches and weights may have; also the list of those dtypes.
ITEM_BYTES: Mapping[str, int] = {
    "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int32": 4, "uint32": 4, "int16": 2, "uint16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip


class ArtifactError(Exception):
    """The folder is not an artifact that this version can serve: missing, corrupt, foreign or newer."""


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """One KV buffer of shape ``[layers, num_pages, page_size, *shape]``.

    ``shape`` is what one token keeps in one layer, ``window`` the number of most recent positions that attention can
    still see (None: all of them).
    """

    name: str
    layers: int
    shape: tuple[int, ...]
    dtype: str
    window: int | None = None

    def __post_init__(self) -> None:
        _check_shape(self.name, self.shape, self.dtype)
        _check_positive(f"cache {self.name!r}", layers=self.layers, window=1 if self.window is None else self.window)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token keeps in all layers of this cache."""
        return self.layers * math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One weight, in the order in which programs take them; ``file`` is relative to ``weights/``."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str

    def __post_init__(self) -> None:
        _check_shape(self.name, self.shape, self.dtype)
        _check_file_name(f"weight {self.name!r}", self.file)

    @property
    def bytes(self) -> int:
        """Bytes that the tensor takes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclasses.dataclass(frozen=True)
class ProgramSpec:
    """One exported step for a bucket of ``tokens`` (T), ``requests`` (R) and ``samples`` (S); ``file`` in programs/.

    A program with ``tokens == requests`` is a *decode* program: it only takes batches of rows of exactly one token.
    """

    name: str
    tokens: int
    requests: int
    samples: int
    file: str
    sha256: str

    def __post_init__(self) -> None:
        where = f"program {self.name!r}"
        _check_positive(where, tokens=self.tokens, requests=self.requests, samples=self.samples)
        _check_file_name(where, self.file)

    @property
    def is_decode(self) -> bool:
        """Whether every row of a batch must be one token."""
        return self.tokens == self.requests


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What the runtime needs to know to serve the artifact without any model code.

    ``num_pages`` is the pool size, null page included, that the artifact asks for; the programs hold for every other
    size too unless ``fixed_num_pages``. ``platform`` is XLA's name: cpu, cuda, rocm or tpu. ``custom_calls`` are the
    native kernels that the programs call and the runtime must have.
    """

    model: str
    architecture: str
    vocab_size: int
    max_model_len: int
    page_size: int
    num_pages: int
    dtype: str
    platform: str
    caches: tuple[CacheSpec, ...]
    weights: tuple[TensorSpec, ...]
    programs: tuple[ProgramSpec, ...]
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    has_tokenizer: bool = False
    fixed_num_pages: bool = False
    custom_calls: tuple[str, ...] = ()
    fingerprint: str = ""
    distaff_version: str = ""
    jax_version: str = ""
    report: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        _check_positive(
            "the manifest",
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
            page_size=self.page_size,
            num_pages=self.num_pages,
        )
        if not self.programs:
            raise ValueError("it lists no programs")

    @property
    def max_batch(self) -> int:
        """The most requests that one step can hold."""
        return max(p.requests for p in self.programs)

    @property
    def max_step_tokens(self) -> int:
        """The most tokens that one step can hold."""
        return max(p.tokens for p in self.programs)

    @property
    def max_samples(self) -> int:
        """The most rows of logits that one step can give: what bounds prompt tokens that want log-probabilities."""
        return max(p.samples for p in self.programs)

    @property
    def pages_per_request(self) -> int:
        """Width of a block table: pages that a request of ``max_model_len`` tokens takes."""
        return -(-self.max_model_len // self.page_size)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token keeps over all caches."""
        return sum(cache.bytes_per_token for cache in self.caches)

    @property
    def bytes_per_page(self) -> int:
        """Bytes that one page takes over all caches."""
        return self.bytes_per_token * self.page_size

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(weight.bytes for weight in self.weights)

    def to_json(self) -> str:
        """The manifest as JSON text that `from_json` reads back to an equal value."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str, where: str = MANIFEST) -> Self:
        """Reads a manifest; raises `ArtifactError` that names the missing, extra or ill-typed field."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ArtifactError(f"{where} is not JSON ({error}); compile the model again") from None
        if not isinstance(data, dict) or "format_version" not in data:
            raise ArtifactError(f"{where} has no format_version: this is not a distaff artifact")
        version = data["format_version"]
        if version != FORMAT_VERSION:
            raise ArtifactError(
                f"{where} has format_version {version!r} and this distaff reads {FORMAT_VERSION}; "
                "compile the model again with this version"
            )
        try:
            data["caches"] = tuple(CacheSpec(**{**c, "shape": tuple(c["shape"])}) for c in data["caches"])
            data["weights"] = tuple(TensorSpec(**{**w, "shape": tuple(w["shape"])}) for w in data["weights"])
            data["programs"] = tuple(ProgramSpec(**p) for p in data["programs"])
            data["eos_token_ids"] = tuple(data["eos_token_ids"])
            data["custom_calls"] = tuple(data.get("custom_calls", ()))
            manifest = cls(**data)
        except (TypeError, KeyError, ValueError) as error:
            raise ArtifactError(f"{where} is damaged: {error}; compile the model again") from None
        return manifest

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``manifest.json`` last and atomically: a folder with a manifest is a complete artifact."""
        path = Path(folder) / MANIFEST
        partial = path.with_suffix(".partial")
        partial.write_text(self.to_json())
        partial.replace(path)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Reads the manifest of an artifact folder and checks that the files that it names exist.

        Raises `ArtifactError` with what is wrong and what to do.
        """
        root = Path(folder)
        path = root / MANIFEST
        if not path.is_file():
            raise ArtifactError(
                f"{root} holds no {MANIFEST}: not a distaff artifact, or its compilation did not finish"
            )
        manifest = cls.from_json(path.read_text(), str(path))
        wanted = {root / PROGRAMS / p.file for p in manifest.programs}
        wanted |= {root / WEIGHTS / w.file for w in manifest.weights}
        if manifest.has_tokenizer:
            wanted.add(root / TOKENIZER / "tokenizer.json")
        for file in sorted(wanted):
            if not file.is_file():
                raise ArtifactError(f"{root} lacks {file.relative_to(root)}; compile the model again")
        return manifest


def _check_positive(where: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"{where} has {name} {size!r}, which must be a whole number of at least 1")


def _check_shape(name: str, shape: tuple[int, ...], dtype: str) -> None:
    if dtype not in ITEM_BYTES:
        raise ValueError(f"{name!r} has dtype {dtype!r}; known are {', '.join(ITEM_BYTES)}")
    if any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"{name!r} has shape {shape!r}")


def _check_file_name(where: str, file: str) -> None:
    """A manifest must not lead the runtime out of its folder."""
    if Path(file).name != file or not file:
        raise ValueError(f"{where} has file {file!r}, which must be a plain file name")
