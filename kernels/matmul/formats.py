"""How the numbers of weight matrices are stored: what a format must know, and which formats there are.

A format is a class in a file of this folder, and `weight_formats` there gives its names: so a new one is one file. The
reference computes with whatever a format unpacks to, on every platform; an implementation that does better refuses, as
the registry has it, the formats that it has no code for.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeAlias, TypeVar

import numpy as np

from distaff.kernels.registry import import_files

LANES = 16  # columns in a panel
Array: TypeAlias = np.ndarray[Any, Any]
AnyArray = TypeVar("AnyArray", bound=Any)  # of numpy, or of jax and perhaps traced
Shapes: TypeAlias = list[tuple[tuple[int, ...], str]]  # shape and dtype of each array


class WeightFormatError(ValueError):
    """There is no such weight format; the message says what there is."""


class WeightFormat(abc.ABC):
    """How a weight matrix ``W[K, N]`` is stored: as up to three arrays (values, scales, offsets).

    The first dimension of each array are panels of 16 columns, padded with zeros. Formats are hashable, and equal if
    they mean the same. ``kind`` is float32, bfloat16, int8 or int4: that which it loses about as much as.
    """

    kind: str

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """A short name that `parse` reads."""

    @property
    @abc.abstractmethod
    def bytes_per_weight(self) -> float:
        """Bytes of memory for one weight, with its share of scales and offsets of groups (not of columns)."""

    @abc.abstractmethod
    def shapes(self, rows: int, panels: int) -> Shapes:
        """Of the arrays of a matrix with that many rows and panels."""

    @abc.abstractmethod
    def pack(self, weight: Array) -> tuple[Array, ...]:
        """The arrays of a float ``weight[K, N]``, rounded or quantised."""

    @abc.abstractmethod
    def unpack(self, arrays: tuple[AnyArray, ...], rows: int, np: ModuleType) -> AnyArray:
        """The matrix as float32 ``[rows, 16 * panels]``, with numpy or jax.numpy."""

    def pack_parts(self, *parts: Array) -> tuple[Array, ...]:
        """The arrays of what is quantised already, as `distaff.kernels.matmul.gguf_blocks` takes it apart."""
        raise NotImplementedError(f"nothing is stored as {self.name} elsewhere")

    @staticmethod
    def parse(name: str) -> WeightFormat:
        """The format of that name; raises `WeightFormatError`."""
        import_files("matmul")
        for _, read in _families:
            if (format := read(name)) is not None:
                return format
        raise WeightFormatError(f"no weight format {name!r}; write {', '.join(map(str, usual_formats()))} ...")

    def __str__(self) -> str:
        return self.name


Reader: TypeAlias = Callable[[str], WeightFormat | None]
_families: list[tuple[tuple[str, ...], Reader]] = []


def weight_formats(*usual: str) -> Callable[[Reader], Reader]:
    """Decorator of a function that gives the format of a name, or None; ``usual`` are the names worth mentioning."""

    def add(read: Reader) -> Reader:
        _families.append((usual, read))
        return read

    return add


def usual_formats() -> list[WeightFormat]:
    """Those that are worth mentioning, of all files."""
    import_files("matmul")
    return [WeightFormat.parse(name) for names, _ in _families for name in names]
