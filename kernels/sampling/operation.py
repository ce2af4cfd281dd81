"""The three operations of sampling, each handed to the implementation that serves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import jax

from distaff.kernels.registry import Attributes, choose, usual_calls
from distaff.kernels.sampling.rows import SamplingRows, TokenLogprobs

OPERATIONS = ("greedy_tokens", "draw_tokens", "token_logprobs")


def greedy_tokens(logits: jax.Array, *, platform: str | None = None) -> jax.Array:
    """The most likely token of each row, int32 [S], the first of equals; ``logits`` float32 [S, V].

    `INVALID_TOKEN` where a row has a NaN, plus infinity or nothing finite. ``platform`` is where the program will run
    (default: where jax runs now), here and below.
    """
    function = choose("sampling.greedy_tokens", platform or jax.default_backend(), _attributes(logits)).function
    return cast(jax.Array, function(logits))


def draw_tokens(logits: jax.Array, rows: SamplingRows, *, platform: str | None = None) -> jax.Array:
    """Tokens drawn with temperature, min-p, top-k and top-p, int32 [S]; as `greedy_tokens` where the temperature is 0.

    In that order; each bound keeps or drops equal logits together. The token is the one at which the cumulative
    distribution, in order of index, exceeds the row's uniform number.
    """
    function = choose("sampling.draw_tokens", platform or jax.default_backend(), _attributes(logits)).function
    return cast(jax.Array, function(logits, rows))


def token_logprobs(logits: jax.Array, tokens: jax.Array, *, top: int, platform: str | None = None) -> TokenLogprobs:
    """Log-probability and rank of ``tokens`` (int32 [S]) and of the ``top`` most likely tokens of each row."""
    function = choose("sampling.token_logprobs", platform or jax.default_backend(), _attributes(logits)).function
    return cast(TokenLogprobs, function(logits, tokens, top=top))


def serving(platform: str | None = None) -> dict[str, str]:
    """The name of the implementation that serves each operation for float32 logits."""
    attributes = {"dtype": "float32"}
    return {o: choose(f"sampling.{o}", platform or jax.default_backend(), attributes).name for o in OPERATIONS}


@usual_calls("sampling.greedy_tokens")
@usual_calls("sampling.draw_tokens")
@usual_calls("sampling.token_logprobs")
def _calls() -> Mapping[str, Attributes]:
    return {"float32 logits": {"dtype": "float32"}}


def _attributes(logits: jax.Array) -> Attributes:
    return {"dtype": str(logits.dtype)}
