"""Bounds of captured tables over ranges of positions: how a constant mask takes part in a proof.

A table over one position that counts up evenly (a captured ``arange``) is an affine form of the position; a table over
query and key whose diagonals are constant (``tril``, bands, ALiBi) is a table over the distance alone. Anything else
is bounded by the extrema that are kept for ranges of power-of-two sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from distaff.compiler.analysis.blocks import Blocks, Floats

Bounds = tuple[Floats, Floats]


class PositionTable:
    """A table ``array`` whose dimensions ``dims[axis]`` ('q', 'k') are read at ``position + starts[axis]``.

    Other dimensions are merged into bounds. Beyond the end of the array nothing is known.
    """

    def __init__(self, array: Any, dims: dict[str, int], starts: dict[str, int]) -> None:
        self.axes = tuple(sorted(dims, reverse=True))  # q before k
        moved = np.moveaxis(np.asarray(array), [dims[a] for a in self.axes], range(len(dims)))
        moved = moved[tuple(slice(starts[a], None) for a in self.axes)]
        self.sizes = dict(zip(self.axes, moved.shape, strict=False))
        flat = moved.reshape(*moved.shape[: len(dims)], -1)
        low = high = flat[..., 0]
        if flat.shape[-1] > 1:
            low, high = flat.min(-1), flat.max(-1)
        self.integral = flat.dtype.kind in "biu"
        self.slope: float | None = None
        self._lookup: Callable[[Blocks], Bounds]
        if len(dims) == 1:
            low, high = _bounds_of(low, high)
            steps = np.diff(low)
            if self.integral and np.array_equal(low, high) and len(low) > 1 and (steps == steps[0]).all():
                self.slope, self.start = float(steps[0]), float(low[0])
            else:
                self._lookup = self._over_positions(low, high)
        elif _is_toeplitz(low) and (high is low or _is_toeplitz(high)):
            self._lookup = self._over_distances(low, high)
        else:
            self._lookup = self._over_pairs(*_bounds_of(low, high))

    def bounds(self, blocks: Blocks) -> tuple[Floats, Floats, dict[str, float]]:
        """Lowest and highest remainder over each block, and the slopes by axis of the affine part."""
        slopes: dict[str, float] = {}
        if self.slope is not None:
            slopes = {self.axes[0]: self.slope}
            low = high = np.full(len(blocks), self.start)
        else:
            low, high = self._lookup(blocks)
        ends = {"q": blocks.q1, "k": blocks.k1}
        covered = np.logical_and.reduce([ends[a] < self.sizes[a] for a in self.axes])
        return np.where(covered, low, -np.inf), np.where(covered, high, np.inf), slopes

    def _over_positions(self, low: Floats, high: Floats) -> Callable[[Blocks], Bounds]:
        extrema = _RangeExtrema(low, high)
        if self.axes == ("q",):
            return lambda blocks: extrema(blocks.q0, blocks.q1)
        return lambda blocks: extrema(blocks.k0, blocks.k1)

    def _over_distances(self, low: Any, high: Any) -> Callable[[Blocks], Bounds]:
        """Line ``d + (keys - 1)`` of the profile holds the diagonal at distance ``d``."""
        profile = [np.concatenate([x[0, :0:-1], x[:, 0]]) for x in (low, high)]
        extrema = _RangeExtrema(*_bounds_of(*profile))
        offset = low.shape[1] - 1
        return lambda blocks: extrema(blocks.d0 + offset, blocks.d1 + offset)

    def _over_pairs(self, low: Floats, high: Floats) -> Callable[[Blocks], Bounds]:
        """A block is covered by 2 x 2 squares of the smallest power-of-two size that is at least its sides."""
        levels = [(low, high)]
        while max(levels[-1][0].shape) > 1:
            levels.append((_halved(levels[-1][0], np.minimum), _halved(levels[-1][1], np.maximum)))

        def lookup(blocks: Blocks) -> Bounds:
            side = np.maximum(blocks.q1 - blocks.q0, blocks.k1 - blocks.k0) + 1
            depth = np.minimum(np.ceil(np.log2(side)).astype(int), len(levels) - 1)
            result = np.empty(len(blocks)), np.empty(len(blocks))
            for level in np.unique(depth):
                at = depth == level
                rows = [np.minimum(x[at].astype(int), n - 1) >> level for x, n in self._ends(blocks, "q", low.shape[0])]
                columns = [
                    np.minimum(x[at].astype(int), n - 1) >> level for x, n in self._ends(blocks, "k", low.shape[1])
                ]
                corners = [(i, j) for i in rows for j in columns]
                for out, table, best in zip(result, levels[level], (np.minimum, np.maximum), strict=True):
                    out[at] = best.reduce([table[i, j] for i, j in corners])
            return result

        return lookup

    @staticmethod
    def _ends(blocks: Blocks, axis: str, size: int) -> list[tuple[Floats, int]]:
        first, last = (blocks.q0, blocks.q1) if axis == "q" else (blocks.k0, blocks.k1)
        return [(first, size), (last, size)]


class _RangeExtrema:
    """Minimum and maximum over index ranges of a pair of arrays, from extrema of power-of-two ranges."""

    def __init__(self, low: Floats, high: Floats) -> None:
        lows, highs, width = [low], [high], 1
        while 2 * width <= len(low):
            lows.append(_shifted(lows[-1], width, np.minimum))
            highs.append(_shifted(highs[-1], width, np.maximum))
            width *= 2
        self.lows, self.highs = np.stack(lows), np.stack(highs)

    def __call__(self, first: Floats, last: Floats) -> Bounds:
        end = self.lows.shape[1] - 1
        i, j = np.clip(first, 0, end).astype(int), np.clip(last, 0, end).astype(int)
        level = np.floor(np.log2(j - i + 1)).astype(int)
        j = j - (1 << level) + 1
        return (
            np.minimum(self.lows[level, i], self.lows[level, j]),
            np.maximum(self.highs[level, i], self.highs[level, j]),
        )


def _bounds_of(low: Any, high: Any) -> Bounds:
    """Numbers as float64; NaN is unknown."""
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    undefined = np.isnan(low) | np.isnan(high)
    return np.where(undefined, -np.inf, low), np.where(undefined, np.inf, high)


def _shifted(x: Floats, width: int, best: Any) -> Floats:
    """``best`` of each element and the one ``width`` later; the tail, which no query reads, stays."""
    result = x.copy()
    result[:-width] = best(x[:-width], x[width:])
    return result


def _halved(x: Floats, best: Any) -> Floats:
    for axis in (0, 1):
        if x.shape[axis] % 2:
            x = np.concatenate([x, np.take(x, [-1], axis)], axis)
        x = best(np.take(x, range(0, x.shape[axis], 2), axis), np.take(x, range(1, x.shape[axis], 2), axis))
    return x


def _is_toeplitz(x: Any) -> bool:
    return bool(np.array_equal(x[1:, 1:], x[:-1, :-1]))
