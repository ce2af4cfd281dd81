"""From logits to tokens: the device functions behind `Sampler`, pure and written for whole batches.

Every row of a batch has its own parameters, so a row's token does not depend on the rows beside it. Full sorts of the
vocabulary are avoided: the truncation threshold comes from the `CANDIDATES` largest logits where these decide it, and
otherwise from an exact bisection over float bit patterns; tokens are drawn by inverting the cumulative distribution
in two levels. Order of operations as in vLLM: additive bias and masks, penalties, temperature, min-p, top-k, top-p.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

CANDIDATES = 128
INVALID_TOKEN = -1  # sampled where a row's logits are NaN or infinite, or where masks leave no token
_BLOCK = 256
_INFINITY = 0x7F800000  # the bits of float32 infinity
_LARGEST = float(np.finfo(np.float32).max)


class SamplingRows(NamedTuple):
    """Per-row parameters of one sampling call, packed by dtype so that a step uploads two arrays.

    ``floats`` float32 [S, 7]: inverse temperature (0: greedy), top_p, logarithm of min_p, presence, frequency and
    repetition penalty, a number drawn uniformly from [0, 1). ``ints`` int32 [S, 4]: row of the state, output position,
    top_k (0: off), min_tokens.
    """

    floats: jax.Array
    ints: jax.Array


class SamplerState(NamedTuple):
    """What penalties, biases and masks need to know about a request; one line per state row, M rows."""

    output_counts: jax.Array  # int32 [M, V]: times that each token was generated
    in_prompt: jax.Array  # bool [M, V]
    bias: jax.Array  # float32 [M, V]: logit_bias; -inf for what allowed_token_ids leaves out
    ends: jax.Array  # bool [M, V]: tokens that must not come before min_tokens


class TokenLogprobs(NamedTuple):
    """Log-probabilities under the model's own distribution (raw logits), for one position a row."""

    logprobs: jax.Array  # float32 [S]: of the given tokens
    ranks: jax.Array  # int32 [S]: of the given tokens, from 1
    top_logprobs: jax.Array  # float32 [S, N], descending
    top_tokens: jax.Array  # int32 [S, N]


def sample_greedy(logits: jax.Array) -> jax.Array:
    """The most likely token of each row, int32 [S]; ``logits`` float32 [S, V]."""
    # Two reductions; XLA's argmax on CPU is not vectorised and some ten times slower.
    largest = jnp.max(logits, axis=-1, keepdims=True)
    index = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    first = jnp.min(jnp.where(logits == largest, index, logits.shape[-1]), axis=-1)
    return jnp.where(_is_healthy(logits), first, INVALID_TOKEN)


def sample_random(logits: jax.Array, rows: SamplingRows) -> jax.Array:
    """Tokens drawn with temperature, min-p, top-k and top-p, int32 [S]; greedy where the temperature is 0."""
    greedy = sample_greedy(logits)
    sharpness, top_p, log_min_p = (rows.floats[:, i] for i in range(3))
    top_k, uniform = rows.ints[:, 2], rows.floats[:, 6]

    def threshold(logits: jax.Array) -> jax.Array:
        scaled = _scaled(logits, sharpness)
        return _truncation_threshold(jnp.where(scaled >= log_min_p[:, None], scaled, -jnp.inf), top_k, top_p)

    truncates = (top_k > 0) | (top_p < 1)
    # The branch scales the logits itself: handing it the scaled ones would store them in every case.
    truncated = lax.cond(truncates.any(), threshold, lambda _: jnp.full_like(top_p, -jnp.inf), logits)
    drawn = _draw(_scaled(logits, sharpness), jnp.maximum(truncated, log_min_p), uniform)
    return jnp.where((sharpness > 0) & (greedy != INVALID_TOKEN), drawn, greedy)


def sample_with_state(logits: jax.Array, rows: SamplingRows, state: SamplerState) -> tuple[jax.Array, SamplerState]:
    """As `sample_random` after bias, masks and penalties; counts the sampled tokens in the returned state.

    Rows that index past the state's end are padding and count nowhere.
    """
    row, position, min_tokens = rows.ints[:, 0], rows.ints[:, 1], rows.ints[:, 3]
    presence, frequency, repetition = (rows.floats[:, i, None] for i in range(3, 6))
    counts = state.output_counts[row]
    too_early = state.ends[row] & (position < min_tokens)[:, None]
    changed = jnp.where(too_early, -jnp.inf, logits + state.bias[row])
    seen = state.in_prompt[row] | (counts > 0)
    penalised = jnp.where(changed > 0, changed / repetition, changed * repetition)
    # An extreme penalty must not make a logit infinite; what is masked stays masked.
    changed = jnp.where(seen & (changed > -jnp.inf), jnp.clip(penalised, -_LARGEST, _LARGEST), changed)
    changed -= frequency * counts + presence * (counts > 0)
    tokens = jnp.where(_is_healthy(logits), sample_random(changed, rows), INVALID_TOKEN)
    counted = jnp.where(tokens == INVALID_TOKEN, state.output_counts.shape[0], row)
    return tokens, state._replace(output_counts=state.output_counts.at[counted, tokens].add(1, mode="drop"))


def write_row(state: SamplerState, row: jax.Array, values: SamplerState) -> SamplerState:
    """Sets one row (int32 []) of the state to ``values``, whose arrays are [V]."""
    return SamplerState(*(old.at[row].set(new) for old, new in zip(state, values, strict=True)))


