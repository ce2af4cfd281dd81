"""Beam search over the toy language model, against a plain search that knows its logits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_runner import EOS, VOCAB, toy_logits

from distaff.runtime.beam_search import BeamSearchParams, beam_search
from distaff.runtime.outputs import CompletionOutput, Logprob, RequestOutput
from distaff.runtime.sampling_params import SamplingParamsError


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def logits_after(tokens, eos_bias):
    logits = toy_logits(tokens)
    logits[EOS] += eos_bias
    return log_softmax(logits)


def generator(eos_bias, asked):
    """A `generate` that gives the next token and the most likely ones."""

    def generate(prompts, params):
        asked.append(len(prompts))
        outputs = []
        for prompt in prompts:
            values = logits_after(prompt["prompt_token_ids"], eos_bias)
            top = np.argsort(-values)[: params.logprobs]
            candidates = {int(t): Logprob(float(values[t]), rank) for rank, t in enumerate(top, 1)}
            completion = CompletionOutput(0, "", [int(top[0])], logprobs=[candidates], finish_reason="length")
            outputs.append(RequestOutput("", None, prompt["prompt_token_ids"], None, [completion], True))
        return outputs

    return generate


def plain_search(prompt, width, max_tokens, length_penalty, eos_bias, ignore_eos):
    """All continuations of every beam are scored; the best that do not end go on."""

    def score(item):
        tokens, total = item
        return total / (len(tokens) - (tokens[-1] == EOS)) ** length_penalty

    beams, ended = [(prompt, 0.0)], []
    for _ in range(max_tokens):
        longer = []
        for tokens, total in beams:
            values = logits_after(tokens, eos_bias)
            best = set(np.argsort(-values)[: 2 * width].tolist())
            longer += [([*tokens, t], total + values[t]) for t in range(VOCAB) if t in best]
        ended += [item for item in longer if item[0][-1] == EOS and not ignore_eos]
        beams = sorted((i for i in longer if i[0][-1] != EOS or ignore_eos), key=score, reverse=True)[:width]
    return sorted(ended + beams, key=score, reverse=True)[:width]


@settings(deadline=None, max_examples=40)
@given(
    prompts=st.lists(st.lists(st.integers(4, VOCAB - 1), min_size=1, max_size=4), min_size=1, max_size=3),
    width=st.integers(1, 4),
    max_tokens=st.integers(1, 5),
    length_penalty=st.sampled_from([0.0, 0.7, 1.0, 2.0]),
    eos_bias=st.sampled_from([0.0, 8.0]),
    ignore_eos=st.booleans(),
)
def test_the_plain_search_finds_the_same(prompts, width, max_tokens, length_penalty, eos_bias, ignore_eos):
    params = BeamSearchParams(
        beam_width=width, max_tokens=max_tokens, length_penalty=length_penalty, ignore_eos=ignore_eos
    )
    asked = []
    found = beam_search(generator(eos_bias, asked), [{"prompt_token_ids": p} for p in prompts], params, {EOS})
    assert len(asked) <= max_tokens and asked[0] == len(prompts)
    for prompt, output in zip(prompts, found, strict=True):
        expected = plain_search(prompt, width, max_tokens, length_penalty, eos_bias, ignore_eos)
        assert [s.tokens for s in output.sequences] == [tokens for tokens, _ in expected]
        np.testing.assert_allclose([s.cum_logprob for s in output.sequences], [total for _, total in expected])
        for s in output.sequences:
            assert len(s.logprobs) == len(s.tokens) - len(prompt)
            ends = s.tokens[-1] == EOS and not ignore_eos
            assert (s.finish_reason, s.stop_reason) == (("stop", EOS) if ends else ("length", None))


@pytest.mark.parametrize("values", [{"beam_width": 0}, {"beam_width": 1.5}, {"max_tokens": 0}, {"temperature": -1}])
def test_bad_parameters_are_refused_by_name(values):
    with pytest.raises(SamplingParamsError, match=next(iter(values))):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 3, **values})
