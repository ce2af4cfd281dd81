"""Tokenizers built from GGUF metadata, against SentencePiece's rule written out, transformers, and known splittings."""

from __future__ import annotations

import functools
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff.frontend.loading import TokenizerFormatError
from distaff.frontend.loading.gguf_tokenizer import tokenizer_of_metadata

tokenizers = pytest.importorskip("tokenizers")

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
PIECE = "\N{LOWER ONE EIGHTH BLOCK}"


def build(metadata):
    """The tokenizer of ``tokenizer.ggml.*`` fields and what comes with it."""
    full = {k if k.startswith(("tokenizer.", "general.")) else f"tokenizer.ggml.{k}": v for k, v in metadata.items()}
    return tokenizer_of_metadata(full)


def backend(metadata):
    return tokenizers.Tokenizer.from_str(build(metadata).tokenizer)


# -- byte-level BPE

CORPUS = [
    "the quick brown fox doesn't jump 12345 times",
    "I'LL see 3.14\n\n  def f(x):\n    return x",
    "été ÉTÉ 中文",
] * 4


@functools.cache
def byte_level_vocabulary():
    """Tokens and merges learned from the corpus on GPT-2's splitting, and two tokens that no merge makes."""
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    learner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(
        CORPUS, tokenizers.trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(learner.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return [*tokens, "<|bos|>", "<|eot_id|>", "<think>"], [" ".join(merge) for merge in model["merges"]]


def byte_level(**changes):
    tokens, merges = byte_level_vocabulary()
    types = [NORMAL] * (len(tokens) - 3) + [CONTROL, CONTROL, USER_DEFINED]
    fields = {
        "model": "gpt2",
        "pre": "default",
        "tokens": tokens,
        "merges": merges,
        "token_type": types,
        "bos_token_id": len(tokens) - 3,
        "eos_token_id": len(tokens) - 2,
    }
    return {k: v for k, v in (fields | changes).items() if v is not None}


TEXTS = st.text(max_size=40) | st.lists(
    st.sampled_from(["the", " fox", "12345", " 3.14", "\n", "\n\n", "  ", " ", "'ll", "I'LL", "é", "ÉT", "中", "f("]),
    max_size=10,
).map("".join)


@pytest.mark.parametrize("pre", ["default", "llama-bpe", "qwen2", "tekken"])
def test_splittings_are_those_of_transformers(pre):
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    fields = byte_level(pre=pre)
    names = {"model": "tokenizer_type", "pre": "pre_tokenizer_type"}
    theirs, _ = mapping.convert_gguf_tokenizer("llama", {names.get(k, k): v for k, v in fields.items()})
    ours = backend(fields)

    @settings(max_examples=150, deadline=None)
    @given(TEXTS)
    def check(text):
        import unicodedata

        text = unicodedata.normalize("NFC", text)
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False).ids

    check()


@pytest.mark.smoke
@pytest.mark.parametrize(
    "pre, text, pieces",
    [
        ("default", "a  12345 b", ["a", "Ġ", "Ġ12345", "Ġb"]),
        ("smollm", "a  12345 b", ["a", "ĠĠ", "1", "2", "3", "4", "5", "Ġb"]),
        ("llama-bpe", "a  12345 b", ["a", "Ġ", "Ġ", "123", "45", "Ġb"]),
        ("qwen2", "a  12 b", ["a", "Ġ", "Ġ", "1", "2", "Ġb"]),
        ("default", "I'LL\n\nx", ["I", "'", "LL", "Ċ", "Ċ", "x"]),
        ("llama-bpe", "I'LL\n\nx", ["I", "'LL", "ĊĊ", "x"]),
        ("tekken", "fooBar/\n", ["foo", "Bar", "/Ċ"]),
    ],
)
def test_how_text_is_cut(pre, text, pieces):
    assert [piece for piece, _ in backend(byte_level(pre=pre)).pre_tokenizer.pre_tokenize_str(text)] == pieces


@pytest.mark.smoke
@settings(max_examples=100, deadline=None)
@given(text=TEXTS, pre=st.sampled_from(["default", "smollm", "llama-bpe", "tekken"]))
def test_byte_level_text_comes_back(text, pre):
    tokenizer = _cached_backend(pre)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


@functools.cache
def _cached_backend(pre):
    return backend(byte_level(pre=pre))


@pytest.mark.smoke
def test_qwen_composes_characters():
    tokenizer = backend(byte_level(pre="qwen2"))
    assert tokenizer.encode("e\u0301te\u0301").ids == tokenizer.encode("été").ids


@pytest.mark.smoke
def test_words_of_the_vocabulary_come_whole_where_the_original_has_it_so():
    tokens, _ = byte_level_vocabulary()
    fields = dict(tokens=[*tokens, "zzz"], token_type=[NORMAL] * (len(tokens) + 1), add_bos_token=False)
    assert backend(byte_level(pre="llama-bpe", **fields)).encode("zzz").tokens == ["zzz"]
    assert backend(byte_level(pre="default", **fields)).encode("zzz").tokens == ["z", "z", "z"]


@pytest.mark.smoke
def test_control_and_user_defined_tokens_stay_whole():
    tokenizer = backend(byte_level())
    encoded = tokenizer.encode("the<|eot_id|><think>fox")
    assert [t for t in encoded.tokens if t[0] == "<"] == ["<|eot_id|>", "<think>"]
    assert tokenizer.decode(encoded.ids) == "the<think>fox"
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == "the<|eot_id|><think>fox"


@pytest.mark.smoke
@pytest.mark.parametrize(
    "changes, before, after",
    [
        (dict(), [], []),
        (dict(add_bos_token=True), ["<|bos|>"], []),
        (dict(add_bos_token=True, add_eos_token=True), ["<|bos|>"], ["<|eot_id|>"]),
        (dict(pre="llama-bpe"), ["<|bos|>"], []),
        (dict(pre="llama-bpe", add_bos_token=False), [], []),
        (dict(pre="llama-bpe", bos_token_id=None), [], []),
    ],
)
def test_beginning_and_end_of_sequence(changes, before, after):
    tokenizer = backend(byte_level(**changes))
    plain = tokenizer.encode("the", add_special_tokens=False).tokens
    assert tokenizer.encode("the").tokens == [*before, *plain, *after]
    assert tokenizer.encode("the", "the").tokens == [*before, *plain, *after] * 2


@pytest.mark.smoke
def test_files_that_go_with_it(tmp_path):
    fields = byte_level(eos_token_id=None) | {"tokenizer.chat_template": "{{ messages }}"}
    files = build(fields)
    files.save(tmp_path / "new")
    config = json.loads((tmp_path / "new/tokenizer_config.json").read_text())
    assert config["bos_token"] == "<|bos|>" and "eos_token" not in config
    assert config["chat_template"] == "{{ messages }}"
    bos = fields["bos_token_id"]
    generation = json.loads((tmp_path / "new/generation_config.json").read_text())
    assert generation == {"bos_token_id": bos, "eos_token_id": [bos + 1]}  # <|eot_id|> ends a turn by its name
    named = build(fields | {"tokenizer.chat_template.tool_use": "tools"}).config["chat_template"]
    assert named == [{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": "tools"}]


# -- SentencePiece

SCORED = {"the": -1.0, f"{PIECE}the": -2.0, "th": -3.0, "he": -0.5, "er": -4.0, f"{PIECE}t": -2.5, "hehe": -6.0}
SCORED |= {PIECE + PIECE: -5.0, "ab": -7.0, "bc": -6.5, "abc": -8.0, "aa": -9.0, "aaa": -9.5, "aaaa": -10.0}
LETTERS = {letter: -20.0 - i for i, letter in enumerate(f"{PIECE}therabcxé")}
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece(**changes):
    pieces = SCORED | LETTERS
    fields = {
        "model": "llama",
        "tokens": [*SPECIAL, *BYTES, *pieces, "<|tool|>"],
        "scores": [0.0] * 259 + list(pieces.values()) + [0.0],
        "token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces) + [USER_DEFINED],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {k: v for k, v in (fields | changes).items() if v is not None}


def merge_by_score(text):
    """SentencePiece's rule: of all neighbours join those that make the piece of the best score, leftmost first."""
    symbols = list(PIECE + text.replace(" ", PIECE)) if text else []
    while True:
        joins = [(SCORED.get(a + b), -i) for i, (a, b) in enumerate(itertools.pairwise(symbols))]
        joins = [join for join in joins if join[0] is not None]
        if not joins:
            break
        at = -max(joins)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    known = SCORED | LETTERS
    return [p for s in symbols for p in ([s] if s in known else [f"<0x{byte:02X}>" for byte in s.encode()])]


@pytest.mark.smoke
@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="therabcx é\n🙂<0A>", max_size=30))
def test_pieces_are_joined_by_score(text):
    tokenizer = _cached_sentencepiece()
    encoded = tokenizer.encode(text, add_special_tokens=False)
    assert encoded.tokens == merge_by_score(text)
    assert tokenizer.decode(encoded.ids) == text


@functools.cache
def _cached_sentencepiece():
    return backend(sentencepiece())


def test_sentencepiece_as_in_transformers():
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    fields = sentencepiece()
    theirs, _ = mapping.convert_gguf_tokenizer("llama", {"model": "", **fields, "tokenizer_type": "llama"})

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.sampled_from(["the", " ", "  ", "é", "\n", "abc", "aaaaaa", "Z"])).map("".join))
    def check(text):
        text = text.lstrip(" ")  # transformers leaves out the prefix here and after special tokens
        ours = _cached_sentencepiece()
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == theirs.decode(ids)

    check()


