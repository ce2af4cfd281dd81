"""Answers of ``/v1/completions``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distaff.runtime.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from distaff.runtime.server.answer import Answer, ending
from distaff.runtime.server.config import ServerConfig
from distaff.runtime.server.logprobs import TokenNames, completion_logprobs, prompt_logprobs
from distaff.runtime.server.protocol import CompletionRequest


class CompletionAnswer(Answer[CompletionRequest]):
    """Choices of text; with ``echo`` each begins with its prompt, whose texts are ``prompt_texts``."""

    object_name = "text_completion"
    chunk_object_name = "text_completion"

    def __init__(
        self,
        request: CompletionRequest,
        answer_id: str,
        model: str,
        names: TokenNames,
        config: ServerConfig,
        prompt_texts: Sequence[str],
    ) -> None:
        super().__init__(request, answer_id, model, names, config)
        self._prompt_texts = prompt_texts
        self._named_characters: dict[int, int] = {}  # by choice

    def choice(
        self, index: int, prompt_index: int, output: RequestOutput, completion: CompletionOutput
    ) -> dict[str, Any]:
        """The whole text of a choice."""
        return self.delta(index, prompt_index, output, completion, True) | {
            "prompt_logprobs": None if self.request.prompt_logprobs is None else prompt_logprobs(output.prompt_logprobs)
        }

    def delta(
        self, index: int, prompt_index: int, output: RequestOutput, completion: CompletionOutput, first: bool
    ) -> dict[str, Any]:
        """A piece of text; the first one has the echoed prompt in front."""
        text, token_ids = completion.text, completion.token_ids
        positions: list[PositionLogprobs | None] = [*(completion.logprobs or ())]
        if self.request.prompt_only:
            text, token_ids, positions = "", [], []
        piece: dict[str, Any] = {"index": index, "prompt_token_ids": None, "token_ids": None}
        if self.request.return_token_ids:
            piece |= {"prompt_token_ids": output.prompt_token_ids if first else None, "token_ids": token_ids}
        if self.request.echo and first:
            text = self._prompt_texts[prompt_index] + text
            token_ids = output.prompt_token_ids + token_ids
            positions = [*(output.prompt_logprobs or ()), *positions]
        logprobs = None
        if self.request.logprobs is not None:
            offset = self._named_characters.get(index, 0)
            logprobs = completion_logprobs(self.names, token_ids, positions, self.request.logprobs, offset)
            self._named_characters[index] = offset + sum(map(len, logprobs["tokens"]))
        return piece | {"text": text, "logprobs": logprobs} | ending(completion)
