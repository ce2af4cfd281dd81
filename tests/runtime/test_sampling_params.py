import dataclasses
import math

import pytest

from distaff.runtime.sampling_params import RequestOutputKind, SamplingParams, SamplingParamsError, SamplingType


@pytest.mark.smoke
def test_defaults_are_those_of_vllm():
    p = SamplingParams()
    assert (p.n, p.temperature, p.top_p, p.top_k, p.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (p.max_tokens, p.min_tokens, p.seed, p.logprobs, p.prompt_logprobs) == (16, 0, None, None, None)
    assert (p.ignore_eos, p.detokenize, p.skip_special_tokens, p.spaces_between_special_tokens) == (
        False,
        True,
        True,
        True,
    )
    assert p.stop == [] and p.stop_token_ids == [] and not p.include_stop_str_in_output
    assert p.output_kind is RequestOutputKind.CUMULATIVE


def test_spellings_become_one():
    p = SamplingParams(
        stop="end",
        stop_token_ids=[3, 3, 1],
        seed=-1,
        logprobs=True,
        logit_bias={"7": 500, 8: -1},
        allowed_token_ids=[5, 5],
    )
    assert p.stop == ["end"]
    assert p.stop_token_ids == [3, 1]
    assert p.seed is None
    assert p.logprobs == 1 and p.logprobs is not True
    assert p.logit_bias == {7: 100.0, 8: -1.0}
    assert p.allowed_token_ids == [5]
    assert SamplingParams(stop=None, stop_token_ids=None, bad_words=None).stop == []
    assert dataclasses.replace(p, n=2, seed=5).stop == p.clone().stop == ["end"]


@pytest.mark.parametrize(
    "values",
    [
        {"n": 0}, {"n": 1.0}, {"n": True}, {"n": 16385},
        {"presence_penalty": 2.1}, {"presence_penalty": math.nan}, {"frequency_penalty": -2.1},
        {"repetition_penalty": 0}, {"repetition_penalty": math.inf}, {"repetition_penalty": 10**400},
        {"temperature": -0.1}, {"temperature": 2.1}, {"temperature": "hot"}, {"temperature": math.nan},
        {"top_p": 0}, {"top_p": 1.01}, {"top_k": -2}, {"top_k": 1.5}, {"min_p": -0.1}, {"min_p": 1.1},
        {"seed": 2**63}, {"seed": 0.5}, {"stop": [""]}, {"stop": [1]}, {"stop": 5}, {"stop": {"a": 1}},
        {"stop_token_ids": ["a"]}, {"stop_token_ids": [-1]}, {"stop_token_ids": 3},
        {"bad_words": ["x", ""]}, {"bad_words": {"x": 1}}, {"structured_outputs": {"regex": "a"}},
        {"logits_processors": [print]}, {"thinking_token_budget": 5},
        {"max_tokens": 0}, {"min_tokens": -1}, {"min_tokens": None},
        {"logprobs": -2}, {"prompt_logprobs": "all"}, {"truncate_prompt_tokens": 0}, {"truncate_prompt_tokens": -2},
        {"logit_bias": {"x": 1}}, {"logit_bias": {1: math.inf}}, {"logit_bias": {-1: 1.0}}, {"logit_bias": [1]},
        {"allowed_token_ids": []}, {"allowed_token_ids": [None]},
    ],
    ids=str,
)  # fmt: skip
def test_bad_values_are_refused_by_name(values):
    with pytest.raises(SamplingParamsError) as caught:
        SamplingParams(**values)
    (name,) = values
    assert caught.value.parameter == name
    assert str(caught.value).startswith(name)


def test_contradictions_are_refused():
    with pytest.raises(SamplingParamsError, match="greedy"):
        SamplingParams(n=2, temperature=0)
    with pytest.raises(SamplingParamsError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)
    with pytest.raises(SamplingParamsError, match="max_tokens=3"):
        SamplingParams(min_tokens=4, max_tokens=3)
    assert SamplingParams(min_tokens=4, max_tokens=None).min_tokens == 4


def test_low_temperatures_are_raised_unless_greedy():
    assert SamplingParams(temperature=9e-6).temperature == SamplingParams(temperature=0.009).temperature == 0.01
    greedy = SamplingParams(temperature=0, top_p=0.5, top_k=3, min_p=0.2, seed=1)
    assert (greedy.top_p, greedy.top_k, greedy.min_p) == (1.0, 0, 0.0)
    kinds = [greedy, SamplingParams(temperature=0.5), SamplingParams(seed=0)]
    assert [p.sampling_type for p in kinds] == [SamplingType.GREEDY, SamplingType.RANDOM, SamplingType.RANDOM_SEED]


def test_none_is_the_default_from_optional():
    assert SamplingParams.from_optional(n=None, temperature=None, stop=None) == SamplingParams()
    assert SamplingParams.from_optional(max_tokens=None, top_k=4) == SamplingParams(max_tokens=None, top_k=4)
    with pytest.raises(SamplingParamsError, match="temperature must be in"):
        SamplingParams.from_optional(temperature=3)


def test_a_copy_shares_no_list():
    given = SamplingParams(stop=["a"], stop_token_ids=[3])
    copy = given.clone()
    given.stop.append("b")
    given.stop_token_ids.append(4)
    assert (copy.stop, copy.stop_token_ids) == (["a"], [3]) and SamplingParams().stop == []


def test_values_are_held_against_the_model():
    SamplingParams(stop_token_ids=[9], logprobs=5, logit_bias={9: 1}, allowed_token_ids=[9]).check_model(10, 5)
    for values in (
        {"stop_token_ids": [10]},
        {"logit_bias": {10: 1}},
        {"allowed_token_ids": [10]},
        {"logprobs": 6},
        {"logprobs": -1},
        {"prompt_logprobs": 6},
    ):
        with pytest.raises(SamplingParamsError) as caught:
            SamplingParams(**values).check_model(10, 5)
        assert caught.value.parameter == next(iter(values))
    SamplingParams(logprobs=-1).check_model(10, 10)
