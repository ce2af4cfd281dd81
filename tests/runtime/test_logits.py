"""The device's sampling functions against plain numpy that follows the documented definitions row by row."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff.runtime import logits as device
from distaff.runtime.logits import INVALID_TOKEN, SamplerState, SamplingRows

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
        p[p < np.sort(p)[-top_k]] = 0
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    above = np.cumsum(p[order]) - p[order]
    p[order[above >= top_p]] = 0
    return p / p.sum()


@pytest.mark.smoke
def test_greedy_takes_the_first_of_the_largest_and_marks_bad_rows():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, VOCAB)).astype(np.float32)
    x[1, [7, 400]] = 50
    x[2, 3] = np.nan
    x[3, :] = -np.inf
    x[4, 9] = np.inf
    tokens = np.asarray(device.sample_greedy(jnp.asarray(x)))
    assert tokens.tolist() == [x[0].argmax(), 7, INVALID_TOKEN, INVALID_TOKEN, INVALID_TOKEN, x[5].argmax()]


@pytest.mark.parametrize(
    ("temperature", "top_p", "min_p", "top_k", "spread"),
    [
        (1.0, 1.0, 0.0, 0, 2.0),
        (0.7, 0.9, 0.0, 0, 3.0),
        (1.0, 0.5, 0.0, 0, 0.1),  # a nucleus of hundreds: bisection
        (1.3, 1.0, 0.05, 0, 2.0),
        (1.0, 1.0, 0.0, 5, 2.0),
        (1.0, 0.8, 0.0, 12, 2.0),
        (2.0, 0.95, 0.01, 300, 1.0),  # more than the candidates: bisection
        (0.1, 0.01, 0.0, 0, 1.0),
    ],
)
def test_support_is_what_the_parameters_keep(temperature, top_p, min_p, top_k, spread):
    draws = 2000
    rng = np.random.default_rng(42)
    x = (rng.normal(size=VOCAB) * spread).astype(np.float32)
    expected = reference_probabilities(x, temperature, top_p, min_p, top_k)
    rows = make_rows(draws, temperature=temperature, top_p=top_p, min_p=min_p, top_k=top_k)
    tokens = np.asarray(jax.jit(device.sample_random)(jnp.broadcast_to(x, (draws, VOCAB)), rows))
    counts = np.bincount(tokens, minlength=VOCAB)
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(expected))
    # Pearson's statistic over cells of at least 5 expected draws, against its mean plus six standard deviations.
    likely = expected * draws >= 5
    cells = np.append(counts[likely], counts[~likely].sum())
    mean = np.append(expected[likely], expected[~likely].sum()) * draws
    kept = mean > 0
    statistic = ((cells[kept] - mean[kept]) ** 2 / mean[kept]).sum()
    freedom = max(kept.sum() - 1, 1)
    assert statistic < freedom + 6 * np.sqrt(2 * freedom)


def test_candidates_and_bisection_agree():
    rng = np.random.default_rng(3)
    x = (rng.normal(size=(60, VOCAB)) * rng.uniform(0.5, 5, size=(60, 1))).astype(np.float32)
    x -= x.max(axis=1, keepdims=True)
    x[rng.random(x.shape) < 0.1] = -np.inf
    x[np.arange(60), rng.integers(VOCAB, size=60)] = 0
    x[:10] = np.round(x[:10])  # many ties
    top_k = rng.choice([0, 1, 3, 50, 128], size=60).astype(np.int32)
    top_p = rng.choice([1.0, 0.3, 0.9], size=60).astype(np.float32)
    arguments = jnp.asarray(x), jnp.asarray(top_k), jnp.asarray(top_p)
    quick = np.asarray(jax.jit(device._truncation_threshold)(*arguments))
    exact = np.asarray(jax.jit(device._exact_threshold)(*arguments))
    np.testing.assert_array_equal(x >= quick[:, None], x >= exact[:, None])


def test_a_draw_does_not_depend_on_other_rows():
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.normal(size=(8, VOCAB)).astype(np.float32))
    uniform = rng.random(8, np.float32)
    sample = jax.jit(device.sample_random)
    together = np.asarray(sample(x, make_rows(8, uniform=uniform, top_p=0.9)))
    alone = [int(sample(x[i : i + 1], make_rows(1, uniform=uniform[i], top_p=0.9))[0]) for i in range(8)]
    assert together.tolist() == alone


def test_one_bad_row_leaves_the_others_alone():
    rng = np.random.default_rng(6)
    x = rng.normal(size=(3, VOCAB)).astype(np.float32)
    rows = make_rows(3, top_p=0.9, top_k=20)
    good = np.asarray(device.sample_random(jnp.asarray(x), rows))
    x[1, 5] = np.nan
    bad = np.asarray(device.sample_random(jnp.asarray(x), rows))
    assert bad.tolist() == [good[0], INVALID_TOKEN, good[2]]


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


@pytest.mark.smoke
def test_logprobs_are_raw_and_ranked():
    rng = np.random.default_rng(8)
    x = rng.normal(size=(5, VOCAB)).astype(np.float32) * 4
    tokens = rng.integers(VOCAB, size=5).astype(np.int32)
    got = device.token_logprobs(jnp.asarray(x), jnp.asarray(tokens), top=6)
    for i, token in enumerate(tokens):
        expected = np.log(softmax(x[i].astype(np.float64)))
        order = np.argsort(-expected, kind="stable")
        np.testing.assert_allclose(got.logprobs[i], expected[token], atol=1e-5)
        assert int(got.ranks[i]) == int(np.flatnonzero(order == token)[0]) + 1
        assert np.asarray(got.top_tokens[i]).tolist() == order[:6].tolist()
        np.testing.assert_allclose(got.top_logprobs[i], expected[order[:6]], atol=1e-5)


def test_drawing_never_takes_what_is_left_out():
    rng = np.random.default_rng(9)
    scaled = np.full((64, VOCAB), -np.inf, np.float32)
    for row, index in zip(scaled, itertools.cycle([0, 255, 256, VOCAB - 1])):
        row[index], row[rng.integers(VOCAB)] = rng.uniform(-69, -1), 0
    for threshold in (-np.inf, -40.0):
        for u in (0.0, 0.5, float(np.nextafter(np.float32(1), np.float32(0)))):
            at, u = jnp.full(64, threshold, jnp.float32), jnp.full(64, u, jnp.float32)
            drawn = np.asarray(device._draw(jnp.asarray(scaled), at, u))
            taken = scaled[np.arange(64), drawn]
            assert (taken > -np.inf).all() and (taken >= threshold).all()
