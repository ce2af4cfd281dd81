"""Weights as programs take them: those that native kernels read lie together in a few large buffers.

A call costs time for every argument, and more where the weights themselves have driven what the runtime knows of its
arguments out of the processor's caches: 0.4 ms of a step of 7.4 ms for 195 of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from distaff.compiler.serve_step import ServeStep
from distaff.kernels import native
from distaff.kernels.matmul import PIECE_ALIGNMENT, Piece
from distaff.kernels.matmul.pieces import Operand

MAX_BUFFER_BYTES = 1 << 30  # of which one at a time is put together when an artifact is written


@dataclasses.dataclass(frozen=True)
class Joined:
    """A buffer of bytes in the making: arrays by name, and where each begins. Put together by `numpy.asarray`."""

    arrays: Mapping[str, Any]
    offsets: Mapping[str, int]
    nbytes: int

    @property
    def shape(self) -> tuple[int]:
        """As of a NumPy array; so is ``dtype``."""
        return (self.nbytes,)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Bytes."""
        return np.dtype(np.uint8)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """The bytes."""
        whole = np.zeros(self.nbytes, np.uint8)
        for name, array in self.arrays.items():
            part = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            whole[self.offsets[name] : self.offsets[name] + part.size] = part
        return whole


class ProgramWeights:
    """The weights of ``step`` as its programs take them, on ``platform``.

    ``arrays`` are the arguments in order, by name: `Joined` buffers for what the CPU's native kernels read, and the
    others as they are.
    """

    def __init__(self, step: ServeStep, platform: str) -> None:
        joins = platform == "cpu" and native.available()
        self._weights = step.weights
        self._buffer_of: dict[str, tuple[str, int]] = {}
        self.arrays: dict[str, Any] = {}
        group: dict[str, Any] = {}
        size = 0
        for name, array in step.weights.items():
            if not joins or name not in step.of_products:
                self.arrays[name] = array
                continue
            if group and size + _padded_bytes(array) > MAX_BUFFER_BYTES:
                self._add(group)
                group, size = {}, 0
            group[name] = array
            size += _padded_bytes(array)
        if group:
            self._add(group)

    def _add(self, arrays: dict[str, Any]) -> None:
        ends = np.cumsum([_padded_bytes(array) for array in arrays.values()]).tolist()
        offsets = dict(zip(arrays, [0, *ends], strict=False))
        buffer = f"joined.{sum(isinstance(array, Joined) for array in self.arrays.values())}"
        self.arrays[buffer] = Joined(arrays, offsets, ends[-1])
        self._buffer_of |= {name: (buffer, offset) for name, offset in offsets.items()}

    def of_step(self, arguments: Sequence[jax.Array]) -> list[Operand]:
        """What ``step.function`` takes for the program's arguments."""
        given = dict(zip(self.arrays, arguments, strict=True))
        operands: list[Operand] = []
        for name, array in self._weights.items():
            if name in given:
                operands.append(given[name])
            else:
                buffer, offset = self._buffer_of[name]
                operands.append(Piece(given[buffer], offset, tuple(array.shape), np.dtype(array.dtype)))
        return operands


def _padded_bytes(array: Any) -> int:
    return int(-(-array.nbytes // PIECE_ALIGNMENT) * PIECE_ALIGNMENT)
