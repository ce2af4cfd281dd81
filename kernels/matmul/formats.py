"""How the numbers of a weight matrix are stored."""

from __future__ import annotations

import dataclasses
import re

# Rows of the matrix that 64 bytes of a panel of 16 columns hold; the position here is the kind's number in C++.
STEP_ROWS = {"float32": 1, "bfloat16": 2, "int8": 4, "int4": 8}
GROUPS = (32, 64, 128)

_GGUF = {"q8_0": ("int8", False), "q4_0": ("int4", False), "q4_1": ("int4", True)}
_SHORT = {"float32": "f32", "bfloat16": "bf16"}


class WeightFormatError(ValueError):
    """There is no such weight format; the message says what there is."""


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """How a weight matrix ``W[K, N]`` is stored.

    ``kind`` is float32, bfloat16, int8 or int4. An int8 weight with ``group`` 0 is ``scale * q`` with a float32 scale
    for every column. With a group of 32, 64 or 128 rows every column has a float16 scale for each group, and with
    ``offsets`` a float16 offset as well. int8: ``scale * q (+ offset)`` with q in -128..127. int4: ``scale * (q - 8)``
    or ``scale * q + offset`` with q in 0..15. So GGUF's Q8_0, Q4_0 and Q4_1 are groups of 32.

    Raises `WeightFormatError` for what does not exist.
    """

    kind: str
    group: int = 0
    offsets: bool = False

    def __post_init__(self) -> None:
        if self.kind not in STEP_ROWS:
            raise WeightFormatError(f"no weight of kind {self.kind!r}; there are {', '.join(STEP_ROWS)}")
        if self.group and (not self.quantised or self.group not in GROUPS):
            raise WeightFormatError(f"{self.kind} in groups of {self.group}; groups of int8 and int4 are 32, 64 or 128")
        if self.kind == "int4" and not self.group:
            raise WeightFormatError("int4 needs a group of 32, 64 or 128 rows that share a scale")
        if self.offsets and not self.group:
            raise WeightFormatError(f"{self.kind} has offsets only with groups")

    @property
    def quantised(self) -> bool:
        """Whether weights are integers with scales."""
        return self.kind in ("int8", "int4")

    @property
    def zero(self) -> int:
        """What is stored for the integer 0, so that all stored integers are unsigned."""
        return 128 if self.kind == "int8" else 0 if self.offsets else 8

    @property
    def step_rows(self) -> int:
        """Rows of the matrix in 64 bytes of a panel."""
        return STEP_ROWS[self.kind]

    @property
    def row_unit(self) -> int:
        """The number of rows is padded to a multiple of this."""
        return self.group or self.step_rows

    @property
    def bytes_per_weight(self) -> float:
        """Bytes of memory for one weight, with its share of scales and offsets of groups (not of columns)."""
        return 4 / self.step_rows + (2 * (1 + self.offsets) / self.group if self.group else 0)

    @property
    def name(self) -> str:
        """A short name that `parse` reads: f32, bf16, int8-channel, int8g64, int4g32, q4_1 ..."""
        if not self.quantised:
            return _SHORT[self.kind]
        if self.offsets and (self.kind, self.group) == ("int4", 32):
            return "q4_1"
        return f"{self.kind}g{self.group}{'o' * self.offsets}" if self.group else f"{self.kind}-channel"

    @classmethod
    def parse(cls, name: str) -> WeightFormat:
        """The format of that `name`; also of GGUF's q8_0, q4_0, q4_1 and the long names.

        int8 and int4 alone are in groups of 32. Raises `WeightFormatError`.
        """
        if name in ("int8", "int4"):
            return cls(name, 32)
        if name == "int8-channel":
            return cls("int8")
        if name.lower() in _GGUF:
            kind, offsets = _GGUF[name.lower()]
            return cls(kind, 32, offsets)
        long = {short: kind for kind, short in _SHORT.items()}.get(name, name)
        found = re.fullmatch(r"([a-z0-9]+?)(?:g(\d+)(o?))?", long)
        if found is None:
            raise WeightFormatError(
                f"no weight format {name!r}; write f32, bf16, int8, int8g64, int8-channel, int4, q4_1 ..."
            )
        return cls(found[1], int(found[2] or 0), bool(found[3]))

    def __str__(self) -> str:
        return self.name
