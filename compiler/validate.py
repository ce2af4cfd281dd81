"""Translation validation: at every compile the derived step is run against the plain model.

Random requests are served through scattered pages, in chunks with random borders, several requests in a step, decode
rows beside prefill; every logit is compared with the plain model's at the same token. The plain model is run on
sequences that go on with other tokens than the ones compared, so a look into the future shows up here as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.compiler.errors import ValidationError
from distaff.compiler.serve_step import ServeStep
from distaff.kernels.paged_attention import StepBatch

# By the coarsest number format that a step computes with, coarsest first. Quantised weights differ from plain ones by
# design, so these bounds only catch what is broken; how much a model loses is measured on text
# (`distaff.compiler.quality`).
TOLERANCE = {
    "int4": 1.0, "int8": 0.6, "int8_cache": 0.12, "bfloat16": 6e-2, "float16": 2e-2, "tensorfloat32": 1e-2,
    "float32": 2e-4, "float64": 1e-6,
}  # fmt: skip
_TOKENS, _ROWS = 16, 4


def float32_products() -> str:
    """The format that this platform rounds the factors of float32 products to, unless jax is told otherwise."""
    if jax.default_matmul_precision.value not in (None, "default", "fastest"):
        return "float32"
    return {"gpu": "tensorfloat32", "tpu": "bfloat16"}.get(jax.default_backend(), "float32")


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
    precision: str,
    last_only: bool,
    seed: int = 0,
) -> ValidationResult:
    """Compares on random ragged batches; raises `ValidationError` above the tolerance of ``precision``."""
    rng = np.random.default_rng(seed)
    longest = min(_TOKENS, max_model_len)
    lengths = [longest, max(1, longest // 2 + 1), max(1, longest - 3)]
    prompts = [rng.integers(0, step.vocab_size, longest).astype(np.int32) for _ in lengths]
    expected = _plain_logits(plain, params, prompts, lengths, last_only)
    shortened = [p[:n] for p, n in zip(prompts, lengths, strict=True)]
    found = serve(step, shortened, max_model_len=max_model_len, page_size=page_size, rng=rng)
    if any(not np.isfinite(f[np.isfinite(e)]).all() for f, e in zip(found, expected, strict=True)):
        raise ValidationError("the derived step gives logits that are not finite where the plain model's are")
    worst = max(float(np.max(np.abs(f - e))) for f, e in zip(found, expected, strict=True))
    scale = max(float(np.max(np.abs(e))) for e in expected)
    result = ValidationResult(worst, scale, sum(lengths))
    limit = TOLERANCE.get(precision, TOLERANCE["float32"])
    if not result.relative <= limit:
        raise ValidationError(
            f"the derived step differs from the plain model by {worst:.3g} on logits up to {scale:.3g} (limit "
            f"{limit:g} of the largest, for {precision}). This is a defect of the compiler or of a kernel: please "
            "report it with the model"
        )
    return result


def _plain_logits(
    plain: Callable[[Any, Any], Any], params: Any, prompts: list[np.ndarray], lengths: list[int], last_only: bool
) -> list[np.ndarray]:
    """The plain model's logits [length, vocab] of each prompt's first tokens."""
    function = jax.jit(plain)

    def run(tokens: np.ndarray) -> np.ndarray:
        return np.asarray(function(params, jnp.asarray(tokens[None])), np.float32)

    if last_only:
        return [
            np.stack([run(t[: i + 1]).reshape(-1) for i in range(n)]) for t, n in zip(prompts, lengths, strict=True)
        ]
    return [run(t).reshape(len(t), -1)[:n] for t, n in zip(prompts, lengths, strict=True)]


def serve(
    step: ServeStep, prompts: Sequence[np.ndarray], *, max_model_len: int, page_size: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Serves up to four prompts through the step and returns float32 logits [len(prompt), vocab] of each.

    Pages are scattered, chunk sizes and the requests of a step random, decode rows mixed with prefill.
    """
    width = -(-max_model_len // page_size)
    num_pages = 1 + sum(-(-len(p) // page_size) for p in prompts) + 3
    free = list(rng.permutation(np.arange(1, num_pages)))
    tables = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tables, prompts, strict=True):
        for i in range(-(-len(prompt) // page_size)):
            row[i] = free.pop()
    pages = [jnp.zeros((c.layers, num_pages, page_size, *c.shape), c.dtype) for c in step.caches]
    weights = [jnp.asarray(w) for w in step.weights.values()]
    function = jax.jit(step.function, donate_argnums=1)
    done = [0] * len(prompts)
    logits = [np.zeros((len(p), step.vocab_size), np.float32) for p in prompts]
    while any(d < len(p) for d, p in zip(done, prompts, strict=True)):
        chunks = _random_chunks([len(p) - d for p, d in zip(prompts, done, strict=True)], rng)
        got, pages = function(weights, pages, _batch(chunks, done, prompts, tables, page_size))
        rows = iter(np.asarray(got))
        for r, count in chunks:
            for position in range(done[r], done[r] + count):
                logits[r][position] = next(rows)
            done[r] += count
    return logits


def _random_chunks(left: list[int], rng: np.random.Generator) -> list[tuple[int, int]]:
    """Requests of a step and how many of their tokens; single tokens first, as decode rows must stand."""
    budget, chunks = _TOKENS, []
    for r in rng.permutation(len(left)):
        if left[r] and budget and rng.random() < 0.8:
            count = int(min(left[r], budget, rng.choice([1, 1, 2, 4, 7])))
            chunks.append((int(r), count))
            budget -= count
    return sorted(chunks, key=lambda chunk: chunk[1] > 1)


def _batch(
    chunks: list[tuple[int, int]], done: list[int], prompts: Sequence[np.ndarray], tables: np.ndarray, page_size: int
) -> StepBatch:
    tokens, positions, slots = (np.zeros(_TOKENS, np.int32) for _ in range(3))
    rows = np.full(_TOKENS, _ROWS - 1, np.int32)
    starts, contexts = np.zeros(_ROWS + 1, np.int32), np.zeros(_ROWS, np.int32)
    table = np.zeros((_ROWS, tables.shape[1]), np.int32)
    at = 0
    for row, (r, count) in enumerate(chunks):
        where = np.arange(done[r], done[r] + count)
        span = slice(at, at + count)
        tokens[span], positions[span], rows[span] = prompts[r][where], where, row
        slots[span] = tables[r, where // page_size] * page_size + where % page_size
        at += count
        starts[row + 1 :] = at
        contexts[row], table[row] = done[r] + count, tables[r]
    samples = np.where(np.arange(_TOKENS) < at, np.arange(_TOKENS), 0).astype(np.int32)
    decodes = np.int32(sum(count == 1 for _, count in chunks))
    arrays = (tokens, positions, slots, rows, starts, contexts, table, decodes, samples)
    return StepBatch(*(jnp.asarray(a) for a in arrays))
