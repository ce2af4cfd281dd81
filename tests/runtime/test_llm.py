"""`LLM` over the toy language model: kinds of prompts, order, defaults, refusals, and where artifacts come from."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from toy_runner import ToyRunner, byte_backend, plain_generate, save_toy_artifact, toy_logits

from distaff.compiler.artifact import TOKENIZER, ArtifactError
from distaff.runtime import llm as llm_module
from distaff.runtime.beam_search import BeamSearchParams
from distaff.runtime.engine import Engine
from distaff.runtime.errors import EngineConfigError, PromptError
from distaff.runtime.llm import LLM, TextPrompt, TokensPrompt
from distaff.runtime.sampling_params import SamplingParams, SamplingParamsError

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def executables(tmp_path_factory):
    return tmp_path_factory.mktemp("executables")


@pytest.fixture
def artifact(tmp_path, monkeypatch, executables):
    folder = tmp_path / "artifact"
    save_toy_artifact(folder, tokenizer=byte_backend())
    template = "{% for m in messages %}{{ m.content }}{% if not loop.last %};{% endif %}{% endfor %}{{ tail }}"
    (folder / TOKENIZER / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    generation = {"temperature": 0.0, "top_p": 0.9, "max_new_tokens": 4, "do_sample": True}
    (folder / TOKENIZER / "generation_config.json").write_text(json.dumps(generation))
    # Compiling the sampler's programs for every batch size is not what is tested here.
    monkeypatch.setattr(ToyRunner, "warm_up", lambda self: None)
    monkeypatch.setattr("distaff.runtime.sampling.Sampler.warm_up", lambda self, *sizes: None)
    monkeypatch.setattr(llm_module, "Engine", partial(Engine, make_runner=partial(ToyRunner, executables)))
    return folder


@pytest.mark.smoke
def test_every_kind_of_prompt_in_order(artifact):
    llm = LLM(artifact)
    ids = llm.get_tokenizer().encode("Hello")
    outputs = llm.generate(
        ["Hello", ids, TextPrompt(prompt="Hello"), TokensPrompt(prompt_token_ids=ids, cache_salt="s")], GREEDY
    )
    expected = plain_generate(ids, 6, ignore_eos=True)
    for output in outputs:
        assert (output.prompt_token_ids, output.outputs[0].token_ids) == (ids, expected)
        assert output.outputs[0].text == llm.get_tokenizer().decode(expected) and output.finished
    assert [output.prompt for output in outputs] == ["Hello", None, "Hello", None]
    for single in ("Hello", ids, {"prompt": "Hello"}):
        assert [o.outputs[0].token_ids for o in llm.generate(single, GREEDY, use_tqdm=False)] == [expected]
    assert llm.generate([], GREEDY) == []
    llm.engine.check_idle()


def test_parameters_for_each_prompt_and_input_order(artifact):
    llm = LLM(artifact, max_num_seqs=2, seed=3)
    params = [SamplingParams(temperature=0.0, max_tokens=20 - i, ignore_eos=True) for i in range(10)]
    prompts = [[10 + i] for i in range(10)]
    outputs = llm.generate(prompts, params, priority=list(range(10)))
    for prompt, own, output in zip(prompts, params, outputs, strict=True):
        assert output.outputs[0].token_ids == plain_generate(prompt, own.max_tokens, ignore_eos=True)


def test_defaults_come_from_the_model(artifact):
    llm = LLM(artifact)
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.0, top_p=0.9, max_tokens=4)
    (output,) = llm.generate([[5, 6]])
    assert output.outputs[0].token_ids == plain_generate([5, 6], 4)


def test_chat_renders_one_conversation_or_several(artifact):
    llm = LLM(artifact)
    one = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (output,) = llm.chat(one, GREEDY, chat_template_kwargs={"tail": "!"})
    assert output.prompt == "a;b!" and output.prompt_token_ids == llm.get_tokenizer().encode("a;b!")
    outputs = llm.chat([one, one[:1]], GREEDY, use_tqdm=False)
    assert [output.prompt for output in outputs] == ["a;b", "a"]
    (output,) = llm.chat(one, GREEDY, add_generation_prompt=False, continue_final_message=True)
    assert output.prompt == "a;b"


def test_refusals_leave_nothing_running(artifact):
    llm = LLM(artifact)
    with pytest.raises(PromptError):
        llm.generate(["fine", []], GREEDY)
    with pytest.raises(PromptError, match="prompt_token_ids"):
        llm.generate([{"text": "wrong name"}], GREEDY)
    with pytest.raises(PromptError, match="multi_modal_data"):
        llm.generate([TextPrompt(prompt="a"), {"prompt": "a", "multi_modal_data": {"image": 1}}], GREEDY)
    with pytest.raises(EngineConfigError, match="adapters"):
        llm.generate(["a"], GREEDY, lora_request="some")
    with pytest.raises(SamplingParamsError):
        llm.generate(["a", "b"], [GREEDY, SamplingParams(logprobs=1000)])
    with pytest.raises(ValueError, match="2 entries for 1 prompts"):
        llm.generate(["a"], [GREEDY, GREEDY])
    llm.engine.check_idle()
    with pytest.raises(EngineConfigError, match="page_size 8"):
        LLM(artifact, block_size=8)
    with pytest.raises(EngineConfigError, match="dtype bfloat16"):
        LLM(artifact, dtype="bfloat16")
    with pytest.raises(EngineConfigError, match="quantization is for a model that is compiled"):
        LLM(artifact, quantization="int8")
    assert LLM(artifact, dtype="float32", block_size=4).engine.max_model_len == 64


def test_arguments_of_vllms_pass_if_they_ask_for_nothing(artifact):
    llm = LLM(artifact, enforce_eager=True, tensor_parallel_size=1, disable_log_stats=False, gpu_memory_utilization=0.5)
    assert llm.engine.config.gpu_memory_utilization == 0.5
    for wrong, says in (
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is 2, .* not available yet"),
        ({"enable_lora": True}, "enable_lora is True"),
        ({"speculative_config": {"num_speculative_tokens": 3}}, "speculative decoding"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5"),
        ({"latent_cache": True, "nonsense": 1}, "latent_cache, nonsense: "),
    ):
        with pytest.raises(EngineConfigError, match=says):
            LLM(artifact, **wrong)


def test_priorities_and_cache(artifact):
    llm = LLM(artifact)
    assert [o.outputs[0].token_ids for o in llm.generate([[5], [6]], GREEDY, priority=1)] == [
        o.outputs[0].token_ids for o in llm.generate([[5], [6]], GREEDY, priority=[2, 1])
    ]
    for wrong in ({"priority": []}, {"priority": [1]}, {"sampling_params": []}):
        with pytest.raises(ValueError, match="entries for 2 prompts"):
            llm.generate([[5], [6]], **wrong)
    llm.generate([list(range(4, 20))], GREEDY)
    assert llm.generate([list(range(4, 20))], GREEDY)[0].num_cached_tokens > 0
    assert llm.reset_prefix_cache()
    assert llm.generate([list(range(4, 20))], GREEDY)[0].num_cached_tokens == 0


def test_without_detokenizing_nothing_has_a_text(artifact):
    params = SamplingParams(temperature=0.0, max_tokens=3, detokenize=False, logprobs=2, prompt_logprobs=1)
    (output,) = LLM(artifact).generate(["abc"], params)
    positions = [*output.outputs[0].logprobs, *output.prompt_logprobs[1:]]
    assert output.outputs[0].text == "" and len(positions) == 5
    assert all(entry.decoded_token is None for position in positions for entry in position.values())


def test_an_interrupt_aborts_what_runs(artifact):
    llm = LLM(artifact)
    llm.engine._runner.fail = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], GREEDY)
    assert not llm.engine.has_unfinished


def test_anything_but_an_artifact_is_compiled_first(artifact, tmp_path, monkeypatch):
    calls = []

    def compile_model(model, **options):
        calls.append((model, options))
        return artifact

    def entry_points(*, group):
        assert group == "distaff.compile_on_demand"
        return [SimpleNamespace(load=lambda: compile_model)]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    llm = LLM("some/model", max_num_seqs=3, block_size=4, latent_cache=True)
    assert calls == [("some/model", {"page_size": 4, "max_batch": 3, "latent_cache": True})]
    assert llm.generate([[5]], GREEDY)[0].finished
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: [])
    with pytest.raises(ArtifactError, match="compile-model"):
        LLM(str(tmp_path / "nothing"))


def test_importing_the_package_imports_no_jax():
    code = "import sys, distaff.runtime; assert 'jax' not in sys.modules; distaff.runtime.SamplingParams()"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        from distaff import runtime

        _ = runtime.Nothing


def test_beam_search_through_the_engine(artifact):
    llm = LLM(artifact)
    prompts = ["Hello", {"prompt": "Hi", "cache_salt": "s"}]
    params = BeamSearchParams(beam_width=3, max_tokens=4)
    outputs = llm.beam_search(prompts, params)
    one_by_one = llm.beam_search(prompts, params, concurrency_limit=1, use_tqdm=True)
    assert [[s.tokens for s in o.sequences] for o in one_by_one] == [[s.tokens for s in o.sequences] for o in outputs]
    for prompt, output in zip(("Hello", "Hi"), outputs, strict=True):
        ids = llm.get_tokenizer().encode(prompt)
        best = output.sequences[0]
        assert len(output.sequences) == 3 and best.text == llm.get_tokenizer().decode(best.tokens)
        for sequence in output.sequences:
            context, total = list(ids), 0.0
            for token in sequence.tokens[len(ids) :]:
                logits = toy_logits(context).astype(np.float64)
                total += logits[token] - np.log(np.exp(logits).sum())
                context.append(token)
            assert sequence.cum_logprob == pytest.approx(total, abs=1e-4)
    with pytest.raises(SamplingParamsError, match="beam_width 11 needs max_logprobs=22"):
        llm.beam_search("Hello", BeamSearchParams(beam_width=11, max_tokens=4))
    with pytest.raises(PromptError, match="max_tokens=60"):
        llm.beam_search("Hello", BeamSearchParams(beam_width=2, max_tokens=60))
    with pytest.raises(EngineConfigError, match="lora_request"):
        llm.beam_search("Hello", params, lora_request=object())
    llm.engine.check_idle()
