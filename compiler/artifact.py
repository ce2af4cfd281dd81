"""The artifact: the one door between the compiler, which writes it, and the runtime, which serves it.

A folder with a versioned ``manifest.json`` that describes everything else in it. This module knows the manifest and
the folder's layout and imports no JAX, so that tools can look into an artifact in milliseconds.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PROGRAMS = "programs"
EXECUTABLES = "executables"
WEIGHTS = "weights"
TOKENIZER = "tokenizer"


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


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One weight, in the order in which programs take them; ``file`` is relative to ``weights/``."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str


@dataclasses.dataclass(frozen=True)
class ProgramSpec:
    """One exported step for a bucket of ``tokens`` (T), ``requests`` (R) and ``samples`` (S); ``file`` in programs/."""

    name: str
    tokens: int
    requests: int
    samples: int
    file: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What the runtime needs to know to serve the artifact without any model code."""

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
    fingerprint: str = ""
    distaff_version: str = ""
    jax_version: str = ""
    report: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def max_batch(self) -> int:
        """The most requests that one step can hold."""
        return max(p.requests for p in self.programs)

    @property
    def max_step_tokens(self) -> int:
        """The most tokens that one step can hold."""
        return max(p.tokens for p in self.programs)

    @property
    def pages_per_request(self) -> int:
        """Width of a block table: pages that a request of ``max_model_len`` tokens takes."""
        return -(-self.max_model_len // self.page_size)

    def bytes_per_page(self, itemsize: Mapping[str, int]) -> int:
        """Bytes that one page takes over all caches; ``itemsize`` gives the bytes of each dtype by name."""
        per_token = 0
        for cache in self.caches:
            values = cache.layers
            for size in cache.shape:
                values *= size
            per_token += values * itemsize[cache.dtype]
        return per_token * self.page_size

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
            manifest = cls(**data)
        except (TypeError, KeyError, ValueError) as error:
            raise ArtifactError(f"{where} is damaged: {error}; compile the model again") from None
        if not manifest.programs:
            raise ArtifactError(f"{where} lists no programs; compile the model again")
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
        for file in sorted(wanted):
            if not file.is_file():
                raise ArtifactError(f"{root} lacks {file.relative_to(root)}; compile the model again")
        return manifest
