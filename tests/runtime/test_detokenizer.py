"""Text that comes token by token equals text decoded at once, and stop strings are found wherever they lie."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from distaff.runtime.detokenizer import Detokenizer
from distaff.runtime.tokenizer import Tokenizer

TEXTS = ["naïve café 東京 привет 👋🏽 emoji 🇫🇮", "Hello world, hello there!", "    indented\n\n\ttabs"]


def byte_level():
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    # Decoders take an added token of characters that stand for bytes as those bytes: this "é" decodes to 0xE9.
    backend.add_tokens(["<tool call>", "é"])
    return Tokenizer(backend, {})


def metaspace():
    pieces = ["<unk>", "<s>", "</s>", "▁Hello", "▁wor", "ld", "▁", "▁▁", "e", "o", ",", "東", "!", "Ġ"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Backend(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, {})


BYTE_LEVEL, METASPACE = byte_level(), metaspace()
FIRST_BYTE = METASPACE._backend.token_to_id("<0x00>")
# What sentencepiece emits: whole pieces, and characters outside the vocabulary as their bytes.
METASPACE_UNITS = st.one_of(
    st.integers(0, FIRST_BYTE - 1).map(lambda i: [i]),
    st.characters(codec="utf-8").map(lambda c: [FIRST_BYTE + byte for byte in c.encode()]),
)


def stream(detokenizer, ids):
    deltas = []
    for token_id in ids:
        assert detokenizer.update([token_id]) is None
        deltas.append(detokenizer.take(finished=False))
    detokenizer.finish()
    return [*deltas, detokenizer.take(finished=True)]


@pytest.mark.smoke
@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 3), max_size=40), st.booleans())
def test_byte_level_deltas_equal_one_shot_decoding(ids, skip):
    expected = BYTE_LEVEL.decode(ids, skip_special_tokens=skip)
    assert "".join(stream(Detokenizer(BYTE_LEVEL, [], skip_special_tokens=skip), ids)) == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(METASPACE_UNITS, max_size=8), st.lists(METASPACE_UNITS, max_size=25), st.booleans())
def test_metaspace_deltas_equal_one_shot_decoding_after_the_prompt(prompt, output, skip):
    prompt, output = list(chain(*prompt)), list(chain(*output))
    detokenizer = Detokenizer(METASPACE, prompt, skip_special_tokens=skip)
    context = [i for i in prompt[-5:] if not (skip and i in METASPACE.special_token_ids)]
    before = METASPACE.decode(context, skip_special_tokens=skip)
    if before.endswith("\ufffd"):
        context, before = [], ""
    whole = METASPACE.decode(context + output, skip_special_tokens=skip)
    assert before + "".join(stream(detokenizer, output)) == whole


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="é"), max_size=30))
def test_streams_never_show_a_torn_character(text):
    deltas = stream(Detokenizer(BYTE_LEVEL, []), BYTE_LEVEL.encode(text))
    assert "".join(deltas) == text
    assert all(("\ufffd" in delta) <= ("\ufffd" in text) for delta in deltas)


def test_an_incomplete_character_at_the_end_is_shown_once_finished():
    ids = BYTE_LEVEL.encode("a👋")[:-1]
    *deltas, last = stream(Detokenizer(BYTE_LEVEL, []), ids)
    assert "".join(deltas) == "a" and last == "\ufffd"


def stop_at(text, stop, **options):
    """The streamed deltas and the stop string, feeding ``text`` byte by byte."""
    detokenizer = Detokenizer(BYTE_LEVEL, [], stop=stop, **options)
    alphabet = [i for i in range(BYTE_LEVEL.vocab_size) if len(BYTE_LEVEL.token_bytes(i)) == 1]
    by_byte = {BYTE_LEVEL.token_bytes(i): i for i in alphabet}
    deltas = []
    for byte in text.encode():
        found = detokenizer.update([by_byte[bytes([byte])]])
        deltas.append(detokenizer.take(finished=found is not None))
        if found is not None:
            return deltas, found
    detokenizer.finish()
    return [*deltas, detokenizer.take(finished=True)], None


@pytest.mark.smoke
def test_stop_string_across_tokens_is_held_back_and_cut():
    deltas, found = stop_at("one END two", ["END"])
    assert found == "END" and "".join(deltas) == "one "
    assert not any("E" in delta for delta in deltas)
    deltas, found = stop_at("one EN two", ["END"])
    assert found is None and "".join(deltas) == "one EN two"
    deltas, found = stop_at("one END two", ["END"], include_stop=True)
    assert found == "END" and "".join(deltas) == "one END"


def test_the_earliest_stop_string_wins_inside_one_token():
    token = BYTE_LEVEL.encode("<tool call>")
    assert len(token) == 1
    detokenizer = Detokenizer(BYTE_LEVEL, [], stop=["call", "ol"])
    assert detokenizer.update(token) == "ol" and detokenizer.take(finished=True) == "<to"


def test_stop_strings_do_not_count_before_min_tokens():
    assert "".join(stop_at("xx.xx.xx", ["."], min_tokens=3)[0]) == "xx.xx"
    assert "".join(stop_at("xx.xx.xx", ["."], min_tokens=2)[0]) == "xx"


@settings(max_examples=200, deadline=None)
@given(
    st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.booleans()
)
def test_stopping_equals_cutting_the_whole_text(text, stop, include):
    deltas, found = stop_at(text, stop, include_stop=include)
    # The first character at which any stop string is complete; of those complete there, the one that starts first.
    ends = [i for i in range(1, len(text) + 1) if any(text[:i].endswith(s) for s in stop)]
    if not ends:
        assert found is None and "".join(deltas) == text
        return
    expected = max((s for s in stop if text[: ends[0]].endswith(s)), key=len)
    assert found == expected
    assert "".join(deltas) == text[: ends[0] if include else ends[0] - len(expected)]
