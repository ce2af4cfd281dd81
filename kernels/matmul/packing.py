"""Weight matrices in the one layout that the kernels read, on every processor.

A matrix ``W[K, N]`` is cut into panels of 16 columns. In a panel K runs outside and columns inside, so that 64 bytes (a
step) meet 4 bytes of activations: the order of the dot-product instructions and of AMX tiles.

    float32   float32 [panels, K, 16]
    bfloat16  uint16 [panels, K/2, 16, 2]  bits
    int8      uint8 [panels, K/4, 16, 4]   q + 128
    int4      uint8 [panels, K/8, 16, 4]   row 8s+j in the low nibble of byte j of step s, row 8s+4+j in the high one

Scales and offsets are float16 ``[panels, groups, 16]``, scales of whole columns float32 ``[panels, 16]``. Columns are
padded to 16 with zeros, rows to the group or the step. Matrices are packed when a model is compiled; the arrays are
written to the artifact, mapped into memory and used in place.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from distaff.kernels.matmul.formats import WeightFormat
from distaff.kernels.matmul.quantise import quantise

LANES = 16
Array: TypeAlias = np.ndarray[Any, Any]
AnyArray = TypeVar("AnyArray", bound=Any)  # of numpy, or of jax and perhaps traced


class PackedWeight(NamedTuple):
    """A packed ``W[rows, columns]``; the arrays are those of this module's table."""

    format: WeightFormat
    rows: int
    columns: int
    values: Array
    scales: Array | None = None
    offsets: Array | None = None

    @property
    def arrays(self) -> tuple[Array, ...]:
        """What `matmul` takes: the values, and scales and offsets if the format has them."""
        return tuple(array for array in (self.values, self.scales, self.offsets) if array is not None)


def pack(weight: Array, format: WeightFormat) -> PackedWeight:
    """Rounds or quantises a float array ``[K, N]`` to ``format`` and packs it. Raises `ValueError` for other shapes."""
    if weight.ndim != 2 or not weight.size:
        raise ValueError(f"a weight to pack must be [K, N] and not empty, not {list(weight.shape)}")
    if format.quantised:
        return pack_blocks(*quantise(np.asarray(weight, np.float32), format), format=format)
    rows, columns = weight.shape
    values = _bf16_bits(weight) if format.kind == "bfloat16" else np.asarray(weight, np.float32)
    values = _panels(_padded(values, format.row_unit, 0), format.step_rows)
    return PackedWeight(format, rows, columns, values[..., 0] if format.kind == "float32" else values)


