"""From what a request holds (text, token ids, a conversation) to token ids that fit the model."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from distaff.runtime.errors import ChatTemplateError, TokenizerError
from distaff.runtime.server.config import EngineClient, ServerConfig
from distaff.runtime.server.errors import ApiError, bad_request
from distaff.runtime.server.protocol import ChatPrompt, GenerationRequest
from distaff.runtime.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Token ids for the engine, the text that they stand for where it is known, and how many tokens may follow."""

    token_ids: list[int]
    text: str | None
    max_tokens: int


class PromptProcessor:
    """Makes prompts for one engine; tokenising and templates run on worker threads, off the event loop."""

    def __init__(self, engine: EngineClient, config: ServerConfig) -> None:
        self._engine = engine
        self._config = config
        try:
            self.tokenizer: Tokenizer | None = engine.tokenizer
        except TokenizerError:
            self.tokenizer = None
        recommended = self.tokenizer.generation_config if config.use_generation_config and self.tokenizer else {}
        self.model_defaults: Mapping[str, Any] = {**recommended, **config.override_generation_config}
        self._most_tokens: int | None = config.override_generation_config.get("max_new_tokens")

    def tokenizer_for(self, param: str) -> Tokenizer:
        """The model's tokenizer; 400 for the field that needs it if there is none."""
        if self.tokenizer is None:
            raise bad_request(param, "This model has no tokenizer: send token ids as `prompt` of /v1/completions.")
        return self.tokenizer

    async def encode(self, text: str, add_special_tokens: bool, param: str = "prompt") -> list[int]:
        """Token ids of a text."""
        return await asyncio.to_thread(self.tokenizer_for(param).encode, text, add_special_tokens)

    async def chat_text(self, chat: ChatPrompt) -> str:
        """The conversation as the template renders it; 400 if the template cannot."""
        if chat.chat_template is not None and not self._config.trust_request_chat_template:
            raise bad_request(
                "chat_template", "`chat_template` is only taken if the server runs with --trust-request-chat-template."
            )
        render = functools.partial(
            self.tokenizer_for("messages").apply_chat_template,
            chat.messages or (),
            tools=chat.tools,
            add_generation_prompt=chat.opens_answer,
            continue_final_message=chat.continue_final_message,
            chat_template=chat.chat_template or self._config.chat_template,
            **{**self._config.default_chat_template_kwargs, **chat.template_kwargs},
        )
        try:
            return await asyncio.to_thread(render)
        except ChatTemplateError as error:
            raise bad_request("messages", str(error)) from None
        except Exception as error:  # a template is a program: what it does with a client's messages is the client's
            raise bad_request(
                "messages", f"The chat template failed on these messages: {type(error).__name__}: {error}"
            ) from error

    def fitted(self, request: GenerationRequest, token_ids: Sequence[int], text: str | None) -> Prompt:
        """The prompt cut to ``truncate_prompt_tokens`` and with its share of the context; 400 if it does not fit."""
        limit = self._engine.max_model_len
        wanted = 1 if request.prompt_only else request.requested_tokens
        keep = request.truncate_prompt_tokens
        if keep is not None:
            keep = limit - (1 if wanted is None else wanted) if keep == -1 else keep
            if 0 < keep < len(token_ids):
                token_ids, text = (token_ids[:keep] if request.truncation_side == "right" else token_ids[-keep:]), None
        self._check_ids(token_ids)
        if len(token_ids) + (1 if wanted is None else wanted) > limit:
            raise _too_long(limit, len(token_ids), wanted)
        if wanted is None:
            wanted = min(limit - len(token_ids), self.model_defaults.get("max_new_tokens") or limit)
        if self._most_tokens is not None:
            wanted = min(wanted, self._most_tokens)
        return Prompt(list(token_ids), text, wanted)

    def _check_ids(self, token_ids: Sequence[int]) -> None:
        if not token_ids:
            raise bad_request("prompt", "The decoder prompt cannot be empty: it must have at least one token.")
        size = self._engine.manifest.vocab_size
        if max(token_ids) >= size:
            raise bad_request("prompt", f"Token id {max(token_ids)} is out of vocabulary ({size} tokens).")


def _too_long(limit: int, prompt_tokens: int, wanted: int | None) -> ApiError:
    """In vLLM's words, which clients look for to shorten their prompt and try again."""
    if wanted is None or prompt_tokens >= limit:
        message = (
            f"This model's maximum context length is {limit} tokens. However, your request has {prompt_tokens} input "
            "tokens. Please reduce the length of the input messages."
        )
    else:
        message = (
            f"This model's maximum context length is {limit} tokens. However, you requested {wanted} output tokens and "
            f"your prompt contains {prompt_tokens} input tokens, for a total of {prompt_tokens + wanted} tokens. "
            "Please reduce the length of the input prompt or the number of requested output tokens."
        )
    return bad_request("input_tokens", message, "context_length_exceeded")
