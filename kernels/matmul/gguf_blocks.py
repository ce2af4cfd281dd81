"""The blocks of GGUF's Q8_0, Q4_0 and Q4_1, taken apart without changing a number.

A tensor ``[N, K]`` lies row by row, each row in blocks of 32 numbers: a float16 scale, for Q4_1 a float16 offset, and
32 int8 or 16 bytes whose low nibbles are the first 16 numbers. (ggml's ``block_q8_0``, ``block_q4_0``, ``block_q4_1``.)
"""

from __future__ import annotations

import numpy as np

from distaff.kernels.matmul.formats import Array, WeightFormat
from distaff.kernels.matmul.panels import PanelFormat

_GROUP = 32
_FORMATS = {
    "Q8_0": PanelFormat("int8", _GROUP),
    "Q4_0": PanelFormat("int4", _GROUP),
    "Q4_1": PanelFormat("int4", _GROUP, offsets=True),
}


def gguf_format(type_name: str) -> WeightFormat | None:
    """The format that holds blocks of ggml's ``type_name`` exactly; None if there is none."""
    return _FORMATS.get(type_name)


def split_gguf(data: Array, type_name: str, columns: int) -> tuple[Array, ...]:
    """Integers ``[K, N]``, float16 scales ``[K / 32, N]`` and, of Q4_1, offsets: what `PanelFormat.pack_parts` takes.

    ``columns`` (N) are the tensor's own rows, ``data`` its bytes, uint8 in any shape. Raises `ValueError`.
    """
    format = _FORMATS[type_name]
    header = 2 * (1 + format.offsets)
    size = header + (_GROUP if format.kind == "int8" else _GROUP // 2)
    if data.dtype != np.uint8 or not data.size or data.size % (size * columns):
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
    parts = (integers.reshape(columns, -1), *np.moveaxis(numbers, -1, 0))
    return tuple(np.ascontiguousarray(part.T) for part in parts)
