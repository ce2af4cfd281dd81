"""Parameters of sampled rows, and what they should do, in plain numpy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from distaff.kernels.sampling import SamplingRows

VOCAB = 700  # not a multiple of the block size, larger than the candidates


def make_rows(count, *, temperature=1.0, top_p=1.0, min_p=0.0, penalties=(0.0, 0.0, 1.0), top_k=0, **columns):
    floats = np.zeros((count, 7), np.float32)
    floats[:, :6] = [1 / temperature if temperature else 0, top_p, np.log(min_p) if min_p else -np.inf, *penalties]
    floats[:, 6] = columns.get("uniform", np.random.default_rng(count).random(count, np.float32))
    ints = np.zeros((count, 4), np.int32)
    ints[:, 0] = columns.get("row", np.arange(count))
    ints[:, 1], ints[:, 2], ints[:, 3] = columns.get("position", 0), top_k, columns.get("min_tokens", 0)
    return SamplingRows(jnp.asarray(floats), jnp.asarray(ints))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def reference_probabilities(x, temperature, top_p, min_p, top_k):
    x = x.astype(np.float64) / temperature
    p = softmax(x)
    p[p < min_p * p.max()] = 0
    if top_k:
        p[p < np.sort(p)[-min(top_k, len(p))]] = 0
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    above = np.cumsum(p[order]) - p[order]
    p[p < p[order[above < top_p]].min()] = 0  # equals stay together
    return p / p.sum()
