"""The engine with a compiled artifact: real programs, the sampler compiled ahead, and no compilation while serving."""

from __future__ import annotations

import random

import model_zoo as zoo
import numpy as np
import pytest
from tiny_step import VOCAB, plain, tiny_step, tiny_weights

from distaff.compiler.buckets import parse_buckets
from distaff.compiler.lowering.build import ModelInfo, build_artifact
from distaff.compiler.pipeline import derive_serve_step
from distaff.runtime.config import EngineConfig
from distaff.runtime.engine import Engine
from distaff.runtime.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """Compiled, its executables and the sampler's stored by a first start."""
    folder = tmp_path_factory.mktemp("tiny") / "artifact"
    buckets = parse_buckets("decode=1,4 mixed=16x4 scoring=16x4")
    build_artifact(tiny_step(), ModelInfo("tiny", 40), folder, buckets=buckets, page_size=4, num_pages=33)
    Engine(folder).shutdown()
    return folder


@pytest.fixture
def engine(artifact):
    engine = Engine(artifact, EngineConfig(forbid_compiles=True))
    yield engine
    engine.check_idle()
    engine.shutdown()


def generate(engine, prompts, **params):
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, SamplingParams(**params))
    outputs = {}
    while engine.has_unfinished:
        outputs.update({output.request_id: output for output in engine.step()})
    return [outputs[str(i)] for i in range(len(prompts))]


def random_prompts(seed, count):
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.randrange(1, 25))] for _ in range(count)]


def test_greedy_outputs_are_the_plain_models(engine):
    prompts = random_prompts(0, 12)
    for prompt, output in zip(prompts, generate(engine, prompts, temperature=0.0, max_tokens=8), strict=True):
        tokens = output.outputs[0].token_ids
        assert len(tokens) == 8
        logits = plain(tiny_weights(), np.array(prompt + tokens))
        for i, token in enumerate(tokens, len(prompt) - 1):
            assert logits[i, token] >= logits[i].max() - 1e-3


def test_prompt_logprobs_are_the_plain_models(engine):
    prompts = random_prompts(1, 6)
    for prompt, output in zip(prompts, generate(engine, prompts, max_tokens=1, prompt_logprobs=2), strict=True):
        logits = plain(tiny_weights(), np.array(prompt)).astype(np.float64)
        expected = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        expected -= logits.max(-1, keepdims=True)
        for position, entry in enumerate(output.prompt_logprobs[1:]):
            assert len(entry) in (2, 3) and prompt[position + 1] in entry
            for token, logprob in entry.items():
                assert logprob.logprob == pytest.approx(expected[position, token], abs=5e-3)


def test_nothing_is_compiled_while_serving(engine):
    for params in ({"temperature": 0.0}, {}, {"top_k": 3, "presence_penalty": 1.0}, {"logprobs": 2, "min_tokens": 2}):
        generate(engine, random_prompts(2, 5), max_tokens=5, **params)
    assert engine.stats.compiles == 0


@pytest.mark.parametrize(("num_pages", "prefix_caching"), [(25, True), (80, False)])
def test_int8_caches_survive_preemption_and_sharing(tmp_path, num_pages, prefix_caching):
    model, params = zoo.decoder(zoo.causal_where), zoo.parameters(3)
    step = derive_serve_step(model, params, max_model_len=40, page_size=4, kv_dtype="int8")
    buckets = parse_buckets("decode=1,4 mixed=16x4")
    build_artifact(step, ModelInfo("zoo", 40), tmp_path / "artifact", buckets=buckets, page_size=4, num_pages=num_pages)
    engine = Engine(tmp_path / "artifact", EngineConfig(enable_prefix_caching=prefix_caching))
    rng = random.Random(5)
    common = [rng.randrange(zoo.VOCAB) for _ in range(9)]
    prompts = [common + [rng.randrange(zoo.VOCAB) for _ in range(rng.randrange(1, 9))] for _ in range(8)]
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True))
    finished, preemptions = {}, 0
    while engine.has_unfinished:
        finished.update({output.request_id: output for output in engine.step()})
        preemptions += engine.stats.preemptions
    outputs = [finished[str(i)] for i in range(len(prompts))]
    assert (preemptions > 0) == prefix_caching
    assert any(output.num_cached_tokens for output in outputs) == prefix_caching
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = output.outputs[0].token_ids
        logits = np.asarray(model(params, np.array([prompt + tokens])))[0]
        for i, token in enumerate(tokens, len(prompt) - 1):
            assert logits[i, token] >= logits[i].max() - 0.05 * np.abs(logits[i]).max()
    engine.check_idle()
    engine.shutdown()