def token_logprobs(logits: jax.Array, tokens: jax.Array, *, top: int) -> TokenLogprobs:
    """Log-probability and rank of ``tokens`` (int32 [S]) and of the ``top`` most likely tokens of each row."""
    logprobs = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    of_token = jnp.take_along_axis(logprobs, jnp.maximum(tokens, 0)[:, None], axis=-1)
    ranks = jnp.sum(logprobs >= of_token, axis=-1, dtype=jnp.int32)
    top_logprobs, top_tokens = lax.top_k(logprobs, top)
    return TokenLogprobs(of_token[:, 0], ranks, top_logprobs, top_tokens)


def _is_healthy(logits: jax.Array) -> jax.Array:
    """Whether a row has no NaN, no positive infinity and at least one finite logit, bool [S]."""
    # XLA's maximum on CPU drops NaN, so it alone would not notice.
    return jnp.isfinite(jnp.max(logits, axis=-1)) & ~jnp.isnan(logits).any(axis=-1)


def _scaled(logits: jax.Array, sharpness: jax.Array) -> jax.Array:
    """Logits over temperature, the largest 0: then exp() neither overflows nor loses the likely tokens."""
    return (logits - jnp.max(logits, axis=-1, keepdims=True)) * sharpness[:, None]


def _truncation_threshold(scaled: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """The smallest logit that top-k and then top-p keep, float32 [S]; equal logits are kept or dropped together.

    Top-p keeps a token if the tokens above it hold less than ``top_p`` of what top-k left.
    """
    # Never the whole vocabulary, however small: XLA on CPU would sort it, and cannot store a program that does.
    size = min(CANDIDATES, max(1, scaled.shape[-1] - 1))
    candidates = lax.top_k(scaled, size)[0]
    last = jnp.clip(top_k - 1, 0, size - 1)
    kth = jnp.where(top_k > 0, jnp.take_along_axis(candidates, last[:, None], axis=-1)[:, 0], -jnp.inf)
    mass = top_p * jnp.sum(jnp.where(scaled >= kth[:, None], jnp.exp(scaled), 0), axis=-1)
    weights = jnp.where(candidates >= kth[:, None], jnp.exp(candidates), 0)
    above = jnp.cumsum(weights, axis=-1) - weights
    kept = (above < mass[:, None]) & (weights > 0)
    nucleus = jnp.min(jnp.where(kept, candidates, jnp.inf), axis=-1)
    threshold = jnp.where(top_p < 1, jnp.maximum(nucleus, kth), kth)
    decided = jnp.where(top_k > 0, top_k <= size, (top_p >= 1) | ~kept[:, -1])
    result: jax.Array = lax.cond(decided.all(), lambda *_: threshold, _exact_threshold, scaled, top_k, top_p)
    return result


def _exact_threshold(scaled: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """`_truncation_threshold` by bisection, for rows whose border lies outside the candidates."""
    # No logit is above 0, so the bits of its absolute value, as an integer, order the tokens from likely to unlikely.
    depths = lax.bitcast_convert_type(jnp.abs(scaled), jnp.int32)
    everything = jnp.full_like(top_k, _INFINITY)
    kth = lax.cond(
        (top_k > 0).any(),
        lambda: jnp.where(top_k > 0, _first_reaching(depths, jnp.ones_like(scaled), top_k), everything),
        lambda: everything,
    )
    weights = jnp.where(depths <= kth[:, None], jnp.exp(scaled), 0)
    nucleus = jnp.where(top_p < 1, _first_reaching(depths, weights, top_p * weights.sum(axis=-1)), everything)
    return -lax.bitcast_convert_type(jnp.minimum(kth, nucleus), jnp.float32)


def _first_reaching(depths: jax.Array, weights: jax.Array, wanted: jax.Array) -> jax.Array:
    """For each row the smallest depth such that the weights of all tokens down to it add up to ``wanted``."""

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        reached = jnp.sum(jnp.where(depths <= middle[:, None], weights, 0), axis=-1) >= wanted
        return jnp.where(reached, low, middle), jnp.where(reached, middle, high)

    none = jnp.full(depths.shape[:1], -1, jnp.int32)
    reached: jax.Array = lax.fori_loop(0, 32, halve, (none, jnp.full_like(none, _INFINITY)))[1]
    return reached


def _draw(scaled: jax.Array, threshold: jax.Array, uniform: jax.Array) -> jax.Array:
    """A token of at least the threshold with its probability, int32 [S]: first a block of tokens, then one of it."""

    def weights(logits: jax.Array) -> jax.Array:
        return jnp.where(logits >= threshold[:, None, None], jnp.exp(logits), 0)

    rows, width = scaled.shape
    blocks = jnp.pad(scaled, ((0, 0), (0, -width % _BLOCK)), constant_values=-jnp.inf).reshape(rows, -1, _BLOCK)
    sums = weights(blocks).sum(axis=-1)
    below = jnp.cumsum(sums, axis=-1)
    target = uniform * below[:, -1]
    block = _first_above(sums, below, target)
    # Weighed again: XLA on CPU would compute all weights slowly if they had two uses.
    inner = weights(jnp.take_along_axis(blocks, block[:, None, None], axis=1))[:, 0]
    rest = target - jnp.take_along_axis(below - sums, block[:, None], axis=-1)[:, 0]
    return block * _BLOCK + _first_above(inner, jnp.cumsum(inner, axis=-1), rest)


def _first_above(weights: jax.Array, cumulative: jax.Array, target: jax.Array) -> jax.Array:
    """Index of the first positive weight whose cumulative sum exceeds ``target``; rounding may leave the last one."""
    index = lax.broadcasted_iota(jnp.int32, weights.shape, 1)
    last = jnp.max(jnp.where(weights > 0, index, 0), axis=-1)
    first = jnp.min(jnp.where((weights > 0) & (cumulative > target[:, None]), index, weights.shape[-1]), axis=-1)
    return jnp.minimum(first, last)
