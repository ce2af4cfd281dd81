"""Serves requests through a step by hand: random chunks, decode rows beside prefill, scattered pages."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.compiler.serve_step import ServeStep
from distaff.kernels.paged_attention import StepBatch

TOKENS = 16


def serve(
    step: ServeStep, prompts: list[np.ndarray], *, max_model_len: int, page_size: int, seed: int
) -> list[np.ndarray]:
    """Logits of every token of every prompt, as [len(prompt), vocab] each."""
    rng = np.random.default_rng(seed)
    width = -(-max_model_len // page_size)
    rows = len(prompts)
    num_pages = 1 + sum(-(-len(p) // page_size) for p in prompts) + 2
    free = list(rng.permutation(np.arange(1, num_pages)))
    tables = np.zeros((rows, width), np.int32)
    for r, prompt in enumerate(prompts):
        for i in range(-(-len(prompt) // page_size)):
            tables[r, i] = free.pop()
    pages: Any = [jnp.zeros((c.layers, num_pages, page_size, *c.shape), c.dtype) for c in step.caches]
    weights = [jnp.asarray(w) for w in step.weights.values()]
    function = jax.jit(step.function, donate_argnums=1)
    done = [0] * rows
    logits = [np.zeros((len(p), step.vocab_size), np.float32) for p in prompts]
    while any(d < len(p) for d, p in zip(done, prompts, strict=True)):
        budget, chunks = TOKENS, []
        for r in rng.permutation(rows):
            left = len(prompts[r]) - done[r]
            if left and budget and rng.random() < 0.75:
                count = int(min(left, budget, rng.choice([1, 1, 2, 5, 9])))
                chunks.append((int(r), count))
                budget -= count
        chunks.sort(key=lambda c: c[1] > 1)
        batch = _batch(chunks, done, prompts, tables, page_size)
        out, pages = function(weights, pages, batch)
        out = np.asarray(out)
        start = 0
        for r, count in chunks:
            logits[r][done[r] : done[r] + count] = out[start : start + count]
            done[r] += count
            start += count
    return logits


def _batch(chunks: list[tuple[int, int]], done: list[int], prompts: Any, tables: Any, page_size: int) -> StepBatch:
    rows = len(prompts)
    tokens, positions, slots = (np.zeros(TOKENS, np.int32) for _ in range(3))
    row_of = np.full(TOKENS, rows - 1, np.int32)
    starts, contexts = np.zeros(rows + 1, np.int32), np.zeros(rows, np.int32)
    table = np.zeros((rows, tables.shape[1]), np.int32)
    at = 0
    for row, (r, count) in enumerate(chunks):
        where = np.arange(done[r], done[r] + count)
        span = slice(at, at + count)
        tokens[span], positions[span], row_of[span] = prompts[r][where], where, row
        slots[span] = tables[r, where // page_size] * page_size + where % page_size
        at += count
        starts[row + 1 :] = at
        contexts[row] = done[r] + count
        table[row] = tables[r]
    samples = np.where(np.arange(TOKENS) < at, np.arange(TOKENS), 0).astype(np.int32)
    decodes = np.int32(sum(count == 1 for _, count in chunks))
    return StepBatch(
        *(jnp.asarray(a) for a in (tokens, positions, slots, row_of, starts, contexts, table, decodes, samples))
    )
