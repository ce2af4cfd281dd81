"""The requests that run now as arrays, kept up to date by difference, and the ragged batch cut out of them each step.

A request owns one row of each array from its admission until it is preempted or ends: its token ids, the pages of its
block table. A step's `StepBatch` is then a handful of vectorised gathers, whatever the number of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from distaff.compiler.artifact import ProgramSpec
from distaff.kernels.paged_attention import StepBatch

Indices: TypeAlias = npt.NDArray[np.int32]


class InputBatch:
    """Rows for up to ``max_num_seqs`` requests of up to ``max_model_len`` tokens each."""

    def __init__(self, max_num_seqs: int, max_model_len: int, page_size: int, pages_per_request: int) -> None:
        self._page_size = page_size
        self._tokens = np.zeros((max_num_seqs, max_model_len), np.int32)
        self._tables = np.zeros((max_num_seqs, pages_per_request), np.int32)
        self._num_pages = [0] * max_num_seqs
        self._free = list(range(max_num_seqs))[::-1]
        self._row_of: dict[str, int] = {}

    def __len__(self) -> int:
        """Number of rows in use."""
        return len(self._row_of)

    def row_of(self, request_id: str) -> int | None:
        """The request's row; None if it has none."""
        return self._row_of.get(request_id)

    def admit(self, request_id: str, token_ids: Sequence[int]) -> int:
        """Gives a request a row and fills in what is known of its tokens, prompt and output."""
        row = self._row_of[request_id] = self._free.pop()
        self._tokens[row, : len(token_ids)] = token_ids
        self._tables[row] = 0
        self._num_pages[row] = 0
        return row

    def release(self, request_id: str) -> None:
        """Frees the request's row, if it has one."""
        row = self._row_of.pop(request_id, None)
        if row is not None:
            self._free.append(row)

    def extend_table(self, row: int, pages: Sequence[int]) -> None:
        """Takes over the pages that the request got since the last call; ``pages`` is its whole table."""
        known = self._num_pages[row]
        if len(pages) > known:
            self._tables[row, known : len(pages)] = pages[known:]
            self._num_pages[row] = len(pages)

    def append(self, rows: Indices, positions: Indices, tokens: Indices) -> None:
        """Puts one new token into each of ``rows``."""
        self._tokens[rows, positions] = tokens

    def build(
        self, program: ProgramSpec, rows: Indices, starts: Indices, lengths: Indices, samples: Indices
    ) -> StepBatch:
        """The batch of ``lengths[i]`` tokens from position ``starts[i]`` on of the request in ``rows[i]``.

        ``samples`` are indices into the batch's token axis. Rows of one token must come first.
        """
        count, total = len(rows), int(lengths.sum())
        bounds = np.zeros(count + 1, np.int32)
        np.cumsum(lengths, out=bounds[1:])
        owner = np.repeat(np.arange(count, dtype=np.int32), lengths)
        at = np.arange(total, dtype=np.int32) + np.repeat(starts - bounds[:-1], lengths)
        row = rows[owner]
        pages = self._tables[row, at // self._page_size]
        # Programs take arrays of the host as they are.
        fields: dict[str, Any] = dict(
            tokens=_padded(self._tokens[row, at], program.tokens),
            positions=_padded(at, program.tokens),
            slots=_padded(pages * self._page_size + at % self._page_size, program.tokens),
            rows=_padded(owner, program.tokens, program.requests - 1),
            starts=_padded(bounds, program.requests + 1, total),
            contexts=_padded(starts + lengths, program.requests),
            tables=_padded(self._tables[rows], program.requests),
            decodes=np.int32(np.cumprod(lengths == 1).sum()),
            samples=_padded(samples, program.samples),
        )
        return StepBatch(**fields)


def _padded(values: Indices, size: int, filler: int = 0) -> Indices:
    """``values`` filled up to ``size`` along the first axis."""
    result = np.full((size, *values.shape[1:]), filler, np.int32)
    result[: len(values)] = values
    return result
