"""What sampling takes and gives: the parameters of a batch's rows, and log-probabilities."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

INVALID_TOKEN = -1  # sampled where a row's logits are NaN or infinite, or where masks leave no token


class SamplingRows(NamedTuple):
    """Per-row parameters of one sampling call, packed by dtype so that a step uploads two arrays.

    ``floats`` float32 [S, 7]: inverse temperature (0: greedy), top_p, logarithm of min_p, presence, frequency and
    repetition penalty, a number drawn uniformly from [0, 1). ``ints`` int32 [S, 4]: row of the state, output position,
    top_k (0: off), min_tokens.
    """

    floats: jax.Array
    ints: jax.Array


def sampling_shapes(samples: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shapes and dtypes of the parameters of ``samples`` rows, in the order of `SamplingRows`' fields."""
    return jax.ShapeDtypeStruct((samples, 7), jnp.float32), jax.ShapeDtypeStruct((samples, 4), jnp.int32)


class TokenLogprobs(NamedTuple):
    """Log-probabilities under the model's own distribution (raw logits), for one position a row."""

    logprobs: jax.Array  # float32 [S]: of the given tokens
    ranks: jax.Array  # int32 [S]: of the given tokens, from 1
    top_logprobs: jax.Array  # float32 [S, N], descending
    top_tokens: jax.Array  # int32 [S, N]


def is_healthy(logits: jax.Array) -> jax.Array:
    """Whether a row has no NaN, no positive infinity and at least one finite logit, bool [S]."""
    # XLA's maximum on CPU drops NaN, so it alone would not notice.
    return jnp.isfinite(jnp.max(logits, axis=-1)) & ~jnp.isnan(logits).any(axis=-1)
