"""Sampling on every implementation against plain numpy that follows the documented definitions row by row."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_cases import VOCAB, make_rows, reference_probabilities, softmax

from distaff.kernels import native
from distaff.kernels.registry import choose, explain
from distaff.kernels.sampling import INVALID_TOKEN, cpu, draw_tokens, greedy_tokens, serving, token_logprobs, xla

usable = native.available() and jax.default_backend() == "cpu"
built = pytest.mark.skipif(not usable, reason="the native kernels are not built, or JAX does not run on the CPU")
implementations = pytest.mark.parametrize("kernels", [xla, pytest.param(cpu, marks=built)])


@implementations
@pytest.mark.smoke
def test_greedy_takes_the_first_of_the_largest_and_marks_bad_rows(kernels):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, VOCAB)).astype(np.float32)
    x[1, [7, 400]] = 50
    x[2, 3] = np.nan
    x[3, :] = -np.inf
    x[4, 9] = np.inf
    tokens = np.asarray(kernels.greedy_tokens(jnp.asarray(x)))
    assert tokens.tolist() == [x[0].argmax(), 7, INVALID_TOKEN, INVALID_TOKEN, INVALID_TOKEN, x[5].argmax()]


@implementations
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
def test_support_is_what_the_parameters_keep(kernels, temperature, top_p, min_p, top_k, spread):
    draws = 2000
    rng = np.random.default_rng(42)
    x = (rng.normal(size=VOCAB) * spread).astype(np.float32)
    expected = reference_probabilities(x, temperature, top_p, min_p, top_k)
    rows = make_rows(draws, temperature=temperature, top_p=top_p, min_p=min_p, top_k=top_k)
    tokens = np.asarray(jax.jit(kernels.draw_tokens)(jnp.broadcast_to(x, (draws, VOCAB)), rows))
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


@implementations
def test_a_draw_does_not_depend_on_other_rows(kernels):
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.normal(size=(8, VOCAB)).astype(np.float32))
    uniform = rng.random(8, np.float32)
    sample = jax.jit(kernels.draw_tokens)
    together = np.asarray(sample(x, make_rows(8, uniform=uniform, top_p=0.9)))
    alone = [int(sample(x[i : i + 1], make_rows(1, uniform=uniform[i], top_p=0.9))[0]) for i in range(8)]
    assert together.tolist() == alone


@implementations
def test_one_bad_row_leaves_the_others_alone(kernels):
    rng = np.random.default_rng(6)
    x = rng.normal(size=(3, VOCAB)).astype(np.float32)
    rows = make_rows(3, top_p=0.9, top_k=20)
    good = np.asarray(kernels.draw_tokens(jnp.asarray(x), rows))
    x[1, 5] = np.nan
    bad = np.asarray(kernels.draw_tokens(jnp.asarray(x), rows))
    assert bad.tolist() == [good[0], INVALID_TOKEN, good[2]]


@implementations
@pytest.mark.smoke
def test_logprobs_are_raw_and_ranked(kernels):
    rng = np.random.default_rng(8)
    x = rng.normal(size=(5, VOCAB)).astype(np.float32) * 4
    tokens = rng.integers(VOCAB, size=5).astype(np.int32)
    got = kernels.token_logprobs(jnp.asarray(x), jnp.asarray(tokens), top=6)
    for i, token in enumerate(tokens):
        expected = np.log(softmax(x[i].astype(np.float64)))
        order = np.argsort(-expected, kind="stable")
        np.testing.assert_allclose(got.logprobs[i], expected[token], atol=1e-5)
        assert int(got.ranks[i]) == int(np.flatnonzero(order == token)[0]) + 1
        assert np.asarray(got.top_tokens[i]).tolist() == order[:6].tolist()
        np.testing.assert_allclose(got.top_logprobs[i], expected[order[:6]], atol=1e-5)


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
    quick = np.asarray(jax.jit(xla._truncation_threshold)(*arguments))
    exact = np.asarray(jax.jit(xla._exact_threshold)(*arguments))
    np.testing.assert_array_equal(x >= quick[:, None], x >= exact[:, None])


def test_drawing_never_takes_what_is_left_out():
    rng = np.random.default_rng(9)
    scaled = np.full((64, VOCAB), -np.inf, np.float32)
    for row, index in zip(scaled, itertools.cycle([0, 255, 256, VOCAB - 1])):
        row[index], row[rng.integers(VOCAB)] = rng.uniform(-69, -1), 0
    for threshold in (-np.inf, -40.0):
        for u in (0.0, 0.5, float(np.nextafter(np.float32(1), np.float32(0)))):
            at, u = jnp.full(64, threshold, jnp.float32), jnp.full(64, u, jnp.float32)
            drawn = np.asarray(xla._draw(jnp.asarray(scaled), at, u))
            taken = scaled[np.arange(64), drawn]
            assert (taken > -np.inf).all() and (taken >= threshold).all()


def check_draws(seed: int, vocab: int = VOCAB, rows: int = 12) -> None:
    """Each drawn token is the one whose interval of the cumulative distribution holds the row's number."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(rows, vocab)) * rng.uniform(0.05, 5, size=(rows, 1))).astype(np.float32)
    x[:, 1:][rng.random((rows, vocab - 1)) < 0.1] = -np.inf
    x[: rows // 3] = np.round(x[: rows // 3])  # many ties
    parameters = [
        {
            "temperature": rng.choice([0.3, 1.0, 1.5]),
            "top_p": rng.choice([1.0, 0.2, 0.9, 0.999]),
            "min_p": rng.choice([0.0, 0.0, 0.02]),
            "top_k": int(rng.choice([0, 0, 1, 7, vocab // 2, vocab])),
        }
        for _ in range(rows)
    ]
    uniform = rng.random(rows, np.float32)
    packed = [make_rows(1, uniform=u, **p) for u, p in zip(uniform, parameters, strict=True)]
    together = type(packed[0])(*(np.concatenate(parts) for parts in zip(*packed, strict=True)))
    tokens = np.asarray(cpu.draw_tokens(jnp.asarray(x), together))
    for logits, token, u, p in zip(x, tokens, uniform, parameters, strict=True):
        p = {**p, "top_p": float(np.float32(p["top_p"]))}
        # Where rounding may move the border of the nucleus, either side of it is right.
        nearby = [reference_probabilities(logits, **{**p, "top_p": p["top_p"] * (1 + e)}) for e in (-1e-5, 1e-5)]
        intervals = [(np.cumsum(q)[token] - q[token] - 1e-5, np.cumsum(q)[token] + 1e-5, q[token]) for q in nearby]
        assert any(low <= u <= high and mass > 0 for low, high, mass in intervals), (token, u, p, intervals)


@built
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), vocab=st.sampled_from([1, 15, 16, 257, 700, 3000]))
def test_draws_invert_the_cumulative_distribution(seed, vocab):
    check_draws(seed, vocab)


@built
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_native_tokens_are_those_of_xla(seed):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(16, VOCAB)).astype(np.float32) * 3)
    rows = make_rows(16, temperature=0.8, uniform=rng.random(16, np.float32), min_p=0.001)
    rows = rows._replace(
        floats=rows.floats.at[:, 1].set(rng.choice([1.0, 0.9, 0.5], size=16)),
        ints=rows.ints.at[:, 2].set(rng.choice([0, 5, 200], size=16)),
    )
    same = np.asarray(xla_draw(x, rows)) == np.asarray(cpu.draw_tokens(x, rows))
    # A number that falls within rounding of a border is rare.
    assert same.sum() >= 15
    np.testing.assert_array_equal(xla.greedy_tokens(x), cpu.greedy_tokens(x))


