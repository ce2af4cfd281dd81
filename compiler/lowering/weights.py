"""Writes weights as safetensors files whose tensors the runtime can use in place.

XLA on a CPU takes a host buffer without copying it if it is aligned to 64 bytes. The header is therefore padded with
spaces to a multiple of 64, and tensors whose size is no such multiple come last in their file, because the format
(https://huggingface.co/docs/safetensors) allows no gaps between tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np

from distaff.compiler.artifact import TensorSpec

ALIGNMENT = 64
# Tensors are spread over files of about this size, which object stores and file systems handle well.
MAX_FILE_BYTES = 4 << 30

# The format's names of the dtypes in artifact.ITEM_BYTES.
DTYPE_NAMES: Mapping[str, str] = {
    "float32": "F32", "bfloat16": "BF16", "float16": "F16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "int32": "I32", "uint32": "U32", "int16": "I16", "uint16": "U16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip

Weights: TypeAlias = Mapping[str, "jax.Array | np.ndarray[Any, Any]"]


def write_weights(weights: Weights, folder: Path, max_file_bytes: int = MAX_FILE_BYTES) -> tuple[TensorSpec, ...]:
    """Writes ``weights`` into ``folder`` as ``model-00000.safetensors`` and so on; returns them in the given order.

    Only one tensor at a time is brought to the host. Raises ValueError for a dtype that artifacts do not have.
    """
    specs: dict[str, TensorSpec] = {}
    for index, names in enumerate(_files(weights, max_file_bytes)):
        file = f"model-{index:05}.safetensors"
        _write_file(folder / file, {name: weights[name] for name in names})
        for name in names:
            specs[name] = TensorSpec(name, tuple(weights[name].shape), str(weights[name].dtype), file)
    return tuple(specs[name] for name in weights)


def _files(weights: Weights, max_file_bytes: int) -> list[list[str]]:
    """Names by file: whole 64-byte units first, then the rest."""
    files: list[list[str]] = []
    size = max_file_bytes
    for name in sorted(weights, key=lambda name: weights[name].nbytes % ALIGNMENT != 0):
        if size + weights[name].nbytes > max_file_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size += weights[name].nbytes
    return files


def _write_file(path: Path, weights: Weights) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, weight in weights.items():
        begin, end = end, end + weight.nbytes
        dtype = DTYPE_NAMES.get(str(weight.dtype))
        if dtype is None:
            raise ValueError(f"weight {name!r} has dtype {weight.dtype}; artifacts hold {', '.join(DTYPE_NAMES)}")
        header[name] = {"dtype": dtype, "shape": list(weight.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for weight in weights.values():
            # reshape: a scalar has no byte view.
            out.write(np.ascontiguousarray(weight).reshape(-1).view(np.uint8).data)
