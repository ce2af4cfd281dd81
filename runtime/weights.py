"""Puts an artifact's weights on the device; on a CPU they are used where they lie in the mapped file.

The files are safetensors (8 bytes of header length, a JSON header, the data). The compiler aligns tensors so that XLA
takes them without a copy, and start-up then costs no reading at all: pages come in as the first step touches them.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from distaff.compiler.artifact import WEIGHTS, ArtifactError, TensorSpec


def load_weights(artifact: Path, specs: Sequence[TensorSpec], device: jax.Device) -> list[jax.Array]:
    """The tensors of ``specs``, in their order, on ``device``.

    Raises `ArtifactError` if a file is damaged or does not hold what the manifest says.
    """
    files = {name: _MappedFile(artifact / WEIGHTS / name) for name in {spec.file for spec in specs}}
    return [jax.device_put(files[spec.file].tensor(spec), device) for spec in specs]


class _MappedFile:
    def __init__(self, path: Path):
        self._path = path
        try:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            mapped.madvise(mmap.MADV_WILLNEED)
            start = 8 + int.from_bytes(mapped[:8], "little")
            self._header: dict[str, dict[str, Any]] = dict(json.loads(mapped[8:start]))
        except (OSError, ValueError, TypeError) as error:
            raise self._damaged(f"has no readable header ({error})") from None
        self._data = np.frombuffer(mapped, np.uint8, offset=start)

    def tensor(self, spec: TensorSpec) -> np.ndarray[Any, Any]:
        """A view of one tensor in the mapped file."""
        try:
            entry = self._header[spec.name]
            shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise self._damaged(f"has no proper entry for the tensor {spec.name!r}") from None
        if shape != spec.shape or end - begin != spec.bytes:
            raise self._damaged(f"holds {spec.name!r} as {entry}, but the manifest says {spec.dtype}{spec.shape}")
        data = self._data[begin:end]
        if data.size != spec.bytes:
            raise self._damaged(f"ends within the tensor {spec.name!r}")
        return data.view(_dtype(spec.dtype)).reshape(shape)

    def _damaged(self, what: str) -> ArtifactError:
        return ArtifactError(f"{self._path} {what}; compile the model again")


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))