def pack_blocks(integers: Array, scales: Array, offsets: Array | None = None, *, format: WeightFormat) -> PackedWeight:
    """Packs what is quantised already, bit for bit.

    ``integers[K, N]`` are q as `WeightFormat` writes it; ``scales`` are float32 ``[N]``, or float16 ``[groups, N]`` as
    are ``offsets``. Raises `ValueError` if they do not fit together or to the format.
    """
    rows, columns = integers.shape
    groups = -(-rows // format.group) if format.group else 0
    shape, dtype = ((groups, columns), np.float16) if groups else ((columns,), np.float32)
    for name, array in {"scales": scales, "offsets": offsets}.items():
        if (array is not None) != (name == "scales" or format.offsets):
            raise ValueError(f"{format} has {'no ' * (array is not None)}{name}")
        if array is not None and (array.shape != shape or array.dtype != dtype):
            raise ValueError(
                f"{name} of {format} must be {dtype.__name__}{list(shape)}, not {array.dtype}{list(array.shape)}"
            )
    stored = integers.astype(np.int16) + (128 if format.kind == "int8" else 0)
    most = 255 if format.kind == "int8" else 15
    if not format.quantised or stored.min() < 0 or stored.max() > most:
        raise ValueError(f"integers from {integers.min()} to {integers.max()} are not those of {format}")
    values = _panels(_padded(stored.astype(np.uint8), format.row_unit, format.zero), 4)
    if format.kind == "int4":
        values = values[:, 0::2] | values[:, 1::2] << 4

    return PackedWeight(
        format, rows, columns, values, _scale_panels(scales), None if offsets is None else _scale_panels(offsets)
    )


def unpack(packed: PackedWeight) -> Array:
    """The matrix as float32 ``[K, N]``."""
    return unpack_arrays(packed.arrays, packed.format, packed.rows, packed.columns, np)


def unpack_arrays(
    arrays: tuple[AnyArray, ...], format: WeightFormat, rows: int, columns: int, np: ModuleType
) -> AnyArray:
    """`unpack` of a packed weight's arrays with ``np``, numpy or jax.numpy."""
    values, *scales = arrays
    if format.kind == "int4":
        values = np.stack([values & 15, values >> 4], 2).reshape(values.shape[0], -1, LANES, 4)
    if format.kind == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    panels = values.shape[0]
    values = values.reshape(panels, values.shape[1], LANES, -1).swapaxes(2, 3).reshape(panels, -1, LANES)
    if format.quantised:
        values = values.astype(np.float32) - np.float32(format.zero)
        groups = scales[0].reshape(panels, -1, 1, LANES).shape[1]
        values = values.reshape(panels, groups, -1, LANES)
        wide = [array.reshape(panels, groups, 1, LANES).astype(np.float32) for array in scales]
        values = values * wide[0] + (wide[1] if format.offsets else 0)
        values = values.reshape(panels, -1, LANES)
    matrix: AnyArray = values.swapaxes(0, 1).reshape(-1, panels * LANES)[:rows, :columns]
    return matrix


def interleave_gated(gate: Array, up: Array) -> Array:
    """Columns of ``gate[..., F]`` and ``up[..., F]`` in turns of 16, F padded to 16: what `matmul` wants if ``gated``.

    Works for weights, for the parts of quantised ones, and for biases.
    """
    if gate.shape != up.shape:
        raise ValueError(f"gate{list(gate.shape)} and up{list(up.shape)} must have one shape")
    pad = [(0, 0)] * (gate.ndim - 1) + [(0, -gate.shape[-1] % LANES)]
    both = [np.pad(array, pad).reshape(*gate.shape[:-1], -1, LANES) for array in (gate, up)]
    return np.stack(both, -2).reshape(*gate.shape[:-1], -1)


def packed_shapes(
    format: WeightFormat, rows: int, columns: int, *, gated: bool = False
) -> list[tuple[tuple[int, ...], str]]:
    """Shape and dtype of each array of a packed weight; ``columns`` of a gated one count both halves, unpadded."""
    panels = -(-(columns // 2) // LANES) * 2 if gated else -(-columns // LANES)
    padded = -(-rows // format.row_unit) * format.row_unit
    if format.kind == "float32":
        return [((panels, padded, LANES), "float32")]
    if format.kind == "bfloat16":
        return [((panels, padded // 2, LANES, 2), "uint16")]
    values = ((panels, padded // format.step_rows, LANES, 4), "uint8")
    if not format.group:
        return [values, ((panels, LANES), "float32")]
    return [values] + [((panels, padded // format.group, LANES), "float16")] * (1 + format.offsets)


def _padded(array: Array, row_unit: int, value: int) -> Array:
    rows, columns = array.shape
    return np.pad(array, ((0, -rows % row_unit), (0, -columns % LANES)), constant_values=value)


def _panels(array: Array, step: int) -> Array:
    """``[K, N]`` as ``[N/16, K/step, 16, step]``."""
    rows, columns = array.shape
    return np.ascontiguousarray(array.reshape(rows // step, step, columns // LANES, LANES).transpose(2, 0, 3, 1))


def _scale_panels(array: Array) -> Array:
    """``[N]`` as ``[N/16, 16]``, and ``[groups, N]`` as ``[N/16, groups, 16]``."""
    if array.ndim == 1:
        return np.pad(array, (0, -array.shape[0] % LANES)).reshape(-1, LANES)
    return _panels(_padded(array, 1, 0), 1)[..., 0]


def _bf16_bits(array: Array) -> Array:
    """bfloat16 bits, rounded to the nearest or even."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded)
