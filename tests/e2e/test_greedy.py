"""Greedy text of the real checkpoint is that of transformers: alone, batched, preempted, with and without caching."""

import random

import numpy as np
import pytest
from tally import Tally

from distaff.runtime import Engine, EngineConfig, SamplingParams

QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "List three prime numbers.",
    "Explain gravity to a child.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Hamlet?",
    "What is 12 times 12?",
    "Name a mammal that can fly.",
    "How do plants make food?",
    "Tell me a joke.",
    "What is a neural network?",
    "Give me a recipe for pancakes.",
    "Why is the sky blue?",
    "What is the largest planet?",
    "Describe the taste of a lemon.",
    "Write a Python function that adds two numbers.",
    "What year did World War II end?",
    "Summarise the plot of Cinderella.",
    "What is photosynthesis?",
    "Suggest a name for a cat.",
]
LENGTH = 64
# Two prompts of 20 and their outputs fit, 20 of them do not: running requests must be preempted and recomputed.
SMALL_POOL = 48


@pytest.fixture(scope="module")
def prompts(smollm2_artifact):
    engine = Engine(smollm2_artifact, EngineConfig(num_pages=8, warm_up=False))
    texts = [engine.tokenizer.apply_chat_template([{"role": "user", "content": q}]) for q in QUESTIONS]
    return [engine.tokenizer.encode(t, add_special_tokens=False) for t in texts]


@pytest.fixture(scope="module")
def expected(prompts, reference, smollm2_artifact):
    """Greedy tokens of the engine, one request at a time, each step of which transformers confirms."""
    engine = Engine(smollm2_artifact, EngineConfig(num_pages=64))
    outputs = [run(engine, {i: p})[i] for i, p in enumerate(prompts)]
    for prompt, output in zip(prompts, outputs, strict=True):
        logits = reference([*prompt, *output])[len(prompt) - 1 : -1]
        np.testing.assert_array_equal(output, logits.argmax(-1), err_msg="differs from transformers' greedy choice")
    return outputs


def run(engine, prompts, arrivals=None):
    """Greedy outputs by key; ``arrivals`` are the steps at which the requests are added."""
    params = SamplingParams(temperature=0.0, max_tokens=LENGTH)
    waiting = sorted(prompts, key=lambda k: (arrivals or {}).get(k, 0))
    finished, step = {}, 0
    while waiting or engine.has_unfinished:
        while waiting and (arrivals or {}).get(waiting[0], 0) <= step:
            key = waiting.pop(0)
            engine.add_request(str(key), prompts[key], params)
        for output in engine.step():
            if output.finished:
                finished[int(output.request_id)] = list(output.outputs[0].token_ids)
        step += 1
    return finished


def test_alone_equals_transformers(expected):
    assert len(expected) == 20
    assert sum(len(o) == LENGTH for o in expected) > 5, "some outputs run to the limit"


@pytest.mark.parametrize("caching", [True, False], ids=["caching", "no-caching"])
@pytest.mark.parametrize("num_pages", [512, SMALL_POOL], ids=["roomy", "preempting"])
def test_a_batch_with_random_arrival_gives_the_same_tokens(expected, prompts, smollm2_artifact, caching, num_pages):
    tally = Tally()
    config = EngineConfig(num_pages=num_pages, enable_prefix_caching=caching)
    engine = Engine(smollm2_artifact, config, stat_loggers=[tally])
    rng = random.Random(num_pages)
    arrivals = {i: rng.randrange(0, 30) for i in range(len(prompts))}
    order = dict(enumerate(prompts))
    found = {}
    for _ in range(2 if caching else 1):  # the second time from the prefix cache
        found = run(engine, order, arrivals)
        assert [found[i] for i in range(20)] == expected
    if num_pages == SMALL_POOL:
        assert tally.preemptions > 0
    assert (tally.cache_hits > 0) == caching
    engine.check_idle()
