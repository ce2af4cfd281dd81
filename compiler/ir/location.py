"""Where an operation comes from: the user's file and line, kept through every pass for messages and StableHLO."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Frame:
    """One frame of the user's own code."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.function})"


@dataclasses.dataclass(frozen=True)
class Location:
    """The user's frames of an operation, innermost first, with its JAX name stack."""

    frames: tuple[Frame, ...] = ()
    name_stack: str = ""
    traceback: Any = dataclasses.field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return str(self.frames[0]) if self.frames else "<unknown location>"

    def short(self) -> str:
        """``file.py:12``, for printed IR."""
        if not self.frames:
            return "?"
        return f"{self.frames[0].file.rsplit('/', 1)[-1]}:{self.frames[0].line}"


UNKNOWN = Location()
