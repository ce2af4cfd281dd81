"""Answers of ``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from distaff.runtime.outputs import CompletionOutput, RequestOutput
from distaff.runtime.server.answer import Answer, ending
from distaff.runtime.server.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from distaff.runtime.server.protocol import ChatCompletionRequest


class ChatAnswer(Answer[ChatCompletionRequest]):
    """Choices of one message each.

    The message's role is the assistant's, or that of the last message if the prompt leaves it open; then ``echo`` puts
    that message's text in front.
    """

    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(self, request: ChatCompletionRequest, answer_id: str, model: str, names: TokenNames) -> None:
        super().__init__(request, answer_id, model, names)
        last = request.messages[-1]
        self._role = "assistant" if request.opens_answer else last["role"]
        self._echoed = last["content"] if request.echo and last["role"] == self._role else ""
        self._opened: set[int] = set()  # choices

    def choice(
        self, index: int, prompt_index: int, output: RequestOutput, completion: CompletionOutput
    ) -> dict[str, Any]:
        """The whole message of a choice."""
        message = {"role": self._role, "content": self._echoed + completion.text, "refusal": None}
        return {"index": index, "message": message} | self._details(completion)

    def extras(self, output: RequestOutput) -> dict[str, Any]:
        """What was asked to be told about the prompt."""
        fields: dict[str, Any] = {"prompt_logprobs": prompt_logprobs(output.prompt_logprobs)}
        return fields | ({"prompt_token_ids": output.prompt_token_ids} if self.request.return_token_ids else {})

    def deltas(
        self, index: int, prompt_index: int, output: RequestOutput, completion: CompletionOutput
    ) -> Iterator[dict[str, Any]]:
        """First the role (and what is echoed), then the text piece by piece."""
        if index not in self._opened:
            self._opened.add(index)
            delta = {"role": self._role, "content": self._echoed}
            opening = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            yield opening | ({"prompt_token_ids": output.prompt_token_ids} if self.request.return_token_ids else {})
        delta = {"content": completion.text} if completion.text or not completion.finish_reason else {}
        yield {"index": index, "delta": delta} | self._details(completion)

    def _details(self, completion: CompletionOutput) -> dict[str, Any]:
        logprobs = None
        if self.request.logprobs:
            top = self.request.top_logprobs or 0
            logprobs = chat_logprobs(self.names, completion.token_ids, completion.logprobs or [], top)
        tokens = {"token_ids": completion.token_ids} if self.request.return_token_ids else {}
        return {"logprobs": logprobs} | ending(completion) | tokens
