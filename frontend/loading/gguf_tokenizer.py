"""Building a tokenizer from a GGUF file's metadata, which hold a vocabulary but no tokenizer.json.

Two kinds are known: "gpt2", byte-level BPE whose way of splitting text is named by ``tokenizer.ggml.pre``; and
"llama", SentencePiece BPE, whose merges follow from the scores of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from distaff.frontend.loading.checkpoint import TokenizerFiles
from distaff.frontend.loading.errors import TokenizerFormatError
from distaff.frontend.loading.gguf_config import end_tokens

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_TEMPLATE = "tokenizer.chat_template"
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_GPT2_STYLE = ("default", "gpt-2", "gpt2")
_DIGITS_APART = ("smollm", "starcoder", "refact")
_LLAMA3_STYLE = ("llama-bpe", "llama3", "llama-v3")
_PATTERNS = dict.fromkeys(_LLAMA3_STYLE, _LLAMA3) | {"qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2, "tekken": _TEKKEN}
_WHOLE_WORDS_FIRST = (*_LLAMA3_STYLE, "tekken")


def tokenizer_of_metadata(metadata: Mapping[str, Any]) -> TokenizerFiles | None:
    """The tokenizer, or None if the file has none; raises `TokenizerFormatError` for kinds that are not known."""
    kind = metadata.get("tokenizer.ggml.model", "none")
    if kind == "none":
        return None
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise TokenizerFormatError(f"tokenizer.ggml.model is {kind!r}; implemented are {', '.join(builders)}")
    vocabulary = _Vocabulary(metadata)
    try:
        tokenizer = builders[kind](vocabulary)
        _add_tokens(tokenizer, vocabulary)
        _add_markers(tokenizer, vocabulary, sentencepiece=kind == "llama")
    except TokenizerFormatError:
        raise
    except Exception as error:  # the package raises bare Exception
        raise TokenizerFormatError(f"the file's tokenizer is damaged: {error}") from error
    eos, bos = end_tokens(metadata), vocabulary.get("bos_token_id")
    generation = {"eos_token_id": list(eos)} | ({} if bos is None else {"bos_token_id": bos})
    return TokenizerFiles(tokenizer.to_str(), _config(metadata, vocabulary), generation)


class _Vocabulary:
    """The fields ``tokenizer.ggml.*``."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata = metadata
        self.tokens: list[str] = self.need("tokens")
        self.types: list[int] = self.get("token_type") or [_NORMAL] * len(self.tokens)
        if len(self.types) != len(self.tokens):
            raise TokenizerFormatError("tokenizer.ggml.token_type and tokenizer.ggml.tokens differ in length")

    def get(self, name: str) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{name}")

    def need(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise TokenizerFormatError(f"the file has a tokenizer but no tokenizer.ggml.{name}")
        return value

    def role(self, name: str) -> str | None:
        """The token that "bos", "eos", "unknown" or "padding" stands for."""
        token_id = self.get(f"{name}_token_id")
        if token_id is None:
            return None
        if not 0 <= token_id < len(self.tokens):
            raise TokenizerFormatError(f"tokenizer.ggml.{name}_token_id is {token_id}, beyond the vocabulary")
        token: str = self.tokens[token_id]
        return token


def _byte_level(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    splitting = vocabulary.get("pre") or "default"
    merges = [_pair(merge) for merge in vocabulary.need("merges")]
    vocab = {token: i for i, token in enumerate(vocabulary.tokens)}
    whole = splitting in _WHOLE_WORDS_FIRST
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole))
    tokenizer.pre_tokenizer = _splitter(splitting)
    tokenizer.decoder = decoders.ByteLevel()
    if _PATTERNS.get(splitting) == _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    left, separator, right = merge.partition(" ")
    if not separator:
        raise TokenizerFormatError(f"tokenizer.ggml.merges holds {merge!r}, which is not two pieces")
    return left, right


