"""From logits to tokens with what a request has said before: the device functions behind `Sampler`.

Every row of a batch has its own parameters, so a row's token does not depend on the rows beside it. Drawing itself is
an operation of `distaff.kernels.sampling`; here are penalties, biases and masks. Order of operations as in vLLM:
additive bias and masks, penalties, temperature, min-p, top-k, top-p.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distaff.kernels.sampling import INVALID_TOKEN, SamplingRows, draw_tokens, is_healthy

_LARGEST = float(np.finfo(np.float32).max)


class SamplerState(NamedTuple):
    """What penalties, biases and masks need to know about a request; one line per state row, M rows."""

    output_counts: jax.Array  # int32 [M, V]: times that each token was generated
    in_prompt: jax.Array  # bool [M, V]
    bias: jax.Array  # float32 [M, V]: logit_bias; -inf for what allowed_token_ids leaves out
    ends: jax.Array  # bool [M, V]: tokens that must not come before min_tokens


def sample_with_state(logits: jax.Array, rows: SamplingRows, state: SamplerState) -> tuple[jax.Array, SamplerState]:
    """As `draw_tokens` after bias, masks and penalties; counts the sampled tokens in the returned state.

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
    tokens = jnp.where(is_healthy(logits), draw_tokens(changed, rows), INVALID_TOKEN)
    counted = jnp.where(tokens == INVALID_TOKEN, state.output_counts.shape[0], row)
    return tokens, state._replace(output_counts=state.output_counts.at[counted, tokens].add(1, mode="drop"))


def write_row(state: SamplerState, row: jax.Array, values: SamplerState) -> SamplerState:
    """Sets one row (int32 []) of the state to ``values``, whose arrays are [V]."""
    return SamplerState(*(old.at[row].set(new) for old, new in zip(state, values, strict=True)))
