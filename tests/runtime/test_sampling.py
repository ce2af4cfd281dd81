"""The sampler's programs: which one runs, that warm-up makes them all, and that rows are their requests' alone."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from distaff.kernels.sampling import draw_tokens
from distaff.runtime.executables import CompileForbiddenError, ExecutableCache, compilations
from distaff.runtime.request import Request
from distaff.runtime.sampling import Method, Sampler, method_of, uniform
from distaff.runtime.sampling_params import SamplingParams

VOCAB, ROWS = 50, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("executables")


@pytest.fixture
def sampler(folder):
    return Sampler(VOCAB, ROWS, 5, ExecutableCache(folder))


def request(prompt=(1, 2), output=(), eos=(), **params):
    made = Request("r", list(prompt), SamplingParams(**params), eos_token_ids=frozenset(eos))
    for token_id in output:
        made.append(token_id)
    return made


def sample(sampler, logits, rows, positions=None):
    positions = [0] * len(rows) if positions is None else positions
    logits = jnp.asarray(logits)
    method, parameters = sampler.parameters(len(logits), np.array(rows, np.int32), np.array(positions, np.int32))
    stateful = method == Method.STATEFUL
    tokens = sampler.sample_with_state(logits, parameters) if stateful else draw_tokens(logits, parameters)
    return np.asarray(tokens)[: len(rows)].tolist()


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("method", "params"),
    [
        (Method.GREEDY, {"temperature": 0.0}),
        (Method.GREEDY, {"temperature": 0.0, "top_k": 3, "top_p": 0.5, "seed": 1}),
        (Method.RANDOM, {}),
        (Method.RANDOM, {"top_k": 3, "min_p": 0.1}),
        (Method.STATEFUL, {"temperature": 0.0, "presence_penalty": 0.1}),
        (Method.STATEFUL, {"frequency_penalty": -0.1}),
        (Method.STATEFUL, {"repetition_penalty": 1.1}),
        (Method.STATEFUL, {"logit_bias": {1: 1}}),
        (Method.STATEFUL, {"allowed_token_ids": [1]}),
        (Method.STATEFUL, {"min_tokens": 1}),
        (Method.STATEFUL, {"bad_words": ["x"]}),
    ],
)
def test_the_cheapest_method_is_chosen(method, params):
    assert method_of(SamplingParams(**params)) == method


def test_every_parameter_reaches_the_device(sampler):
    logits = np.zeros((2, VOCAB), np.float32)
    logits[:, 7], logits[:, 8] = 5, 4
    cases = [
        ({"temperature": 0.0}, {7}),
        ({"seed": 1, "top_k": 1}, {7}),
        ({"seed": 1, "top_p": 0.01}, {7}),
        ({"seed": 1, "min_p": 0.9}, {7}),
        ({"seed": 1, "temperature": 0.01}, {7}),
        ({"seed": 1, "top_k": 2}, {7, 8}),
        ({"temperature": 0.0, "presence_penalty": 2.0, "output": [7]}, {8}),
        ({"temperature": 0.0, "frequency_penalty": 0.6, "output": [7, 7]}, {8}),
        ({"temperature": 0.0, "repetition_penalty": 2.0, "prompt": [7]}, {8}),
        ({"temperature": 0.0, "logit_bias": {20: 50}}, {20}),
        ({"temperature": 0.0, "allowed_token_ids": [30, 31], "logit_bias": {31: 1}}, {31}),
        ({"temperature": 0.0, "min_tokens": 2, "eos": [7]}, {8}),
        ({"temperature": 0.0, "min_tokens": 2, "stop_token_ids": [7]}, {8}),
    ]
    for params, expected in cases:
        for row in (0, 3):
            for position in range(2):
                sampler.admit(row, request(**params), seed=row)
                assert sample(sampler, logits, [row], [position])[0] in expected, params
    many = set()
    sampler.admit(1, request(temperature=1.5), seed=3)
    for position in range(40):
        many |= set(sample(sampler, logits, [1], [position]))
    assert len(many) > 5


def test_rows_do_not_see_each_other(sampler):
    logits = np.zeros((4, VOCAB), np.float32)
    logits[:, 7], logits[:, 8] = 5, 4
    sampler.admit(0, request(temperature=0.0, presence_penalty=2.0), seed=0)
    sampler.admit(2, request(temperature=0.0), seed=0)
    assert [sample(sampler, logits, [2, 0]) for _ in range(3)] == [[7, 7], [7, 8], [7, 7]]
    # Another request in the same row starts afresh, and a resumed one goes on where it was.
    sampler.admit(0, request(temperature=0.0, presence_penalty=2.0), seed=0)
    assert sample(sampler, logits, [0]) == [7]
    sampler.admit(0, request(temperature=0.0, presence_penalty=2.0, output=[7]), seed=0)
    assert sample(sampler, logits, [0]) == [8]


@pytest.mark.smoke
def test_uniform_numbers_are_uniform_and_independent():
    seeds = np.arange(400, dtype=np.uint64)[:, None]
    draws = uniform(seeds, np.arange(500, dtype=np.int32)[None])
    assert draws.dtype == np.float32 and draws.min() >= 0 and draws.max() < 1
    counts = np.bincount((draws.ravel() * 64).astype(int), minlength=64)
    assert ((counts - draws.size / 64) ** 2 / (draws.size / 64)).sum() < 63 + 6 * np.sqrt(126)
    for one, other in [(draws[:-1], draws[1:]), (draws[:, :-1], draws[:, 1:])]:
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 6 / np.sqrt(draws.size)


def test_all_bits_of_a_seed_count(sampler):
    logits = np.zeros((1, VOCAB), np.float32)
    draws = []
    for seed in (0, 1, 1 << 32, 1 << 63, -1, 5):
        sampler.admit(0, request(), seed=seed)
        draws.append(tuple(sample(sampler, logits, [0], [position])[0] for position in range(8)))
    assert len(set(draws)) == len(draws)


def test_warm_up_leaves_nothing_to_compile(tmp_path):
    executables = ExecutableCache(tmp_path)
    executables.forbid_compiles = True
    with pytest.raises(CompileForbiddenError):
        Sampler(VOCAB, ROWS, 5, executables).logprobs(jnp.zeros((2, VOCAB)), np.zeros(2, np.int32))
    Sampler(VOCAB, ROWS, 5, executables).warm_up([1, 2], [2, 8])
    assert executables.forbid_compiles
    fresh = Sampler(VOCAB, ROWS, 5, executables)
    fresh.warm_up([1, 2], [2, 8])
    inputs = {size: jnp.zeros((size, VOCAB)) for size in (1, 2, 8)}
    before = compilations()
    fresh.admit(0, request(min_tokens=1), seed=0)
    for size in (1, 2):
        sample(fresh, inputs[size], [0])
    for size, logits in inputs.items():
        fresh.logprobs(logits, np.zeros(size, np.int32))
    assert compilations() == before
