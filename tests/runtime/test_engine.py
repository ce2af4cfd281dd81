"""The engine over the toy language model: paging, caching, chunking and preemption must not change any output."""

from __future__ import annotations

import random
import time
from functools import partial

import numpy as np
import pytest
from toy_runner import EOS, VOCAB, ToyRunner, byte_backend, plain_generate, save_toy_artifact, toy_logits

from distaff.runtime.config import EngineConfig
from distaff.runtime.engine import Engine
from distaff.runtime.errors import (
    DuplicateRequestError,
    EngineConfigError,
    EngineOverloadedError,
    PromptError,
    TokenizerError,
)
from distaff.runtime.sampling_params import RequestOutputKind, SamplingParams, SamplingParamsError

GREEDY = partial(SamplingParams, temperature=0.0, output_kind=RequestOutputKind.FINAL_ONLY)


@pytest.fixture(scope="module")
def executables(tmp_path_factory):
    return tmp_path_factory.mktemp("executables")


@pytest.fixture
def make_engine(tmp_path, executables):
    """Builds an engine on the toy model; keyword arguments are settings of the engine or sizes of the artifact."""

    def make(*, tokenizer=None, stat_loggers=(), artifact=None, **config):
        folder = tmp_path / f"artifact{len(list(tmp_path.iterdir()))}"
        save_toy_artifact(folder, tokenizer=tokenizer, **(artifact or {}))
        config = EngineConfig(**{"warm_up": False, **config})
        return Engine(folder, config, stat_loggers=stat_loggers, make_runner=partial(ToyRunner, executables))

    return make


def run(engine, limit=2000):
    """Steps until nothing is left; the last output of each request."""
    outputs = {}
    for _ in range(limit):
        if not engine.has_unfinished:
            return outputs
        outputs.update({output.request_id: output for output in engine.step()})
    raise AssertionError("the engine does not come to an end")


def tokens_of(output):
    return [completion.token_ids for completion in output.outputs]


def random_prompts(seed, count, longest=40):
    rng = random.Random(seed)
    return [[rng.randrange(4, VOCAB) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


@pytest.mark.smoke
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"enable_prefix_caching": False},
        {"num_pages": 20},  # preemption all the time
        {"max_num_batched_tokens": 9, "max_num_seqs": 3},  # chunks
        {"long_prefill_token_threshold": 3, "num_pages": 24, "scheduling_policy": "priority"},
    ],
)
def test_outputs_are_those_of_the_plain_model(make_engine, settings):
    engine = make_engine(**settings)
    shared = random_prompts(0, 1, 30)[0]
    prompts = [shared[: i % 7 * 4] + own for i, own in enumerate(random_prompts(1, 20, 24))]
    outputs = {}
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, GREEDY(max_tokens=20, ignore_eos=i % 2 == 0), priority=i % 3)
        if i % 4 == 0:
            outputs.update((output.request_id, output) for _ in range(3) for output in engine.step())
    outputs.update(run(engine))
    for i, prompt in enumerate(prompts):
        assert tokens_of(outputs[str(i)]) == [plain_generate(prompt, 20, ignore_eos=i % 2 == 0)], i
    engine.check_idle()
    if settings.get("num_pages") == 20:
        assert engine._scheduler.stats().preemptions > 0


