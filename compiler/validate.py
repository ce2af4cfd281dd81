"""Translation validation: at every compile the derived step is run against the plain model.

Random requests are served through scattered pages, in chunks with random borders, several requests in a step, decode
rows beside prefill; every logit is compared with the plain model's at the same token. The plain model is run on
sequences that go on with other tokens than the ones compared, so a look into the future shows up here as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.compiler.errors import ValidationError
from distaff.compiler.serve_step import ServeStep
from distaff.kernels.paged_attention import StepBatch

TOLERANCE = {"float32": 2e-4, "float64": 1e-6, "float16": 2e-2, "bfloat16": 6e-2}
_TOKENS, _ROWS = 16, 4


@dataclasses.dataclass(frozen=True)
class ValidationResult:
    """Largest difference, the scale (largest plain logit) that it is relative to, and how many rows were compared."""

    max_error: float
    scale: float
    rows: int

    @property
    def relative(self) -> float:
        """Largest difference divided by the largest plain logit."""
        return self.max_error / max(self.scale, 1e-6)


def validate(
    step: ServeStep,
    plain: Callable[[Any, Any], Any],
    params: Any,
    *,
    max_model_len: int,
    page_size: int,
    dtype: str,
    last_only: bool,
    seed: int = 0,
) -> ValidationResult:
    """Compares on random ragged batches; raises `ValidationError` above the tolerance of ``dtype``."""
    rng = np.random.default_rng(seed)
    longest = min(_TOKENS, max_model_len)
    lengths = [longest, max(1, longest // 2 + 1), max(1, longest - 3)]
    prompts = [rng.integers(0, step.vocab_size, longest).astype(np.int32) for _ in lengths]
    expected = _plain_logits(plain, params, prompts, lengths, last_only)
    driver = _Driver(step, max_model_len, page_size, rng)
    worst, scale, rows = 0.0, 0.0, 0
    for request, position, got in driver.serve(prompts, lengths):
        want = expected(request, position)
        if not np.isfinite(got).all() and np.isfinite(want).all():
            raise ValidationError(f"the derived step gives logits that are not finite at position {position}")
        worst = max(worst, float(np.max(np.abs(got - want))))
        scale = max(scale, float(np.max(np.abs(want))))
        rows += 1
    result = ValidationResult(worst, scale, rows)
    limit = TOLERANCE.get(dtype, TOLERANCE["float32"])
    if not result.relative <= limit:
        raise ValidationError(
            f"the derived step differs from the plain model by {worst:.3g} on logits up to {scale:.3g} (limit "
            f"{limit:g} of the largest, for {dtype}). This is a defect of the compiler or of a kernel: please "
            "report it with the model"
        )
    return result


def _plain_logits(
    plain: Callable[[Any, Any], Any], params: Any, prompts: list[np.ndarray], lengths: list[int], last_only: bool
) -> Callable[[int, int], np.ndarray]:
    function = jax.jit(plain)
    if last_only:
        return lambda r, p: np.asarray(function(params, jnp.asarray(prompts[r][None, : p + 1])), np.float32).reshape(-1)
    full = [np.asarray(function(params, jnp.asarray(t[None])), np.float32).reshape(len(t), -1) for t in prompts]
    return lambda r, p: full[r][p]


class _Driver:
    """Serves whole requests through the step and yields the logits of each token."""

    def __init__(self, step: ServeStep, max_model_len: int, page_size: int, rng: np.random.Generator) -> None:
        self.step, self.page_size, self.rng = step, page_size, rng
        self.width = -(-max_model_len // page_size)
        self.num_pages = 1 + _ROWS * min(self.width, -(-_TOKENS // page_size)) + 3
        self.pages = [jnp.zeros((c.layers, self.num_pages, page_size, *c.shape), c.dtype) for c in step.caches]
        self.weights = [jnp.asarray(w) for w in step.weights.values()]
        self.function = jax.jit(step.function, donate_argnums=1)

    def serve(self, prompts: list[np.ndarray], lengths: list[int]) -> Iterator[tuple[int, int, np.ndarray]]:
        free = list(self.rng.permutation(np.arange(1, self.num_pages)))
        tables = np.zeros((len(prompts), self.width), np.int32)
        for r, length in enumerate(lengths):
            for i in range(-(-length // self.page_size)):
                tables[r, i] = free.pop()
        done = [0] * len(prompts)
        while any(d < n for d, n in zip(done, lengths, strict=True)):
            plan = self.plan(done, lengths)
            batch, order = self.batch(plan, done, prompts, tables)
            logits, self.pages = self.function(self.weights, self.pages, batch)
            for (r, position), row in zip(order, np.asarray(logits), strict=False):
                yield r, position, row
            for r, count in plan:
                done[r] += count

    def plan(self, done: list[int], lengths: list[int]) -> list[tuple[int, int]]:
        """Requests of this step with random chunk sizes; single tokens first, as decode rows must stand."""
        budget = _TOKENS
        plan = []
        for r in self.rng.permutation(len(done)):
            left = lengths[r] - done[r]
            if left and budget and self.rng.random() < 0.8:
                count = int(self.rng.integers(1, min(left, budget, 7) + 1))
                plan.append((int(r), count))
                budget -= count
        return sorted(plan, key=lambda rc: rc[1] > 1)

    def batch(
        self, plan: list[tuple[int, int]], done: list[int], prompts: list[np.ndarray], tables: np.ndarray
    ) -> tuple[StepBatch, list[tuple[int, int]]]:
        tokens, positions, slots = (np.zeros(_TOKENS, np.int32) for _ in range(3))
        rows = np.full(_TOKENS, _ROWS - 1, np.int32)
        starts = np.zeros(_ROWS + 1, np.int32)
        contexts = np.zeros(_ROWS, np.int32)
        table = np.zeros((_ROWS, self.width), np.int32)
        order: list[tuple[int, int]] = []
        for row, (r, count) in enumerate(plan):
            for p in range(done[r], done[r] + count):
                i = len(order)
                tokens[i], positions[i], rows[i] = prompts[r][p], p, row
                slots[i] = tables[r, p // self.page_size] * self.page_size + p % self.page_size
                order.append((r, p))
            starts[row + 1 :] = len(order)
            contexts[row] = done[r] + count
            table[row] = tables[r]
        samples = np.zeros(_TOKENS, np.int32)
        samples[: len(order)] = np.arange(len(order))
        decodes = np.int32(sum(count == 1 for _, count in plan))
        arrays = (tokens, positions, slots, rows, starts, contexts, table, decodes, samples)
        return StepBatch(*(jnp.asarray(a) for a in arrays)), order
