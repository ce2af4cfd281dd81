"""Random calls of paged attention, and attention over the pages written out in float64 numpy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from distaff.kernels.paged_attention import AttentionSpec, StepBatch

LAYERS, LAYER = 2, 1


def ragged_batch(
    rng: np.random.Generator, tokens: int, requests: int, width: int, page: int, *, one_each: bool = False
) -> tuple[StepBatch, int]:
    """A random step over scattered pages, as numpy arrays, and the size of the pool that it needs."""
    live = int(rng.integers(0, requests + 1))
    decodes = int(rng.integers(0, live + 1))
    lengths = np.ones(live, int)
    if one_each:
        decodes = live
    elif live > decodes:
        lengths[decodes:] += rng.multinomial(
            rng.integers(0, tokens - live + 1), np.ones(live - decodes) / (live - decodes)
        )
    lengths = np.minimum(lengths, width * page)
    contexts = np.zeros(requests, np.int32)
    contexts[:live] = [rng.integers(n, width * page + 1) for n in lengths]
    starts = np.zeros(requests + 1, np.int32)
    starts[1 : live + 1] = np.cumsum(lengths)
    starts[live + 1 :] = lengths.sum()
    num_pages = 1 + requests * width
    scattered = rng.permutation(np.arange(1, num_pages)).reshape(requests, width)
    tables = np.where(np.arange(width) * page < contexts[:, None], scattered, 0).astype(np.int32)
    rows = np.full(tokens, requests - 1, np.int32)
    positions, slots = np.zeros(tokens, np.int32), np.zeros(tokens, np.int32)
    for row, length in enumerate(lengths):
        span = slice(starts[row], starts[row + 1])
        rows[span] = row
        positions[span] = np.arange(contexts[row] - length, contexts[row])
        slots[span] = tables[row, positions[span] // page] * page + positions[span] % page
    zeros = np.zeros(tokens, np.int32)
    batch = StepBatch(zeros, positions, slots, rows, starts, contexts, tables, np.int32(decodes), zeros[:1])
    return batch, num_pages


class Inputs(NamedTuple):
    """The arrays of a call: rows [T, heads, size] of this step and pools with random rows everywhere."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    k_pages: np.ndarray
    v_pages: np.ndarray


def turned(spec: AttentionSpec, rows: np.ndarray, positions: np.ndarray, rotary) -> np.ndarray:
    """Rows after the rotary embedding, value by value, in float64."""
    rows = rows.astype(np.float64)
    if spec.rotary is None:
        return rows
    size, (cos, sin) = spec.rotary.size, rotary
    index = np.arange(size)
    partner = (index + size // 2) % size if spec.rotary.kind == "half" else index ^ 1
    result = rows.copy()
    result[..., :size] = rows[..., :size] * cos[positions, None] + rows[..., partner] * sin[positions, None]
    return result


def written(pages: np.ndarray, rows: np.ndarray, batch: StepBatch) -> np.ndarray:
    """The pool with the live tokens' rows in their slots."""
    pages, live = pages.copy(), batch.starts[-1]
    page = pages.shape[2]
    pages[LAYER, batch.slots[:live] // page, batch.slots[:live] % page] = rows[:live]
    return pages


def dense(spec: AttentionSpec, inputs: Inputs, batch: StepBatch, sinks=None, rotary=None) -> np.ndarray:
    """The live tokens' outputs ``[batch.starts[-1], H, Dv]``, one softmax at a time."""
    outputs = []
    q = turned(spec, inputs.q, batch.positions, rotary)
    k_pages = written(inputs.k_pages, turned(spec, inputs.k, batch.positions, rotary), batch)
    v_pages = written(inputs.v_pages, inputs.v, batch)
    for token in range(batch.starts[-1]):
        row, i = batch.rows[token], batch.positions[token]
        keys, values = (
            pages[LAYER, batch.tables[row]].reshape(-1, *pages.shape[3:])[: batch.contexts[row]].astype(np.float64)
            for pages in (k_pages, v_pages)
        )
        j = np.arange(len(keys))
        seen = np.ones(len(keys), bool)
        if spec.causal:
            seen &= j <= i
        if spec.window:
            seen &= j > i - spec.window
        if spec.mask:
            seen &= np.asarray(spec.mask(np.int32(i), j))
        for head in range(q.shape[1]):
            kv = head * keys.shape[1] // q.shape[1]
            scores = keys[:, kv] @ q[token, head] * spec.scale
            if spec.softcap:
                scores = np.tanh(scores / spec.softcap) * spec.softcap
            if spec.slopes:
                scores = scores - spec.slopes[head] * (i - j)
            weights = np.exp(scores) * seen
            total = weights.sum() + (0 if sinks is None else np.exp(float(sinks[head])))
            outputs.append(weights @ values[:, kv] / (total or 1))
    return np.reshape(outputs, (-1, q.shape[1], v_pages.shape[4]))


def random_inputs(
    rng: np.random.Generator, heads: tuple[int, int], sizes: tuple[int, int], tokens: int, pool: tuple[int, int]
) -> Inputs:
    """A call for query and key-value heads of key and value sizes, on pools of (pages, page size)."""
    heads, kv_heads = heads
    q = rng.normal(size=(tokens, heads, sizes[0]))
    k, v = (rng.normal(size=(tokens, kv_heads, n)) for n in sizes)
    pools = (rng.normal(size=(LAYERS, *pool, kv_heads, n)) for n in sizes)
    return Inputs(*(array.astype(np.float32) for array in (q, k, v, *pools)))


def check_result(result, spec: AttentionSpec, inputs: Inputs, batch: StepBatch, sinks=None, rotary=None, *, atol=2e-5):
    """Holds outputs to `dense`, and pools to rows in their slots and nothing else changed but the null page."""
    output, k_pages, v_pages = (np.asarray(array) for array in result)
    assert np.isfinite(output).all()
    wanted = dense(spec, inputs, batch, sinks, rotary)
    np.testing.assert_allclose(output[: len(wanted)].astype(np.float64), wanted, atol=atol)
    k = turned(spec, inputs.k, batch.positions, rotary)
    for pool, rows, got in ((inputs.k_pages, k, k_pages), (inputs.v_pages, inputs.v, v_pages)):
        assert got.dtype == pool.dtype
        np.testing.assert_allclose(got[:, 1:], written(pool, rows, batch)[:, 1:], rtol=1e-6, atol=1e-6)


def quantised(values: np.ndarray) -> np.ndarray:
    """An int8 pool of these values: steps of the largest of the last axis / 127, then the step's four bytes."""
    step = np.abs(values).max(-1, keepdims=True).astype(np.float32) / np.float32(127)
    steps = np.rint(values / np.where(step > 0, step, 1)).astype(np.int8)
    return np.concatenate([steps, step.view(np.int8)], -1)


def dequantised(pool: np.ndarray) -> np.ndarray:
    """What an int8 pool stands for."""
    return pool[..., :-4] * np.ascontiguousarray(pool[..., -4:]).view(np.float32)