xla_draw = jax.jit(xla.draw_tokens)


@built
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), vocab=st.sampled_from([5, 64, 700, 5000]), top=st.sampled_from([0, 1, 5]))
def test_native_logprobs_are_those_of_xla(seed, vocab, top):
    check_logprobs(seed, vocab, top)


def check_logprobs(seed: int, vocab: int = VOCAB, top: int = 6) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(7, vocab)) * 3).astype(np.float32)
    x[:3] = np.round(x[:3])
    x[3, 1:] = -np.inf
    tokens = rng.integers(vocab, size=7).astype(np.int32)
    tokens[4] = INVALID_TOKEN
    got, wanted = (f(jnp.asarray(x), jnp.asarray(tokens), top=top) for f in (cpu.token_logprobs, xla.token_logprobs))
    np.testing.assert_allclose(got.logprobs, wanted.logprobs, atol=2e-6, rtol=2e-6)
    np.testing.assert_array_equal(got.ranks, wanted.ranks)
    np.testing.assert_array_equal(got.top_tokens, wanted.top_tokens)
    np.testing.assert_allclose(got.top_logprobs, wanted.top_logprobs, atol=2e-6, rtol=2e-6)


def check_greedy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for vocab in (1, 3, 16, 255, 4097):
        x = np.round(rng.normal(size=(9, vocab)) * 2).astype(np.float32)
        x[3, rng.integers(vocab)] = np.nan
        x[4, rng.integers(vocab)] = np.inf
        x[5] = -np.inf
        wanted = [INVALID_TOKEN if i in (3, 4, 5) else row.argmax() for i, row in enumerate(x)]
        assert np.asarray(cpu.greedy_tokens(jnp.asarray(x))).tolist() == wanted


LEVEL_SCRIPT = """
import sys
sys.path[:0] = sys.argv[2:]
import test_sampling as tests
assert tests.native.features()[-1] == sys.argv[1], tests.native.features()
for seed in range(3):
    tests.check_greedy(seed)
    tests.check_draws(seed)
    tests.check_logprobs(seed)
"""


@pytest.mark.parametrize("level", native.features())
def test_every_level_of_the_processor(level):
    here = os.path.dirname(__file__)
    command = [sys.executable, "-c", LEVEL_SCRIPT, level, here, os.path.dirname(here)]
    done = subprocess.run(command, env={**os.environ, "DISTAFF_CPU_LEVEL": level}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@built
def test_unsound_rows_have_no_logprobs():
    x = np.zeros((2, VOCAB), np.float32)
    x[1, 9] = np.nan
    got = cpu.token_logprobs(jnp.asarray(x), jnp.array([3, 4]), top=2)
    assert np.isfinite(got.logprobs[0]) and np.isnan(got.logprobs[1]) and np.isnan(got.top_logprobs[1]).all()


@built
def test_what_is_served_natively():
    assert set(serving("cpu").values()) == {"native"} and set(serving("cuda").values()) == {"xla"}
    first, *_ = explain("sampling.draw_tokens", "cpu", {"dtype": "bfloat16"})
    assert first.reason == "takes float32 logits, not bfloat16"
    assert choose("sampling.draw_tokens", "cpu", {"dtype": "bfloat16"}).name == "xla"
    x = jnp.zeros((2, 9))
    assert greedy_tokens(x).tolist() == [0, 0] and draw_tokens(x, make_rows(2, temperature=0.0)).tolist() == [0, 0]
    assert token_logprobs(x, jnp.array([1, 2]), top=1).ranks.tolist() == [9, 9]
