"""Types of IR values: dtypes and shapes whose dimensions may be symbolic in the token axes.

A traced model has one token axis ``S``. Inside an attention region the two roles that it plays are told apart: ``q``
(the query's token) and ``k`` (the key's token). A dimension is an int or ``scale * axis + offset``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

TOKENS = "S"
QUERY = "q"
KEY = "k"


@dataclasses.dataclass(frozen=True)
class Sym:
    """The size ``scale * axis + offset``; the plain axis itself has scale 1 and offset 0."""

    axis: str = TOKENS
    scale: int = 1
    offset: int = 0

    @property
    def is_axis(self) -> bool:
        """Whether this is exactly one token axis, not a part or multiple of it."""
        return self.scale == 1 and self.offset == 0

    def at(self, sizes: Mapping[str, int]) -> int:
        """The number that this is when each axis has the given size."""
        return self.scale * sizes[self.axis] + self.offset

    def __str__(self) -> str:
        text = self.axis if self.scale == 1 else f"{self.scale}{self.axis}"
        return text + (f"{self.offset:+d}" if self.offset else "")


Dim = int | Sym


@dataclasses.dataclass(frozen=True)
class TensorType:
    """Shape and dtype of a value."""

    shape: tuple[Dim, ...]
    dtype: np.dtype[Any]

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def token_dims(self) -> tuple[int, ...]:
        """Indices of the dimensions that are symbolic."""
        return tuple(i for i, d in enumerate(self.shape) if isinstance(d, Sym))

    def at(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The concrete shape for the given axis sizes."""
        return tuple(resolve(self.shape, sizes))

    def per_token(self) -> tuple[int, ...]:
        """The static dimensions, in order: what one token (or query-key pair) holds."""
        return tuple(d for d in self.shape if not isinstance(d, Sym))

    def __str__(self) -> str:
        return f"{_dtype_name(self.dtype)}[{','.join(map(str, self.shape))}]"


def resolve(value: Any, sizes: Mapping[str, int]) -> Any:
    """Replaces every `Sym` in a (nested) parameter by its number."""
    if isinstance(value, Sym):
        return value.at(sizes)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(resolve(v, sizes) for v in value)
    if isinstance(value, list):
        return [resolve(v, sizes) for v in value]
    return value


def _dtype_name(dtype: np.dtype[Any]) -> str:
    name = str(dtype)
    for long, short in (("bfloat", "bf"), ("float", "f"), ("uint", "u"), ("int", "i"), ("complex", "c")):
        if name.startswith(long):
            return short + name[len(long) :]
    return name
