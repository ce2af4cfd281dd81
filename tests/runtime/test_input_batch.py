"""The vectorised ragged batch against a plain loop over requests and tokens."""

from __future__ import annotations

import numpy as np
import pytest

from distaff.compiler.artifact import ProgramSpec
from distaff.runtime.input_batch import InputBatch

PAGE, MAX_LEN, PAGES = 4, 40, 10


def program(tokens, requests, samples):
    return ProgramSpec("p", tokens, requests, samples, "p", "")


@pytest.mark.smoke
def test_batches_match_a_plain_loop():
    rng = np.random.default_rng(0)
    for _ in range(30):
        batch = InputBatch(6, MAX_LEN, PAGE, PAGES)
        count = int(rng.integers(1, 6))
        decodes = int(rng.integers(0, count + 1))
        known = [rng.integers(1, 100, size=rng.integers(9, MAX_LEN)).tolist() for _ in range(count)]
        tables = [rng.permutation(np.arange(1, 60))[: -(-len(ids) // PAGE)].tolist() for ids in known]
        rows = [batch.admit(f"r{i}", ids) for i, ids in enumerate(known)]
        for row, table in zip(rows, tables, strict=True):
            batch.extend_table(row, table[:1])
            batch.extend_table(row, table)
        lengths = np.array([1] * decodes + [int(rng.integers(2, 8)) for _ in range(count - decodes)], np.int32)
        starts = np.array(
            [int(rng.integers(0, len(ids) - n + 1)) for ids, n in zip(known, lengths, strict=True)], np.int32
        )
        spec = program(64, 8, 4)
        got = batch.build(spec, np.array(rows, np.int32), starts, lengths, np.array([0], np.int32))
        at = 0
        for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            assert got.starts[i] == at and got.contexts[i] == start + length
            assert got.tables[i, : len(tables[i])].tolist() == tables[i]
            for position in range(start, start + length):
                expected = (known[i][position], position, tables[i][position // PAGE] * PAGE + position % PAGE, i)
                assert (got.tokens[at], got.positions[at], got.slots[at], got.rows[at]) == expected
                at += 1
        assert got.decodes == decodes
        assert (got.starts[count:] == at).all() and (got.rows[at:] == 7).all()
        padding = (got.tokens[at:], got.positions[at:], got.slots[at:], got.contexts[count:], got.tables[count:])
        assert not any(array.any() for array in padding)
        assert all(array.dtype == np.int32 for array in got)


def test_rows_are_reused_and_forget_their_pages():
    batch = InputBatch(2, MAX_LEN, PAGE, PAGES)
    first = batch.admit("a", [1, 2, 3])
    batch.extend_table(first, [7, 8])
    batch.release("a")
    batch.release("a")
    again = batch.admit("b", [4])
    assert again == first and len(batch) == 1 and batch.row_of("a") is None
    batch.extend_table(again, [9])
    one = np.array([1], np.int32)
    got = batch.build(program(1, 1, 1), np.array([again], np.int32), one - 1, one, one - 1)
    assert (got.tokens[0], got.slots[0]) == (4, 9 * PAGE)
    assert got.tables[0].tolist() == [9] + [0] * (PAGES - 1)


def test_appended_tokens_are_read_back():
    batch = InputBatch(3, MAX_LEN, PAGE, PAGES)
    rows = np.array([batch.admit(name, [1, 2]) for name in "ab"], np.int32)
    batch.append(rows, np.array([2, 2], np.int32), np.array([8, 9], np.int32))
    two = np.array([2, 2], np.int32)
    got = batch.build(program(4, 3, 1), rows, two - 1, two, two[:0])
    assert got.tokens.tolist() == [2, 8, 2, 9]
