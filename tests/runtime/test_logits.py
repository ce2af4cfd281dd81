"""Penalties, biases and masks against plain numpy that follows the documented definitions row by row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_cases import VOCAB, make_rows

from distaff.runtime import logits as device
from distaff.runtime.logits import SamplerState


def empty_state(rows):
    zeros = np.zeros((rows, VOCAB))
    return SamplerState(*(jnp.asarray(zeros, dtype) for dtype in (jnp.int32, jnp.bool_, jnp.float32, jnp.bool_)))


@pytest.mark.smoke
def test_penalties_follow_their_definition():
    rng = np.random.default_rng(7)
    x = rng.normal(size=(4, VOCAB)).astype(np.float32)
    prompt = [rng.integers(VOCAB, size=300) for _ in range(4)]
    output = [rng.integers(VOCAB, size=600) for _ in range(4)]
    presence, frequency, repetition = 0.4, 0.3, 1.7
    state = empty_state(4)
    expected = x.astype(np.float64).copy()
    for i in range(4):
        counts = np.bincount(output[i], minlength=VOCAB)
        in_prompt = np.isin(np.arange(VOCAB), prompt[i])
        line = SamplerState(jnp.asarray(counts, jnp.int32), jnp.asarray(in_prompt), state.bias[i], state.ends[i])
        state = device.write_row(state, jnp.int32(i), line)
        seen = in_prompt | (counts > 0)
        row = expected[i]
        row[seen] = np.where(row[seen] > 0, row[seen] / repetition, row[seen] * repetition)
        row -= frequency * counts + presence * (counts > 0)
    rows = make_rows(4, temperature=0.0, penalties=(presence, frequency, repetition))
    tokens, after = jax.jit(device.sample_with_state)(jnp.asarray(x), rows, state)
    assert np.asarray(tokens).tolist() == expected.argmax(axis=1).tolist()
    difference = np.asarray(after.output_counts - state.output_counts)
    assert difference.sum() == 4 and all(difference[i, tokens[i]] == 1 for i in range(4))


def test_bias_allowed_tokens_and_minimum_length():
    x = np.zeros((4, VOCAB), np.float32)
    x[:, 10] = 5
    bias = np.zeros((4, VOCAB), np.float32)
    bias[0, 20] = 100
    bias[1] = -np.inf
    bias[1, [30, 31]] = 0
    bias[1, 31] += 1
    ends = np.zeros((4, VOCAB), bool)
    ends[2:, 10] = True
    state = empty_state(4)._replace(bias=jnp.asarray(bias), ends=jnp.asarray(ends))
    rows = make_rows(4, temperature=0.0, position=np.array([0, 0, 2, 3]), min_tokens=np.array([0, 0, 3, 3]))
    tokens, _ = device.sample_with_state(jnp.asarray(x), rows, state)
    assert np.asarray(tokens).tolist() == [20, 31, 0, 10]


def test_padding_rows_count_nowhere():
    state = empty_state(2)
    rows = make_rows(4, temperature=0.0, row=np.array([1, 2, 2, 2]))
    _, after = device.sample_with_state(jnp.zeros((4, VOCAB)), rows, state)
    assert np.asarray(after.output_counts).sum(axis=1).tolist() == [0, 1]