def test_prefix_hits_are_reported_and_the_salt_separates(make_engine):
    engine = make_engine()
    prompt = random_prompts(2, 1)[0] + list(range(4, 20))
    cached = []
    for i, salt in enumerate([None, None, "a", "a", "b"]):
        engine.add_request(str(i), prompt, GREEDY(max_tokens=2), cache_salt=salt)
        cached.append(run(engine)[str(i)].num_cached_tokens)
    full = (len(prompt) - 1) // 4 * 4
    assert cached == [0, full, 0, full, 0]
    assert engine.reset_prefix_cache()
    engine.add_request("again", prompt, GREEDY(max_tokens=2))
    assert run(engine)["again"].num_cached_tokens == 0


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_output_kinds(make_engine, kind):
    engine = make_engine(tokenizer=byte_backend())
    prompt = engine.tokenizer.encode("Hello")
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, output_kind=kind)
    engine.add_request("r", prompt, params)
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    expected = plain_generate(prompt, 12, ignore_eos=True)
    text = engine.tokenizer.decode(expected)
    last = outputs[-1]
    assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
    assert last.outputs[0].finish_reason == "length" and last.metrics[0].generation_tokens == 12
    if kind == RequestOutputKind.DELTA:
        assert len(outputs) == 12
        assert [token for o in outputs for token in o.outputs[0].token_ids] == expected
        assert "".join(o.outputs[0].text for o in outputs) == text
    else:
        assert len(outputs) == (1 if kind == RequestOutputKind.FINAL_ONLY else 12)
        assert (last.outputs[0].token_ids, last.outputs[0].text) == (expected, text)
        assert all(text.startswith(o.outputs[0].text) for o in outputs)


def test_parameters_assigned_later_are_checked_and_leave_running_requests_alone(make_engine):
    engine = make_engine()
    params = GREEDY(max_tokens=3, ignore_eos=True)
    engine.add_request("first", [5, 6], params)
    params.max_tokens = 5
    engine.add_request("second", [5, 6], params)
    params.temperature = -1.0
    with pytest.raises(SamplingParamsError, match="temperature"):
        engine.add_request("third", [5, 6], params)
    finished = {}
    while engine.has_unfinished:
        finished |= {out.request_id: len(out.outputs[0].token_ids) for out in engine.step() if out.finished}
    assert finished == {"first": 3, "second": 5}


def test_stop_strings_end_a_request(make_engine):
    engine = make_engine(tokenizer=byte_backend())
    prompt = engine.tokenizer.encode("Hello")
    tokens = plain_generate(prompt, 20, ignore_eos=True)
    text = engine.tokenizer.decode(tokens)
    stop = next(text[i : i + 2] for i in range(4, len(text)) if text[i : i + 2].isascii() and len(text[i : i + 2]) == 2)
    for include in (False, True):
        params = GREEDY(max_tokens=20, ignore_eos=True, stop=["no such", stop], include_stop_str_in_output=include)
        engine.add_request("r", prompt, params)
        (completion,) = run(engine)["r"].outputs
        assert completion.text == text[: text.index(stop) + (len(stop) if include else 0)]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
        assert completion.token_ids == tokens[: len(completion.token_ids)]
    engine.check_idle()


def test_stop_tokens_end_of_sequence_and_lengths(make_engine):
    engine = make_engine(tokenizer=byte_backend())
    prompt = random_prompts(5, 1)[0]
    tokens = plain_generate(prompt, 12, ignore_eos=True)
    engine.add_request("token", prompt, GREEDY(max_tokens=12, stop_token_ids=[tokens[3]], ignore_eos=True))
    (by_token,) = run(engine)["token"].outputs
    count = tokens.index(tokens[3]) + 1
    assert by_token.token_ids == tokens[:count]
    assert (by_token.finish_reason, by_token.stop_reason) == ("stop", tokens[3])
    assert by_token.text == engine.tokenizer.decode(tokens[: count - 1])
    engine.add_request("eos", prompt, GREEDY(max_tokens=12, logit_bias={EOS: 100}))
    (by_eos,) = run(engine)["eos"].outputs
    assert (by_eos.token_ids, by_eos.finish_reason, by_eos.stop_reason) == ([EOS], "stop", None)
    engine.add_request("full", prompt, GREEDY(max_tokens=None, ignore_eos=True))
    (full,) = run(engine)["full"].outputs
    assert len(full.token_ids) == 64 - len(prompt) and full.finish_reason == "length"