def _splitter(splitting: str) -> pre_tokenizers.PreTokenizer:
    """How text is cut before merging; the merges were learned on such pieces."""
    if splitting in _GPT2_STYLE:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if splitting in _DIGITS_APART:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    if splitting in _PATTERNS:
        words = pre_tokenizers.Split(Regex(_PATTERNS[splitting]), behavior="isolated")
        return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    known = ", ".join((*_GPT2_STYLE, *_DIGITS_APART, *_PATTERNS))
    raise TokenizerFormatError(f"tokenizer.ggml.pre is {splitting!r}; implemented are {known}")


def _sentencepiece(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    tokens = [_respell(token) for token in vocabulary.tokens]
    model = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=_merges_of_scores(tokens, vocabulary),
        unk_token=vocabulary.role("unknown"),
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    prefix = vocabulary.get("add_space_prefix") is not False
    visible = normalizers.Replace(" ", _SPACE)
    # SentencePiece's dummy prefix: at the start and after each special token, as llama.cpp and published files have it.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), visible]) if prefix else visible
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(content=" ", left=1)] * prefix)
    return tokenizer


def _respell(token: str) -> str:
    """Runs of spaces are the only tokens that files spell with spaces; text is matched with the visible sign."""
    return _SPACE * len(token) if token and not token.strip(" ") else token


def _merges_of_scores(tokens: Sequence[str], vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """SentencePiece joins the pair whose result has the best score; BPE wants these pairs in order.

    Gemma's scores do not follow its order of merging, which is the order of the vocabulary.
    """
    in_order = str(vocabulary.metadata.get("general.architecture", "")).startswith("gemma")
    scores = range(0, -len(tokens), -1) if in_order else vocabulary.need("scores")
    pieces = {
        token: score
        for token, score, kind in zip(tokens, scores, vocabulary.types, strict=True)
        if kind in (_NORMAL, _USER_DEFINED)
    }
    ranked = [
        (-score, -cut, token[:cut], token[cut:])
        for token, score in pieces.items()
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]
    ranked.sort(key=lambda entry: entry[:2])
    return [(left, right) for _, _, left, right in ranked]


def _add_tokens(tokenizer: tokenizers.Tokenizer, vocabulary: _Vocabulary) -> None:
    """Control and user-defined tokens are found whole in any text, before it is split."""
    for kind in (_CONTROL, _USER_DEFINED):
        special = kind == _CONTROL
        chosen = [t for t, found in zip(vocabulary.tokens, vocabulary.types, strict=True) if found == kind]
        present = [token for token in chosen if tokenizer.token_to_id(token) is not None]
        tokenizer.add_tokens([tokenizers.AddedToken(t, special=special, normalized=False) for t in present])


def _add_markers(tokenizer: tokenizers.Tokenizer, vocabulary: _Vocabulary, sentencepiece: bool) -> None:
    """Puts beginning and end of sequence around a text, where the file says so or llama.cpp does by default."""
    add_bos, add_eos = vocabulary.get("add_bos_token"), vocabulary.get("add_eos_token")
    if add_bos is None:
        add_bos = sentencepiece or vocabulary.get("pre") in _WHOLE_WORDS_FIRST
    bos = vocabulary.role("bos") if add_bos else None
    eos = vocabulary.role("eos") if add_eos else None
    markers = [token for token in (bos, eos) if token is not None]
    if markers:
        single = [bos] * (bos is not None) + ["$A"] + [eos] * (eos is not None)
        pair = single + [part.replace("$A", "$B") for part in single if part is not None]
        ids = [(token, vocabulary.tokens.index(token)) for token in markers]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)


def _config(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(vocabulary.get("add_bos_token")),
    }
    config |= {role: token for role, name in _ROLES.items() if (token := vocabulary.role(name)) is not None}
    default = metadata.get(_TEMPLATE)
    named = [
        {"name": key.removeprefix(f"{_TEMPLATE}."), "template": template}
        for key, template in metadata.items()
        if key.startswith(f"{_TEMPLATE}.")
    ]
    if named:
        config["chat_template"] = [{"name": "default", "template": default}, *named] if default else named
    elif default:
        config["chat_template"] = default
    return config
