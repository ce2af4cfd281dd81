"""Sampling in plain XLA operations for every platform, written for whole batches.

Full sorts of the vocabulary are avoided: the truncation threshold comes from the `CANDIDATES` largest logits where
these decide it, and otherwise from an exact bisection over float bit patterns; tokens are drawn by inverting the
cumulative distribution in two levels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from distaff.kernels.registry import register
from distaff.kernels.sampling.rows import INVALID_TOKEN, SamplingRows, TokenLogprobs, is_healthy

CANDIDATES = 128
_BLOCK = 256
_INFINITY = 0x7F800000  # the bits of float32 infinity


@register("sampling.greedy_tokens", "xla")
def greedy_tokens(logits: jax.Array) -> jax.Array:
    """The most likely token of each row, int32 [S]; ``logits`` float32 [S, V]."""
    # Two reductions; XLA's argmax on CPU is not vectorised and some ten times slower.
    largest = jnp.max(logits, axis=-1, keepdims=True)
    index = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    first = jnp.min(jnp.where(logits == largest, index, logits.shape[-1]), axis=-1)
    return jnp.where(is_healthy(logits), first, INVALID_TOKEN)


@register("sampling.draw_tokens", "xla")
def draw_tokens(logits: jax.Array, rows: SamplingRows) -> jax.Array:
    """Tokens drawn with temperature, min-p, top-k and top-p, int32 [S]; greedy where the temperature is 0."""
    greedy = greedy_tokens(logits)
    tokens: jax.Array = lax.cond((rows.floats[:, 0] > 0).any(), _drawn, lambda *_: greedy, logits, rows, greedy)
    return tokens


def _drawn(logits: jax.Array, rows: SamplingRows, greedy: jax.Array) -> jax.Array:
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


@register("sampling.token_logprobs", "xla")
def token_logprobs(logits: jax.Array, tokens: jax.Array, *, top: int) -> TokenLogprobs:
    """Log-probability and rank of ``tokens`` (int32 [S]) and of the ``top`` most likely tokens of each row."""
    logprobs = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    of_token = jnp.take_along_axis(logprobs, jnp.maximum(tokens, 0)[:, None], axis=-1)
    ranks = jnp.sum(logprobs >= of_token, axis=-1, dtype=jnp.int32)
    top_logprobs, top_tokens = lax.top_k(logprobs, top)
    return TokenLogprobs(of_token[:, 0], ranks, top_logprobs, top_tokens)


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