def test_penalties_survive_preemption(make_engine):
    engine = make_engine(num_pages=20)
    prompts = random_prompts(6, 8, 20)
    repetition, presence, frequency, allowed = 1.4, 0.7, 0.3, list(range(4, 40))

    def adjust(prompt, logits, output):
        logits = np.where(np.isin(np.arange(VOCAB), allowed), logits, -np.inf)
        counts = np.bincount(output, minlength=VOCAB) if output else np.zeros(VOCAB, int)
        seen = (counts > 0) | np.isin(np.arange(VOCAB), prompt)
        logits = np.where(seen, np.where(logits > 0, logits / repetition, logits * repetition), logits)
        return logits - frequency * counts - presence * (counts > 0)

    for i, prompt in enumerate(prompts):
        params = GREEDY(
            max_tokens=30,
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=frequency,
            allowed_token_ids=allowed,
        )
        engine.add_request(str(i), prompt, params)
    outputs = run(engine)
    assert engine._scheduler.stats().preemptions > 0
    for i, prompt in enumerate(prompts):
        assert tokens_of(outputs[str(i)]) == [plain_generate(prompt, 30, adjust=partial(adjust, prompt))]


def test_min_tokens_masks_every_end(make_engine):
    engine = make_engine()
    bias = {EOS: 100, 7: 50}
    engine.add_request("r", [5, 6], GREEDY(max_tokens=9, min_tokens=3, stop_token_ids=[7], logit_bias=bias))
    (completion,) = run(engine)["r"].outputs
    assert len(completion.token_ids) == 4 and completion.token_ids[-1] == EOS
    assert not {EOS, 7} & set(completion.token_ids[:3])


def test_seeds_decide_whatever_else_runs(make_engine):
    params = partial(SamplingParams, max_tokens=20, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY)
    prompts = random_prompts(7, 8, 20)

    def outputs(engine, chosen):
        for i in chosen:
            engine.add_request(str(i), prompts[i], params(seed=100 + i, top_k=[0, 20][i % 2], top_p=0.95))
        return {i: tokens_of(output) for i, output in run(engine).items()}

    together = outputs(make_engine(), range(8))
    squeezed = outputs(make_engine(num_pages=20), range(8))
    alone = outputs(make_engine(), [3])
    assert together == squeezed and alone["3"] == together["3"]
    unseeded = []
    for seed in (0, 0, 1):
        engine = make_engine(seed=seed)
        engine.add_request("r", prompts[0], params())
        unseeded.append(tokens_of(run(engine)["r"]))
    assert unseeded[0] == unseeded[1] != unseeded[2]


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_several_completions_share_the_prompt(make_engine, kind):
    engine = make_engine(tokenizer=byte_backend())
    prompt = random_prompts(8, 1)[0] + list(range(4, 16))
    params = SamplingParams(n=3, seed=11, max_tokens=6, ignore_eos=True, output_kind=kind)
    engine.add_request("r", prompt, params)
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    assert [o.finished for o in outputs].count(True) == 1 and outputs[-1].finished
    collected = {i: [] for i in range(3)}
    for output in outputs:
        for completion in output.outputs:
            old = collected[completion.index] if kind == RequestOutputKind.DELTA else []
            collected[completion.index] = old + completion.token_ids
    assert engine._scheduler.stats().prefix_cache.hits == 2 * ((len(prompt) - 1) // 4 * 4)
    assert len(outputs[-1].metrics) == 3
    for i in range(3):
        engine.add_request("alone", prompt, SamplingParams(seed=11 + i, max_tokens=6, ignore_eos=True))
        assert tokens_of(run(engine)["alone"]) == [collected[i]]
    engine.check_idle()


def test_logprobs_are_the_models_own(make_engine):
    engine = make_engine(tokenizer=byte_backend())
    prompt = random_prompts(9, 1)[0]
    engine.add_request("r", prompt, SamplingParams(seed=1, max_tokens=5, temperature=1.5, logprobs=3, ignore_eos=True))
    engine.add_request("none", prompt, SamplingParams(seed=1, max_tokens=5, logprobs=0, ignore_eos=True))
    outputs = run(engine)
    (completion,) = outputs["r"].outputs
    total = 0.0
    for i, (token, entry) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
        logits = toy_logits([*prompt, *completion.token_ids[:i]]).astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum())
        order = np.argsort(-expected)
        assert list(entry) == list(dict.fromkeys([token, *order[:3].tolist()]))
        for candidate, logprob in entry.items():
            assert logprob.logprob == pytest.approx(expected[candidate], abs=1e-4)
            assert logprob.rank == np.flatnonzero(order == candidate)[0] + 1
            assert logprob.decoded_token == engine.tokenizer.token_text(candidate)
        total += expected[token]
    assert completion.cumulative_logprob == pytest.approx(total, abs=1e-3)
    assert [len(entry) for entry in outputs["none"].outputs[0].logprobs] == [1] * 5


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 9}, {"num_pages": 20}])
def test_prompt_logprobs(make_engine, settings):
    engine = make_engine(**settings)
    prompts = random_prompts(10, 5)
    for i, prompt in enumerate(prompts):
        n = 2 if i == 1 else 1
        params = SamplingParams(n=n, seed=i, max_tokens=12, ignore_eos=True, prompt_logprobs=[2, 0, None, 1, 3][i])
        engine.add_request(str(i), prompt, params)
    outputs = run(engine)
    for i, prompt in enumerate(prompts):
        got = outputs[str(i)].prompt_logprobs
        if i == 2:
            assert got is None
            continue
        assert len(got) == len(prompt) and got[0] is None
        for position in range(1, len(prompt)):
            logits = toy_logits(prompt[:position]).astype(np.float64)
            expected = logits - np.log(np.exp(logits).sum())
            entry = got[position]
            assert next(iter(entry)) == prompt[position]
            wanted = dict.fromkeys([prompt[position], *np.argsort(-expected)[: [2, 0, None, 1, 3][i]].tolist()])
            assert list(entry) == list(wanted)
            assert entry[prompt[position]].logprob == pytest.approx(expected[prompt[position]], abs=1e-4)