@pytest.mark.smoke
def test_sentencepiece_markers_and_prefix():
    assert _cached_sentencepiece().encode("the").tokens == ["<s>", f"{PIECE}the"]
    bare = backend(sentencepiece(add_space_prefix=False, add_bos_token=False))
    assert bare.encode("the").tokens == ["the"]
    after_special = _cached_sentencepiece().encode("<s>the<|tool|>abc", add_special_tokens=False).tokens
    assert after_special == ["<s>", f"{PIECE}the", "<|tool|>", PIECE, "abc"]
    assert bare.decode(bare.encode(" the").ids) == " the"


@pytest.mark.smoke
def test_gemma_joins_in_the_order_of_its_vocabulary_and_spells_spaces():
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *BYTES, "\n", "  ", "ab", "bc", "abc", PIECE, "a", "b", "c"]
    types = [CONTROL, CONTROL, CONTROL, UNKNOWN] + [BYTE] * 256 + [USER_DEFINED, USER_DEFINED] + [NORMAL] * 7
    scores = [0.0] * 262 + [-9.0, -1.0, -8.0] + [-10.0] * 4  # were they heeded, "bc" would come first
    fields = sentencepiece(tokens=tokens, token_type=types, scores=scores, unknown_token_id=3, bos_token_id=2)
    fields |= {"general.architecture": "gemma2", "add_space_prefix": False}
    encoded = backend(fields).encode("abc  \nab")
    assert encoded.tokens == ["<bos>", "abc", PIECE * 2, "\n", "ab"]
    assert backend(fields).decode(encoded.ids) == "abc  \nab"


# -- refusals


@pytest.mark.smoke
def test_no_tokenizer():
    assert tokenizer_of_metadata({}) is None
    assert build({"model": "none"}) is None


@pytest.mark.smoke
@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(model="bert"), "'bert'; implemented are gpt2, llama"),
        (byte_level(pre="martian"), r"pre is 'martian'; implemented are default.*llama-bpe"),
        (byte_level(tokens=None), r"no tokenizer\.ggml\.tokens"),
        (byte_level(merges=None), r"no tokenizer\.ggml\.merges"),
        (byte_level(merges=["ab"]), "'ab', which is not two pieces"),
        (byte_level(merges=["neither nor"]), "damaged"),
        (byte_level(token_type=[1]), "differ in length"),
        (byte_level(bos_token_id=10**6), "beyond the vocabulary"),
        (sentencepiece(scores=None), r"no tokenizer\.ggml\.scores"),
    ],
)
def test_tokenizers_that_are_refused(fields, words):
    with pytest.raises(TokenizerFormatError, match=words):
        build(fields)
