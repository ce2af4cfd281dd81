"""Arrays that lie in a large buffer with others: a program that takes few buffers is called faster than with many."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

import jax
import numpy as np

PIECE_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """An array that begins at byte ``offset``, a multiple of `PIECE_ALIGNMENT`, of ``buffer`` (uint8 [N])."""

    buffer: jax.Array
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self) -> jax.Array:
        """The array by itself; on a CPU that is a copy."""
        size = self.dtype.itemsize
        values = self.buffer[self.offset : self.offset + int(np.prod(self.shape)) * size]
        items = values.reshape(*self.shape, size) if size > 1 else values.reshape(self.shape)
        return jax.lax.bitcast_convert_type(items, self.dtype)


Operand: TypeAlias = jax.Array | Piece


def as_array(operand: Operand) -> jax.Array:
    """The operand by itself, wherever it lies."""
    return operand.read() if isinstance(operand, Piece) else operand


def with_places(operands: Sequence[Operand]) -> tuple[list[jax.Array], np.ndarray]:
    """What a native kernel takes: arrays or buffers, and where in these the pieces begin, int64 (-1: an array)."""
    places = [operand.offset if isinstance(operand, Piece) else -1 for operand in operands]
    arrays = [operand.buffer if isinstance(operand, Piece) else operand for operand in operands]
    return arrays, np.array(places, np.int64)