def test_all_logprobs(make_engine):
    engine = make_engine(max_logprobs=-1)
    engine.add_request("r", [5, 6], SamplingParams(max_tokens=1, logprobs=-1, prompt_logprobs=-1))
    output = run(engine)["r"]
    assert len(output.outputs[0].logprobs[0]) == VOCAB == len(output.prompt_logprobs[1])


def test_prompt_logprobs_come_once_in_deltas(make_engine):
    engine = make_engine()
    params = SamplingParams(max_tokens=3, ignore_eos=True, prompt_logprobs=0, output_kind=RequestOutputKind.DELTA)
    engine.add_request("r", [5, 6, 7], params)
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    assert [len(output.prompt_logprobs) for output in outputs] == [3, 0, 0]


def test_prompt_logprobs_come_once_in_spite_of_preemption(make_engine):
    engine = make_engine(num_pages=18)
    params = SamplingParams(max_tokens=25, ignore_eos=True, prompt_logprobs=0, output_kind=RequestOutputKind.DELTA)
    prompts = random_prompts(11, 6, 30)
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, params)
    given = {str(i): 0 for i in range(len(prompts))}
    while engine.has_unfinished:
        for output in engine.step():
            given[output.request_id] += len(output.prompt_logprobs)
    assert engine._scheduler.stats().preemptions > 0
    assert list(given.values()) == [len(prompt) for prompt in prompts]


def test_bad_logits_end_only_their_request(make_engine):
    engine = make_engine()
    engine._runner.break_row = 9
    for name, prompt in [("good", [8, 5]), ("bad", [9, 5]), ("also good", [7])]:
        engine.add_request(name, prompt, GREEDY(max_tokens=4, ignore_eos=True, logprobs=1))
    outputs = run(engine)
    assert outputs["bad"].outputs[0].finish_reason == "error" and "not finite" in outputs["bad"].error
    assert tokens_of(outputs["good"]) == [plain_generate([8, 5], 4, ignore_eos=True)]
    assert tokens_of(outputs["also good"]) == [plain_generate([7], 4, ignore_eos=True)]
    engine.check_idle()


