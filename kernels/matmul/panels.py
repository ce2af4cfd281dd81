"""The formats that the native kernels read, in one layout on every processor.

In a panel K runs outside and columns inside, so that 64 bytes (a step) meet 4 bytes of activations: the order of the
dot-product instructions and of AMX tiles.

    float32   float32 [panels, K, 16]
    bfloat16  uint16 [panels, K/2, 16, 2]  bits
    int8      uint8 [panels, K/4, 16, 4]   q + 128
    int4      uint8 [panels, K/8, 16, 4]   row 8s+j in the low nibble of byte j of step s, row 8s+4+j in the high one

Scales and offsets are float16 ``[panels, groups, 16]``, scales of whole columns float32 ``[panels, 16]``. Columns are
padded to 16 with zeros, rows to the group or the step.
"""

from __future__ import annotations

import dataclasses
import re
from types import ModuleType

import numpy as np

from distaff.kernels.matmul.formats import (
    LANES,
    AnyArray,
    Array,
    Shapes,
    WeightFormat,
    WeightFormatError,
    weight_formats,
)
from distaff.kernels.matmul.quantise import quantise

# Rows of the matrix that 64 bytes of a panel of 16 columns hold; the position here is the kind's number in C++.
STEP_ROWS = {"float32": 1, "bfloat16": 2, "int8": 4, "int4": 8}
GROUPS = (32, 64, 128)
X_GROUP = 32

_GGUF = {"q8_0": ("int8", False), "q4_0": ("int4", False), "q4_1": ("int4", True)}
_SHORT = {"float32": "f32", "bfloat16": "bf16"}


