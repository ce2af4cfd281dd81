"""Weight matrices packed in panels of 16 columns, in any format.

Matrices are packed when a model is compiled; the arrays are written to the artifact, mapped into memory and used in
place.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from distaff.kernels.matmul.formats import LANES, Array, Shapes, WeightFormat


class PackedWeight(NamedTuple):
    """A packed ``W[rows, columns]``; the ``arrays`` are those that the format has, and what `matmul` takes."""

    format: WeightFormat
    rows: int
    columns: int
    arrays: tuple[Array, ...]


def pack(weight: Array, format: WeightFormat) -> PackedWeight:
    """Rounds or quantises a float array ``[K, N]`` to ``format`` and packs it. Raises `ValueError` for other shapes."""
    if weight.ndim != 2 or not weight.size:
        raise ValueError(f"a weight to pack must be [K, N] and not empty, not {list(weight.shape)}")
    rows, columns = weight.shape
    return PackedWeight(format, rows, columns, format.pack(weight))


def pack_parts(parts: tuple[Array, ...], format: WeightFormat) -> PackedWeight:
    """Packs what is quantised already, bit for bit; the first part is ``[K, N]``, and see ``format.pack_parts``."""
    rows, columns = parts[0].shape
    return PackedWeight(format, rows, columns, format.pack_parts(*parts))


def unpack(packed: PackedWeight) -> Array:
    """The matrix as float32 ``[K, N]``."""
    matrix: Array = packed.format.unpack(packed.arrays, packed.rows, np)
    return matrix[:, : packed.columns]


def interleave_gated(gate: Array, up: Array) -> Array:
    """Columns of ``gate[..., F]`` and ``up[..., F]`` in turns of 16, F padded to 16: what `matmul` wants if ``gated``.

    Works for weights, for the parts of quantised ones, and for biases.
    """
    if gate.shape != up.shape:
        raise ValueError(f"gate{list(gate.shape)} and up{list(up.shape)} must have one shape")
    pad = [(0, 0)] * (gate.ndim - 1) + [(0, -gate.shape[-1] % LANES)]
    both = [np.pad(array, pad).reshape(*gate.shape[:-1], -1, LANES) for array in (gate, up)]
    return np.stack(both, -2).reshape(*gate.shape[:-1], -1)


def packed_shapes(format: WeightFormat, rows: int, columns: int, *, gated: bool = False) -> Shapes:
    """Shape and dtype of each array of a packed weight; ``columns`` of a gated one count both halves, unpadded."""
    panels = -(-(columns // 2) // LANES) * 2 if gated else -(-columns // LANES)
    return format.shapes(rows, panels)