def test_abort_in_every_state(make_engine):
    engine = make_engine(max_num_seqs=2)
    for name in "abcd":
        engine.add_request(name, [5, 6, 7], SamplingParams(n=2, max_tokens=30, ignore_eos=True))
    engine.abort(["d"])
    for _ in range(3):
        engine.step()
    outputs = engine.abort(["a", "c", "unknown", "a"])
    assert [output.request_id for output in outputs] == ["a", "c"]
    assert all(output.finished for output in outputs)
    assert {c.finish_reason for output in outputs for c in output.outputs} == {"abort"}
    assert list(run(engine)) == ["b"]
    engine.check_idle()


def test_timeouts_end_waiting_and_running_requests(make_engine):
    engine = make_engine(max_num_seqs=1)
    engine.add_request("running", [5], GREEDY(max_tokens=40, ignore_eos=True), timeout=0.05)
    engine.add_request("waiting", [6], GREEDY(max_tokens=40), timeout=0.05, arrival_time=time.monotonic() - 0.02)
    engine.add_request("patient", [7], GREEDY(max_tokens=2, ignore_eos=True), timeout=60)
    engine.step()
    time.sleep(0.06)
    outputs = run(engine)
    for name in ("running", "waiting"):
        assert outputs[name].outputs[0].finish_reason == "abort" and "timeout of 0.05 s" in outputs[name].error
    assert outputs["patient"].outputs[0].finish_reason == "length"
    engine.check_idle()


def test_refusals_change_nothing(make_engine):
    engine = make_engine(max_waiting=3, max_num_seqs=1, max_model_len=32)
    ok = GREEDY(max_tokens=2)
    engine.add_request("a", [5], ok)
    for error, words, request_id, prompt, params in [
        (PromptError, "cannot be empty", "b", [], ok),
        (PromptError, "32 tokens", "b", [5] * 32, ok),
        (PromptError, f"token id {VOCAB}", "b", [5, VOCAB], ok),
        (PromptError, "token id -1", "b", [-1], ok),
        (DuplicateRequestError, "'a'", "a", [5], ok),
        (SamplingParamsError, "logprobs", "b", [5], GREEDY(logprobs=21)),
        (SamplingParamsError, "prompt_logprobs", "b", [5], GREEDY(prompt_logprobs=-1)),
        (SamplingParamsError, "logit_bias", "b", [5], GREEDY(logit_bias={VOCAB: 1})),
        (SamplingParamsError, "stop", "b", [5], GREEDY(stop="x")),
        (SamplingParamsError, "n is 5, but only 1 can run", "b", [5], SamplingParams(n=5)),
        (
            SamplingParamsError,
            "min_tokens is 2",
            "b",
            [5],
            GREEDY(min_tokens=2, stop_token_ids=[9], allowed_token_ids=[9]),
        ),
    ]:
        with pytest.raises(error, match=words):
            engine.add_request(request_id, prompt, params)
    with pytest.raises(EngineOverloadedError, match="max_waiting") as caught:
        engine.add_request("b", [5], SamplingParams(n=4))
    assert 1 <= caught.value.retry_after <= 60 and caught.value.waiting == 1
    engine.add_request("cut", list(range(4, 60)), GREEDY(max_tokens=2, truncate_prompt_tokens=5))
    with pytest.raises(TokenizerError, match="no tokenizer"):
        _ = engine.tokenizer
    outputs = run(engine)
    assert list(outputs) == ["a", "cut"] and outputs["cut"].prompt_token_ids == [55, 56, 57, 58, 59]
    engine.check_idle()


