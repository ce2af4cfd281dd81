"""A serving step written by hand: two attention layers over paged keys; and the same model in plain numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from distaff.compiler.artifact import CacheSpec, Manifest, ProgramSpec
from distaff.compiler.serve_step import ServeStep
from distaff.kernels.paged_attention import StepBatch, batch_shapes

VOCAB, WIDTH = 32, 8


def tiny_weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "embedding": rng.normal(size=(VOCAB, WIDTH)).astype(np.float32),
        "head": rng.normal(size=(WIDTH, VOCAB)).astype(np.float32),
        "bias": rng.normal(size=(3,)).astype(np.float32),
    }


def tiny_step(seed: int = 0) -> ServeStep:
    caches = (CacheSpec("key", 2, (WIDTH,), "float32"),)
    return ServeStep(tiny_weights(seed), caches, VOCAB, _step, {"attentions": 2})


def plain(weights: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Logits ``[len(tokens), VOCAB]`` of one request computed alone."""
    x = weights["embedding"][tokens] * weights["bias"].sum()
    for _ in range(2):
        scores = x @ x.T
        scores = np.where(np.tri(len(tokens), dtype=bool), scores, -np.inf)
        probabilities = np.exp(scores - scores.max(-1, keepdims=True))
        x = x + probabilities @ x / probabilities.sum(-1, keepdims=True)
    return x @ weights["head"]


def _step(weights, pages, batch: StepBatch):
    embedding, head, bias = weights
    (cache,) = pages
    layers, num_pages, page_size, width = cache.shape
    flat = cache.reshape(layers, num_pages * page_size, width)
    context = batch.tables[batch.rows][:, :, None] * page_size + jnp.arange(page_size)
    context = context.reshape(batch.tokens.size, -1)
    visible = jnp.arange(context.shape[1]) <= batch.positions[:, None]
    x = embedding[batch.tokens] * bias.sum()
    for layer in range(layers):
        flat = flat.at[layer, batch.slots].set(x)
        keys = flat[layer][context]
        scores = jnp.where(visible, jnp.einsum("td,tcd->tc", x, keys), -jnp.inf)
        x = x + jnp.einsum("tc,tcd->td", jax.nn.softmax(scores), keys)
    return x[batch.samples] @ head, [flat.reshape(cache.shape)]


def one_request(
    manifest: Manifest, program: ProgramSpec, tokens: np.ndarray, start: int, table: list[int], row: int = 0
) -> StepBatch:
    """A batch with one request in ``row`` (earlier rows are empty) that samples its last token."""
    size, page_size = len(tokens), manifest.page_size
    positions = np.arange(start, start + size)
    fields = {
        "tokens": tokens,
        "positions": positions,
        "slots": np.asarray(table)[positions // page_size] * page_size + positions % page_size,
        "rows": np.full(size, row),
        "samples": [size - 1],
    }
    batch = StepBatch(
        *(
            np.zeros(shape.shape, np.int32)
            for shape in batch_shapes(program.tokens, program.requests, program.samples, manifest.pages_per_request)
        )
    )
    for name, values in fields.items():
        getattr(batch, name)[: len(values)] = values
    batch.rows[size:] = program.requests - 1
    batch.starts[row + 1 :] = size
    batch.contexts[row] = start + size
    batch.tables[row, : len(table)] = table
    return batch
