"""The blocks of GGUF's Q8_0, Q4_0 and Q4_1, taken apart without changing a number.

A tensor ``[N, K]`` lies row by row, each row in blocks of 32 numbers: a float16 scale, for Q4_1 a float16 offset, and
32 int8 or 16 bytes whose low nibbles are the first 16 numbers. (ggml's ``block_q8_0``, ``block_q4_0``, ``block_q4_1``.)
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from distaff.kernels.matmul.formats import WeightFormat
from distaff.kernels.matmul.packing import PackedWeight, pack_blocks

Array: TypeAlias = np.ndarray[Any, Any]

_GROUP = 32
_TYPES = ("Q8_0", "Q4_0", "Q4_1")


def gguf_format(type_name: str) -> WeightFormat | None:
    """The format that holds blocks of ggml's ``type_name`` exactly; None if there is none."""
    return WeightFormat.parse(type_name) if type_name in _TYPES else None


def pack_gguf(data: Array, type_name: str, columns: int) -> PackedWeight:
    """Packs the bytes of a GGUF tensor with ``columns`` (N) rows of its own as ``W[K, N]``; see `split_gguf`."""
    return pack_blocks(*split_gguf(data, type_name, columns), format=WeightFormat.parse(type_name))


def split_gguf(data: Array, type_name: str, columns: int) -> tuple[Array, Array, Array | None]:
    """Integers ``[K, N]``, float16 scales and offsets ``[K / 32, N]`` as `pack_blocks` takes them.

    ``type_name`` is Q8_0, Q4_0 or Q4_1; ``data`` are uint8 in any shape. Raises `ValueError`.
    """
    format = WeightFormat.parse(type_name)
    header = 2 * (1 + format.offsets)
    size = header + (_GROUP if format.kind == "int8" else _GROUP // 2)
    if (format.group, data.dtype) != (_GROUP, np.uint8) or not data.size or data.size % (size * columns):
        raise ValueError(
            f"{data.size} {data.dtype} are not {columns} rows of blocks of {type_name} ({size} bytes each)"
        )
    blocks = data.reshape(columns, -1, size)
    numbers = np.ascontiguousarray(blocks[..., :header]).view(np.float16)
    quantised = blocks[..., header:]
    if format.kind == "int8":
        integers = quantised.view(np.int8)
    else:
        integers = np.concatenate([quantised & 15, quantised >> 4], -1)
    scales = np.ascontiguousarray(numbers[..., 0].T)
    offsets = np.ascontiguousarray(numbers[..., 1].T) if format.offsets else None
    return np.ascontiguousarray(integers.reshape(columns, -1).T), scales, offsets
