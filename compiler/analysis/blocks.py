"""Blocks of the (query, key) grid, over which masks are proved.

A block is a range of query positions times a range of *distances* ``query - key``. Masks speak mostly of distances
(causal: at least 0; window: less than w), so one long thin block often settles a whole band of the grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class Blocks:
    """A batch of blocks, each trimmed to the cells with both positions in ``[0, length)``; empty ones are dropped.

    ``q0 <= query <= q1``, ``k0 <= key <= k1`` and ``d0 <= query - key <= d1`` are tight bounds of each block, float64
    arrays of shape ``[len(blocks)]`` that hold integers.
    """

    def __init__(self, q0: Any, q1: Any, d0: Any, d1: Any, length: int) -> None:
        last = length - 1
        q0, q1, d0, d1 = (np.asarray(x, np.float64) for x in (q0, q1, d0, d1))
        full = np.flatnonzero((q1 - d0 >= 0) & (q0 - d1 <= last) & (q0 <= q1) & (d0 <= d1))
        q0, q1, d0, d1 = q0[full], q1[full], d0[full], d1[full]
        self.length = length
        self.q0, self.q1 = np.maximum(q0, d0), np.minimum(q1, last + d1)
        self.d0, self.d1 = np.maximum(d0, q0 - last), np.minimum(d1, q1)
        self.k0, self.k1 = np.maximum(q0 - d1, 0), np.minimum(q1 - d0, last)
        self._spans: dict[tuple[float, float], tuple[Floats, Floats]] = {}

    @classmethod
    def cells(cls, q: Any, k: Any, length: int) -> Blocks:
        """Single cells at the given query and key positions."""
        q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
        return cls(q, q, q - k, q - k, length)

    def __len__(self) -> int:
        return len(self.q0)

    def __getitem__(self, index: Any) -> Blocks:
        return Blocks(self.q0[index], self.q1[index], self.d0[index], self.d1[index], self.length)

    @property
    def is_cell(self) -> Bools:
        """Which blocks are a single cell."""
        cell: Bools = (self.q0 == self.q1) & (self.d0 == self.d1)
        return cell

    def nearest(self, i: int) -> tuple[int, int]:
        """The query and key position of a cell of block ``i`` that is as close to the diagonal as any in it."""
        if self.d1[i] < 0:
            return int(self.q0[i]), int(self.q0[i] - self.d1[i])
        distance = max(self.d0[i], 0)
        return int(self.q1[i]), int(self.q1[i] - distance)

    def split(self, *, distances_only: bool = False) -> Blocks:
        """Halves of every block along its longer side (quarters if both are equal), or along the distance."""
        rows, band = self.q1 - self.q0, self.d1 - self.d0
        halve_band = (band > 0) & ((band >= rows) | distances_only)
        halve_rows = (rows > 0) & (((rows >= band) & ~np.bool_(distances_only)) | ~halve_band)
        q_mid = np.where(halve_rows, np.floor((self.q0 + self.q1) / 2), self.q1)
        d_mid = np.where(halve_band, np.floor((self.d0 + self.d1) / 2), self.d1)
        rows_of = np.array([[self.q0, q_mid], [q_mid + 1, self.q1]])[[0, 0, 1, 1]]
        bands_of = np.array([[self.d0, d_mid], [d_mid + 1, self.d1]])[[0, 1, 0, 1]]
        (q0, q1), (d0, d1) = (x.transpose(1, 0, 2).reshape(2, -1) for x in (rows_of, bands_of))
        return Blocks(q0, q1, d0, d1, self.length)

    def span(self, q: float, k: float) -> tuple[Floats, Floats]:
        """Bounds of ``q * query + k * key`` over each block: the tightest of those in (q, k), (q, d) and (k, d)."""
        if (q, k) not in self._spans:
            ranges = {"q": (self.q0, self.q1), "k": (self.k0, self.k1), "d": (self.d0, self.d1)}
            low: Any = -np.inf
            high: Any = np.inf
            for form in ({"q": q, "k": k}, {"q": q + k, "d": -k}, {"k": q + k, "d": q}):
                ends = [(c * ranges[x][0], c * ranges[x][1]) for x, c in form.items()]
                low = np.maximum(low, sum(np.minimum(a, b) for a, b in ends))
                high = np.minimum(high, sum(np.maximum(a, b) for a, b in ends))
            self._spans[q, k] = (low, high)
        return self._spans[q, k]
