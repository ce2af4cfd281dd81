"""What the fields of layers hold: types that several layers share, and sizes and axes brought to one form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

from distaff.frontend.layers.dtypes import Array

T = TypeVar("T")
Initializer: TypeAlias = Callable[..., Any]
# lax.Precision, its name, a pair of either, or None for the default.
PrecisionLike: TypeAlias = Any
DotGeneral: TypeAlias = Callable[..., Array]
# (arrays or None, dtype=...) -> the arrays, of one dtype.
PromoteDtype: TypeAlias = Callable[..., Sequence[Any]]
Axes: TypeAlias = int | Sequence[int]


def as_tuple(sizes: int | Sequence[int]) -> tuple[int, ...]:
    """One or several integers as a tuple."""
    return (sizes,) if isinstance(sizes, int) else tuple(sizes)


def per_axis(value: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """One number for each of ``rank`` axes; None stands for 1."""
    return (1 if value is None else value,) * rank if value is None or isinstance(value, int) else tuple(value)


def axes_from_front(axes: Axes, ndim: int) -> tuple[int, ...]:
    """Axes of an array of rank ``ndim``, counted from the front, in order; ValueError if one is out of range."""
    axes = as_tuple(axes)
    if any(not -ndim <= axis < ndim for axis in axes):
        raise ValueError(f"Axes {axes} are out of range for an input with {ndim} axes.")
    return tuple(sorted(axis % ndim for axis in axes))


def merge_param(name: str, a: T | None, b: T | None) -> T:
    """The one of a constructor argument and a call argument that is given; ValueError if both or neither are."""
    if a is None and b is None:
        raise ValueError(f'Parameter "{name}" must be passed to the constructor or at call time.')
    if a is not None and b is not None:
        raise ValueError(
            f'Parameter "{name}" was passed to the constructor and at call time. Should be passed just once.'
        )
    return a if a is not None else b  # type: ignore[return-value]
