"""Rounding weights to int8 and int4."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from distaff.kernels.matmul.formats import Array

if TYPE_CHECKING:
    from distaff.kernels.matmul.panels import PanelFormat

_COLUMNS = 256  # at a time, so that what is worked on stays in the cache
# int4 has so few steps that cutting off the largest weights often pays: ranges to try, as parts of the full one.
_RANGES = (1.0, 0.93, 0.86, 0.79)


class UnquantisableError(ValueError):
    """A weight holds numbers that have no scale: infinite, not a number, or too large for float16."""


class _Blocks(NamedTuple):
    """Integers ``[G, group, N]``, scales and offsets ``[G, N]`` of the groups of some columns."""

    integers: Array
    scales: Array
    offsets: Array


def quantise(weight: Array, format: PanelFormat) -> tuple[Array, ...]:
    """Integers ``[K, N]``, scales and, if ``format`` has them, offsets of a float32 ``weight[K, N]``.

    int8 takes its range from the largest weights. int4 tries some ranges (and both signs), fits the scale to the
    integers by least squares and keeps for every group what has the least squared error. Raises `UnquantisableError`.
    """
    if not np.isfinite(weight).all():
        raise UnquantisableError("a weight with infinite numbers or NaN cannot be quantised")
    reach = 65504 * (1 if format.offsets else _limits(format)[1])  # of float16 scales
    if format.group and (largest := np.abs(weight).max()) > reach:
        raise UnquantisableError(
            f"{largest:.3g} is too large for {format} with float16 scales; use int8 without groups"
        )
    rows, columns = weight.shape
    group = format.group or rows
    # A last group that is not full is filled with its own rows in turn: zeros could widen its range.
    full = rows // group * group
    missing = full + np.arange(-rows % group) % max(1, rows - full)
    blocks = weight[np.concatenate([np.arange(rows), missing])].reshape(-1, group, columns)
    parts = [_best(blocks[..., n : n + _COLUMNS], format) for n in range(0, columns, _COLUMNS)]
    integers, scales, offsets = (np.concatenate(arrays, -1) for arrays in zip(*parts, strict=True))
    integers = integers.reshape(-1, columns)[:rows]
    return (integers, scales if format.group else scales[0], *([offsets] if format.offsets else []))


def _best(blocks: Array, format: PanelFormat) -> _Blocks:
    """Of the ways to round float32 ``blocks[G, group, N]`` the one with the least squared error, group by group."""
    best, least = None, None
    for scales, offsets in _candidates(blocks, format):
        found = _rounded(blocks, scales, offsets, format)
        if format.kind == "int4":
            found = _rounded(blocks, _fitted(blocks, found, format), found.offsets, format)
        error = np.square(_values(found, format) - blocks).sum(1)
        if best is None or least is None:
            best, least = found, error
            continue
        better = error < least
        least = np.minimum(error, least)
        best = _Blocks(
            *(np.where(better[:, None] if a.ndim == 3 else better, b, a) for a, b in zip(best, found, strict=True))
        )
    assert best is not None
    return best


def _candidates(blocks: Array, format: PanelFormat) -> list[tuple[Array, Array]]:
    """Scales and offsets ``[G, N]`` to start from."""
    low, high = blocks.min(1), blocks.max(1)
    lowest, highest = _limits(format)
    if format.offsets:
        middle, step = (low + high) / 2, (high - low) / np.float32(highest - lowest)
        parts = [np.float32(part) for part in (_RANGES if format.kind == "int4" else _RANGES[:1])]
        return [(step * part, middle - step * part * np.float32((lowest + highest) / 2)) for part in parts]
    none = np.zeros_like(low)
    if format.kind == "int8":
        return [(np.maximum(high, -low) / np.float32(127), none)]
    extreme = np.where(-low > high, low, high)  # -8 steps reach further than 7
    return [(extreme * np.float32(sign * part / 8), none) for part in _RANGES for sign in (-1, 1)]


def _limits(format: PanelFormat) -> tuple[int, int]:
    """The least and the largest integer, as they are multiplied with the scale."""
    return (-127, 127) if format.kind == "int8" else (-format.zero, 15 - format.zero)


def _rounded(blocks: Array, scales: Array, offsets: Array, format: PanelFormat) -> _Blocks:
    """Blocks with these scales and offsets, rounded to float16 if they are of groups."""
    if format.group:
        scales, offsets = scales.astype(np.float16), offsets.astype(np.float16)
    wide = scales.astype(np.float32)[:, None]
    inverse = np.divide(1, wide, out=np.zeros_like(wide), where=wide != 0)
    steps = np.rint((blocks - offsets.astype(np.float32)[:, None]) * inverse)
    return _Blocks(np.clip(steps, *_limits(format)).astype(np.int16) + _bias(format), scales, offsets)


def _fitted(blocks: Array, found: _Blocks, format: PanelFormat) -> Array:
    """The scales ``[G, N]`` that fit the integers best."""
    steps = (found.integers - _bias(format)).astype(np.float32)
    weights = blocks - found.offsets.astype(np.float32)[:, None]
    squares = np.square(steps).sum(1)
    scales: Array = np.divide((weights * steps).sum(1), squares, out=np.zeros_like(squares), where=squares != 0)
    return scales


def _values(found: _Blocks, format: PanelFormat) -> Array:
    steps = (found.integers - _bias(format)).astype(np.float32)
    return steps * found.scales.astype(np.float32)[:, None] + found.offsets.astype(np.float32)[:, None]


def _bias(format: PanelFormat) -> int:
    """int4 without offsets is ``scale * (q - 8)``."""
    return format.zero if format.kind == "int4" else 0
