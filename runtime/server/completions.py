"""Answers of ``/v1/completions``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from distaff.runtime.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from distaff.runtime.server.answer import Answer, ending
from distaff.runtime.server.logprobs import TokenNames, completion_logprobs, prompt_logprobs
from distaff.runtime.server.protocol import CompletionRequest


class CompletionAnswer(Answer[CompletionRequest]):
    """Choices of text; with ``echo`` each begins with its prompt, whose texts are ``prompt_texts``."""

    object_name = "text_completion"
    chunk_object_name = "text_completion"

    def __init__(
        self, request: CompletionRequest, answer_id: str, model: str, names: TokenNames, prompt_texts: Sequence[str]
    ) -> None:
        super().__init__(request, answer_id, model, names)
        self._prompt_texts = prompt_texts
        self._sent_characters: dict[int, int] = {}  # by choice

    def choice(
        self, index: int, prompt_index: int, output: RequestOutput, completion: CompletionOutput
    ) -> dict[str, Any]:
        """The whole text of a choice."""
        return self._piece(index, prompt_index, output, completion) | {
            "prompt_logprobs": None if self.request.prompt_logprobs is None else prompt_logprobs(output.prompt_logprobs)
        }

    def deltas(
        self, index: int, prompt_index: int, output: RequestOutput, completion: CompletionOutput
    ) -> Iterator[dict[str, Any]]:
        """One chunk for each piece."""
        yield self._piece(index, prompt_index, output, completion)

    def _piece(
        self, index: int, prompt_index: int, output: RequestOutput, completion: CompletionOutput
    ) -> dict[str, Any]:
        first = index not in self._sent_characters
        offset = self._sent_characters.get(index, 0)
        text, token_ids = completion.text, completion.token_ids
        positions: list[PositionLogprobs | None] = [*(completion.logprobs or ())]
        if self.request.prompt_only:
            text, token_ids, positions = "", [], []
        piece: dict[str, Any] = {"index": index}
        if self.request.return_token_ids:
            piece |= {"prompt_token_ids": output.prompt_token_ids if first else None, "token_ids": token_ids}
        if self.request.echo and first:
            text = self._prompt_texts[prompt_index] + text
            token_ids = output.prompt_token_ids + token_ids
            positions = [*(output.prompt_logprobs or ()), *positions]
        self._sent_characters[index] = offset + len(text)
        top = self.request.logprobs
        logprobs = None if top is None else completion_logprobs(self.names, token_ids, positions, top, offset)
        return piece | {"text": text, "logprobs": logprobs} | ending(completion)
