"""Bad words: their spellings, what they mask, and that outputs are those of a plain loop that masks the same."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_runner import VOCAB, ToyRunner, byte_backend, plain_generate, save_toy_artifact

from distaff.runtime.bad_words import forbidden_tokens, spellings
from distaff.runtime.config import EngineConfig
from distaff.runtime.engine import Engine
from distaff.runtime.sampling_params import SamplingParams, SamplingParamsError
from distaff.runtime.tokenizer import Tokenizer


class Words:
    """A tokenizer that knows words with and without a space before them, and else spells letters."""

    vocabulary: ClassVar = {
        " ": [8],
        "coach": [9, 10],
        " coach": [11],
        "years": [1],
        " years": [2],
        "old": [3, 4],
        " old": [5, 4],
        "x": [6],
        " x": [7, 6],
        "": [],
    }

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return self.vocabulary[text]


def test_words_are_forbidden_with_and_without_a_space():
    assert spellings(["years", " old", "x", "years"], Words()) == ((1,), (2,), (3, 4), (5, 4), (6,))
    assert spellings(["coach"], Words()) == ((9, 10), (11,))
    with pytest.raises(SamplingParamsError, match="bad_words holds ' '"):
        spellings([" "], Words())


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), max_size=4), st.lists(st.integers(0, 2)))
def test_the_forbidden_tokens_are_those_that_complete_a_word(words, output):
    sequences = tuple(map(tuple, words))
    completing = {t for t in range(3) if any((*output, t)[-len(s) :] == s for s in sequences)}
    assert forbidden_tokens(sequences, output) == completing


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "artifact"
    save_toy_artifact(folder, tokenizer=byte_backend(), num_pages=14)  # too few for all, so that some are preempted
    runner = partial(ToyRunner, tmp_path_factory.mktemp("executables"))
    return Engine(folder, EngineConfig(warm_up=False), make_runner=runner)


def run(engine):
    outputs = {}
    while engine.has_unfinished:
        outputs.update({output.request_id: output.outputs[0] for output in engine.step()})
    return outputs


@settings(max_examples=15, deadline=None)
@given(st.lists(st.text("abcd", min_size=1, max_size=3), max_size=4), st.integers(4, VOCAB - 1))
def test_outputs_are_those_of_a_plain_loop(engine, words, first):
    """Of few letters, so that words would come often."""
    prompt, count = [first, 9], 16
    allowed = engine.tokenizer.encode("abcde")
    sequences = spellings(words, engine.tokenizer)

    def mask(sequences, logits, output):
        forbidden = forbidden_tokens(sequences, output)
        return [x if t in allowed and t not in forbidden else -np.inf for t, x in enumerate(logits)]

    def params(words):
        return SamplingParams(
            temperature=0, max_tokens=count, ignore_eos=True, allowed_token_ids=allowed, bad_words=words
        )

    for i in range(4):
        engine.add_request(f"masked{i}", prompt, params(words))
        engine.add_request(f"free{i}", prompt, params([]))
    outputs = run(engine)
    expected = {"masked": sequences, "free": ()}
    for kind, own in expected.items():
        tokens = plain_generate(prompt, count, ignore_eos=True, adjust=partial(mask, own))
        assert [outputs[f"{kind}{i}"].token_ids for i in range(4)] == [tokens] * 4
    assert not any(word in outputs["masked0"].text for word in words)
    engine.check_idle()


def test_they_need_a_tokenizer(tmp_path):
    save_toy_artifact(tmp_path / "a")
    engine = Engine(tmp_path / "a", EngineConfig(warm_up=False), make_runner=partial(ToyRunner, tmp_path / "e"))
    with pytest.raises(SamplingParamsError, match="bad_words needs a tokenizer"):
        engine.add_request("0", [5], SamplingParams(bad_words=["a"]))


def test_a_tokenizer_of_bytes_spells_a_space_before_a_word_as_one_more_token():
    assert len(spellings(["ab"], Tokenizer(byte_backend(), {}))) == 1