@dataclasses.dataclass(frozen=True)
class PanelFormat(WeightFormat):
    """float32, bfloat16, int8 or int4, the integers with scales.

    An int8 weight with ``group`` 0 is ``scale * q`` with a float32 scale for every column. With a group of 32, 64 or
    128 rows every column has a float16 scale for each group, and with ``offsets`` a float16 offset as well. int8:
    ``scale * q (+ offset)`` with q in -128..127. int4: ``scale * (q - 8)`` or ``scale * q + offset`` with q in 0..15.
    So GGUF's Q8_0, Q4_0 and Q4_1 are groups of 32.

    Activations are rounded to int8 for these, each row in steps of its largest number / 127, or each group of a row
    where the weight has groups. With ``x_group`` 32 (and no groups) the step of each 32 numbers of a row is the row's,
    divided by the largest power of two that they allow: better than none, and nearly as fast.

    Raises `WeightFormatError` for what does not exist.
    """

    kind: str
    group: int = 0
    offsets: bool = False
    x_group: int = 0

    def __post_init__(self) -> None:
        if self.kind not in STEP_ROWS:
            raise WeightFormatError(f"no weight of kind {self.kind!r}; there are {', '.join(STEP_ROWS)}")
        if self.group and (not self.quantised or self.group not in GROUPS):
            raise WeightFormatError(f"{self.kind} in groups of {self.group}; groups of int8 and int4 are 32, 64 or 128")
        if self.kind == "int4" and not self.group:
            raise WeightFormatError("int4 needs a group of 32, 64 or 128 rows that share a scale")
        if self.offsets and not self.group:
            raise WeightFormatError(f"{self.kind} has offsets only with groups")
        if self.x_group and (self.kind != "int8" or self.group or self.x_group != X_GROUP):
            raise WeightFormatError(f"activations alone have groups of {X_GROUP}, beside int8 without groups")

    @property
    def quantised(self) -> bool:
        """Whether weights are integers with scales."""
        return self.kind in ("int8", "int4")

    @property
    def zero(self) -> int:
        """What is stored for the integer 0, so that all stored integers are unsigned."""
        return 128 if self.kind == "int8" else 0 if self.offsets else 8

    @property
    def row_unit(self) -> int:
        """The number of rows is padded to a multiple of this."""
        return self.group or STEP_ROWS[self.kind]

    @property
    def bytes_per_weight(self) -> float:
        """See `WeightFormat`."""
        return 4 / STEP_ROWS[self.kind] + (2 * (1 + self.offsets) / self.group if self.group else 0)

    @property
    def name(self) -> str:
        """f32, bf16, int8-channel, int8x32, int8g64, int4g32, q4_1 ..."""
        if not self.quantised:
            return _SHORT[self.kind]
        if self.offsets and (self.kind, self.group) == ("int4", 32):
            return "q4_1"
        if self.x_group:
            return f"int8x{self.x_group}"
        return f"{self.kind}g{self.group}{'o' * self.offsets}" if self.group else f"{self.kind}-channel"

    def __str__(self) -> str:
        return self.name

    def shapes(self, rows: int, panels: int) -> Shapes:
        """See `WeightFormat`."""
        padded = -(-rows // self.row_unit) * self.row_unit
        if self.kind == "float32":
            return [((panels, padded, LANES), "float32")]
        if self.kind == "bfloat16":
            return [((panels, padded // 2, LANES, 2), "uint16")]
        values = ((panels, padded // STEP_ROWS[self.kind], LANES, 4), "uint8")
        if not self.group:
            return [values, ((panels, LANES), "float32")]
        return [values] + [((panels, padded // self.group, LANES), "float16")] * (1 + self.offsets)

    def pack(self, weight: Array) -> tuple[Array, ...]:
        """See `WeightFormat`; raises `UnquantisableError`."""
        if self.quantised:
            return self.pack_parts(*quantise(np.asarray(weight, np.float32), self))
        values = _bf16_bits(weight) if self.kind == "bfloat16" else np.asarray(weight, np.float32)
        values = _panels(_padded(values, self.row_unit, 0), STEP_ROWS[self.kind])
        return (values[..., 0] if self.kind == "float32" else values,)

    def pack_parts(self, *parts: Array) -> tuple[Array, ...]:
        """Packs integers ``[K, N]`` (q as above), scales and, if there are, offsets, bit for bit.

        Scales are float32 ``[N]``, or float16 ``[groups, N]`` as are offsets. Raises `ValueError` if they do not fit
        together or to the format.
        """
        integers, *scales = parts
        rows, columns = integers.shape
        groups = -(-rows // self.group) if self.group else 0
        shape, dtype = ((groups, columns), np.float16) if groups else ((columns,), np.float32)
        if len(scales) != 1 + self.offsets:
            raise ValueError(f"{self} has {'' if self.offsets else 'no '}offsets")
        for name, array in zip(("scales", "offsets"), scales, strict=False):
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(
                    f"{name} of {self} must be {dtype.__name__}{list(shape)}, not {array.dtype}{list(array.shape)}"
                )
        stored = integers.astype(np.int16) + (128 if self.kind == "int8" else 0)
        most = 255 if self.kind == "int8" else 15
        if not self.quantised or stored.min() < 0 or stored.max() > most:
            raise ValueError(f"integers from {integers.min()} to {integers.max()} are not those of {self}")
        values = _panels(_padded(stored.astype(np.uint8), self.row_unit, self.zero), 4)
        if self.kind == "int4":
            values = values[:, 0::2] | values[:, 1::2] << 4
        return (values, *map(_scale_panels, scales))

    def unpack(self, arrays: tuple[AnyArray, ...], rows: int, np: ModuleType) -> AnyArray:
        """See `WeightFormat`."""
        values, *scales = arrays
        if self.kind == "int4":
            values = np.stack([values & 15, values >> 4], 2).reshape(values.shape[0], -1, LANES, 4)
        if self.kind == "bfloat16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        panels = values.shape[0]
        values = values.reshape(panels, values.shape[1], LANES, -1).swapaxes(2, 3).reshape(panels, -1, LANES)
        if self.quantised:
            values = values.astype(np.float32) - np.float32(self.zero)
            groups = scales[0].reshape(panels, -1, 1, LANES).shape[1]
            values = values.reshape(panels, groups, -1, LANES)
            wide = [array.reshape(panels, groups, 1, LANES).astype(np.float32) for array in scales]
            values = values * wide[0] + (wide[1] if self.offsets else 0)
            values = values.reshape(panels, -1, LANES)
        matrix: AnyArray = values.swapaxes(0, 1).reshape(-1, panels * LANES)[:rows]
        return matrix


@weight_formats("f32", "bf16", "int8", "int8x32", "int8-channel", "int4", "q4_1")
def read_name(name: str) -> PanelFormat | None:
    """Names as `PanelFormat.name` writes them, the kinds, and GGUF's Q8_0, Q4_0, Q4_1.

    int8 and int4 alone are in groups of 32, int4 with offsets: 16 values are too few to spend half on one sign. int8x32
    has groups of activations alone.
    """
    if name in ("int8", "int4"):
        return PanelFormat(name, 32, offsets=name == "int4")
    if name == f"int8x{X_GROUP}":
        return PanelFormat("int8", x_group=X_GROUP)
    if name == "int8-channel":
        return PanelFormat("int8")
    if name.lower() in _GGUF:
        kind, offsets = _GGUF[name.lower()]
        return PanelFormat(kind, 32, offsets)
    long = {short: kind for kind, short in _SHORT.items()}.get(name, name)
    found = re.fullmatch(rf"({'|'.join(STEP_ROWS)})(?:g(\d+)(o?))?", long)
    return None if found is None else PanelFormat(found[1], int(found[2] or 0), bool(found[3]))


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
