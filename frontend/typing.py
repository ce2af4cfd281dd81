"""The types that signatures of Flax are written with, by the names of ``flax.typing``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol, Self, TypeAlias, TypeGuard, TypeVar

import jax
import numpy as np

from distaff.frontend.core import FrozenDict
from distaff.frontend.core.lift.axes import In as In
from distaff.frontend.core.lift.axes import InOutAxis as InOutAxis
from distaff.frontend.core.lift.axes import InOutScanAxis as InOutScanAxis
from distaff.frontend.core.lift.axes import Out as Out
from distaff.frontend.core.meta import AxisName as AxisName
from distaff.frontend.core.meta import LogicalNames as LogicalNames
from distaff.frontend.core.spmd import LogicalRules as LogicalRules
from distaff.frontend.layers.dtypes import Array as Array
from distaff.frontend.layers.dtypes import Dtype as Dtype
from distaff.frontend.layers.fields import Axes as Axes
from distaff.frontend.layers.fields import Initializer as Initializer
from distaff.frontend.layers.fields import PrecisionLike as PrecisionLike

A = TypeVar("A", bound=tuple[Any, ...])

Shape: TypeAlias = Sequence[int]
PRNGKey: TypeAlias = jax.Array
RNGSequences: TypeAlias = dict[str, PRNGKey]
PRNGFoldable: TypeAlias = int | str
Path: TypeAlias = str
Leaf: TypeAlias = Any

DotGeneralT: TypeAlias = Callable[..., Array]
ConvGeneralDilatedT: TypeAlias = Callable[..., Array]
EinsumT: TypeAlias = Callable[..., Array]
LaxPadding: TypeAlias = str | Sequence[tuple[int, int]]
PaddingLike: TypeAlias = str | int | Sequence[int | tuple[int, int]]

Collection: TypeAlias = Mapping[str, Any]
MutableCollection: TypeAlias = dict[str, Any]
VariableDict: TypeAlias = Mapping[str, Collection]
FrozenVariableDict: TypeAlias = FrozenDict[str, Collection]
MutableVariableDict: TypeAlias = dict[str, MutableCollection]

Axis: TypeAlias = int | None
ScanAxis: TypeAlias = int
Sharding: TypeAlias = tuple[AxisName, ...]
ArrayPytree: TypeAlias = Any
LogicalPartitionSpec: TypeAlias = Any
LogicalPartitionSpecPytree: TypeAlias = Any
PartitionSpecPytree: TypeAlias = Any


class Key(Hashable, Protocol):
    """What can stand in a path: hashable, and sortable among its like."""

    def __lt__(self, value: Any, /) -> bool:
        """Whether this one comes first."""


PathParts: TypeAlias = tuple[Key, ...]


def is_key_like(x: Any) -> TypeGuard[Key]:
    """Whether ``x`` can stand in a path."""
    return hasattr(x, "__hash__") and hasattr(x, "__lt__")


class ShapeDtype(Protocol):
    """What has a shape and a dtype."""

    shape: Shape
    dtype: Any


def has_shape_dtype(x: Any) -> TypeGuard[ShapeDtype]:
    """Whether ``x`` has a shape and a dtype."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


class PromoteDtypeFn(Protocol):
    """What brings arrays to one dtype: the argument ``promote_dtype`` of layers."""

    def __call__(self, args: A, /, *, dtype: Any = None, inexact: bool = True) -> A:
        """The arrays, None staying None."""


@dataclasses.dataclass(frozen=True, slots=True)
class SizeBytes:
    """How many values there are, and how many bytes they take; sizes can be added."""

    size: int
    bytes: int

    @classmethod
    def from_array(cls, x: ShapeDtype) -> Self:
        """The size of an array, which may be abstract."""
        size = int(np.prod(x.shape))
        itemsize = jax.numpy.dtype(x.dtype).itemsize if isinstance(x.dtype, str) else x.dtype.itemsize
        return cls(size, size * itemsize)

    @classmethod
    def from_any(cls, x: Any) -> Self:
        """The size of the arrays in a tree."""
        return sum((cls.from_array(leaf) for leaf in jax.tree.leaves(x) if has_shape_dtype(leaf)), cls(0, 0))

    def __add__(self, other: SizeBytes) -> Self:
        return type(self)(self.size + other.size, self.bytes + other.bytes)

    def __bool__(self) -> bool:
        return bool(self.size)

    def __repr__(self) -> str:
        return f"{self.size:,} ({bytes_text(self.bytes)})"


def bytes_text(count: int) -> str:
    """A number of bytes with its unit: ``23.2 KB``."""
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count > one:
            return f"{count / one:,.1f} {unit}"
    return f"{count:,} B"