def test_an_exception_in_a_step_leaves_the_engine_whole(make_engine):
    engine = make_engine()
    engine.add_request("hit", [5, 6, 7, 8, 9], GREEDY(max_tokens=4))
    engine._runner.fail = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.check_idle()
    engine._runner.fail = None
    engine.add_request("after", [5, 6, 7, 8, 9], GREEDY(max_tokens=4, ignore_eos=True))
    assert tokens_of(run(engine)["after"]) == [plain_generate([5, 6, 7, 8, 9], 4, ignore_eos=True)]


def test_settings_beyond_the_artifact_are_refused(make_engine):
    for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens"):
        for value in (0, 10**6):
            with pytest.raises(EngineConfigError, match=name):
                make_engine(**{name: value})
    for wrong in ({"max_waiting": 0}, {"max_logprobs": -2}, {"scheduling_policy": "random"}):
        with pytest.raises(EngineConfigError):
            make_engine(**wrong)


class Recorder:
    def __init__(self):
        self.steps, self.first, self.gaps, self.finished = [], [], [], []
        self.on_step, self.on_first_token = self.steps.append, self.first.append
        self.on_token_gap, self.on_finished = self.gaps.append, self.finished.append


def test_stat_loggers_see_every_token(make_engine):
    recorder = Recorder()
    engine = make_engine(stat_loggers=[recorder])
    for i in range(3):
        engine.add_request(str(i), list(range(4, 24)), GREEDY(max_tokens=5, ignore_eos=True))
    engine.add_request("aborted", [5], GREEDY())
    engine.abort(["aborted"])
    run(engine)
    assert sum(step.generation_tokens for step in recorder.steps) == 15
    assert sum(step.prompt_tokens + step.prefix_cache_hits for step in recorder.steps) == 60
    assert max(step.running for step in recorder.steps) == 3 and recorder.steps[-1].kv_usage == 0
    assert len(recorder.first) == 3 and len(recorder.gaps) == 12
    aborted, *done = recorder.finished
    assert (aborted.finish_reason, aborted.time_to_first_token, aborted.generation_tokens) == ("abort", None, 0)
    for stats in done:
        assert (stats.finish_reason, stats.prompt_tokens, stats.generation_tokens, stats.max_tokens) == (
            "length",
            20,
            5,
            5,
        )
        parts = stats.queue_seconds + stats.prefill_seconds + stats.decode_seconds
        assert parts == pytest.approx(stats.e2e_seconds, abs=0.01)
        assert stats.mean_inter_token_latency == pytest.approx(stats.decode_seconds / 4)


def test_500_random_requests_leave_nothing_behind(make_engine):
    engine = make_engine(num_pages=40, tokenizer=byte_backend())
    rng = random.Random(0)
    live, finished = set(), set()
    for i in range(500):
        greedy = rng.random() < 0.5
        params = SamplingParams(
            n=1 if greedy else rng.choice([1, 1, 2, 4]),
            temperature=0.0 if greedy else 1.0,
            max_tokens=rng.randrange(1, 16),
            output_kind=rng.choice(list(RequestOutputKind)),
            presence_penalty=rng.choice([0.0, 0.0, 0.5]),
            top_k=rng.choice([0, 5]),
            stop=rng.choice([(), ("a",)]),
            prompt_logprobs=rng.choice([None, None, None, 1]),
        )
        prompt = [rng.randrange(4, 8) for _ in range(rng.randrange(1, 40))]
        timeout = rng.choice([None, None, 0.001, 100])
        engine.add_request(str(i), prompt, params, timeout=timeout, priority=rng.randrange(3))
        live.add(str(i))
        if rng.random() < 0.2:
            engine.abort(rng.sample(sorted(live), min(3, len(live))))
            live &= set(engine._groups)
        if rng.random() < 0.6:
            finished |= {output.request_id for output in engine.step() if output.finished}
            live &= set(engine._groups)
    finished |= {output.request_id for output in (run(engine)).values() if output.finished}
    assert len(finished) > 100
    engine.check_idle()
    engine.shutdown()
