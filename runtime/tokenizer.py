"""The model's tokenizer, read from the artifact's ``tokenizer/`` folder of Hugging Face files.

``tokenizer.json`` holds the tokenizer proper, ``tokenizer_config.json`` the names of special tokens and the chat
template (which ``chat_template.jinja`` overrides), ``generation_config.json`` further end-of-sequence tokens and the
sampling defaults that the model's authors recommend.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers

from distaff.runtime.chat_template import ChatTemplate, Message
from distaff.runtime.errors import ChatTemplateError, TokenizerError

_SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Text to token ids and back, and conversations to prompts. Safe to use from several threads."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: Mapping[str, Any],
        generation_config: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        """``backend`` with the contents of the JSON files; ``chat_template`` overrides the config's."""
        self._backend = backend
        self._config = config
        self.generation_config: Mapping[str, Any] = generation_config or {}
        self.special_tokens = {r: _token_text(config[r]) for r in _SPECIAL_ROLES if config.get(r) is not None}
        self._templates = _chat_templates(config, chat_template)
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(i for i, token in added.items() if token.special)
        self._added = {i: token.content for i, token in added.items()}
        decoders = _decoder_types(json.loads(backend.to_str())["decoder"])
        self.is_byte_level = decoders == ["ByteLevel"]
        self._has_byte_tokens = "ByteFallback" in decoders

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads a ``tokenizer/`` folder; raises `TokenizerError` naming the file that is missing or damaged."""
        root = Path(folder)
        path = root / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{root} holds no tokenizer.json; compile the model again together with its tokenizer")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise TokenizerError(f"{path} cannot be read: {error}") from error
        template = root / "chat_template.jinja"
        return cls(
            backend,
            _read_json(root / "tokenizer_config.json"),
            _read_json(root / "generation_config.json"),
            template.read_text() if template.is_file() else None,
        )

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def bos_token_id(self) -> int | None:
        """The beginning-of-sequence token, if there is one."""
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The end-of-sequence token, if there is one."""
        return self._special_id("eos_token")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All tokens that end a sequence: the tokenizer's own first, then those of ``generation_config.json``."""
        more = self.generation_config.get("eos_token_id") or ()
        ids = [self.eos_token_id, *([more] if isinstance(more, int) else more)]
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    def _special_id(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self._backend.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. ``add_special_tokens`` adds what the model expects around a prompt (mostly BOS).

        ``add_bos_token`` in ``tokenizer_config.json``, where set, decides over ``tokenizer.json``.
        """
        add_bos = self._config.get("add_bos_token") if add_special_tokens else None
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens and add_bos is not False).ids
        bos = self.bos_token_id
        return [bos, *ids] if add_bos and bos is not None and ids[:1] != [bos] else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_string(self, token_id: int) -> str:
        """The token as the vocabulary spells it; "" for an id past its end (models pad their vocabulary)."""
        return self._backend.id_to_token(token_id) or ""

    @functools.cached_property
    def _token_bytes(self) -> dict[int, bytes]:
        return {}

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, in the middle of a text."""
        known = self._token_bytes.get(token_id)
        if known is None:
            known = self._token_bytes[token_id] = self._find_bytes(token_id)
        return known

    def _find_bytes(self, token_id: int) -> bytes:
        token = self.token_string(token_id)
        if self.is_byte_level:
            values = [_byte_of_char().get(char) for char in token]
            # As the decoder does it, added tokens are bytes where all their characters happen to stand for bytes.
            return token.encode() if None in values else bytes(v for v in values if v is not None)
        if token_id in self._added:
            return token.encode()
        if self._has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    def token_text(self, token_id: int) -> str:
        """The text of one token in the middle of a text; U+FFFD for parts of a character."""
        return self.token_bytes(token_id).decode(errors="replace")

    def get_vocab(self) -> dict[str, int]:
        """Token ids by the vocabulary's spelling, added tokens included."""
        vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return vocabulary

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """`token_string` of each."""
        return [self.token_string(token_id) for token_id in ids]

    def info(self) -> dict[str, Any]:
        """``tokenizer_config.json``, with the class and the added tokens also where that file does not name them."""
        added = {
            str(i): {"content": token.content, "special": token.special}
            for i, token in self._backend.get_added_tokens_decoder().items()
        }
        return {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": added} | dict(self._config)

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` works without being given a template."""
        return bool(self._templates)

    @property
    def chat_template(self) -> str | None:
        """The source of the template that is used by default."""
        return self._templates.get("default")

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt text of a conversation; ``kwargs`` are variables for the template.

        ``chat_template`` is a template's source, or the name of one of the model's. Raises `ChatTemplateError`.
        """
        template = self._compiled(self._template_source(chat_template, tools))
        return template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **kwargs,
        )

    def _template_source(self, wanted: str | None, tools: Sequence[Mapping[str, Any]] | None) -> str:
        if wanted is not None:
            return self._templates.get(wanted, wanted)
        if tools is not None and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" not in self._templates:
            raise ChatTemplateError("the model has no chat template; pass one as chat_template, or send a plain prompt")
        return self._templates["default"]

    def _compiled(self, source: str) -> ChatTemplate:
        return _compile_template(source, tuple(self.special_tokens.items()))


@functools.lru_cache(maxsize=16)
def _compile_template(source: str, special_tokens: tuple[tuple[str, str], ...]) -> ChatTemplate:
    return ChatTemplate(source, dict(special_tokens))


def _read_json(path: Path) -> dict[str, Any]:
    """The file's object; {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise TokenizerError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise TokenizerError(f"{path} holds a {type(data).__name__}; an object was expected")
    return data


def _token_text(token: str | Mapping[str, Any]) -> str:
    """Special tokens are written as text or as an added token's object."""
    return token if isinstance(token, str) else str(token["content"])


def _chat_templates(config: Mapping[str, Any], override: str | None) -> dict[str, str]:
    """Templates by name; a single one is "default"."""
    source = override or config.get("chat_template")
    if not source:
        return {}
    return {"default": source} if isinstance(source, str) else {t["name"]: t["template"] for t in source}


def _decoder_types(decoder: Mapping[str, Any] | None) -> list[str]:
    """The decoder's steps in order."""
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [name for step in decoder["decoders"] for name in _decoder_types(step)]
    return [decoder["type"]]


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-ins: visible Latin-1 characters are their own byte, the others follow from U+0100."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}
