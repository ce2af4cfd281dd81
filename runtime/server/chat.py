"""Answers of ``/v1/chat/completions``."""

from __future__ import annotations

from typing import Any

from distaff.runtime.outputs import CompletionOutput, RequestOutput
from distaff.runtime.server.answer import Answer, ending
from distaff.runtime.server.config import ServerConfig
from distaff.runtime.server.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from distaff.runtime.server.protocol import ChatCompletionRequest


class ChatAnswer(Answer[ChatCompletionRequest]):
    """Choices of one message each.

    The message's role is the server's ``response_role``, or that of the last message if the prompt leaves it open;
    then ``echo`` puts that message's text in front.
    """

    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(
        self, request: ChatCompletionRequest, answer_id: str, model: str, names: TokenNames, config: ServerConfig
    ) -> None:
        super().__init__(request, answer_id, model, names, config)
        last = request.messages[-1]
        self._role = config.response_role if request.opens_answer else last["role"]
        self._echoed = last["content"] if request.echo and last["role"] == self._role else ""

    def choice(
        self, index: int, prompt_index: int, output: RequestOutput, completion: CompletionOutput
    ) -> dict[str, Any]:
        """The whole message of a choice."""
        message = {"role": self._role, "content": self._echoed + completion.text, "refusal": None}
        return {"index": index, "message": message, "token_ids": None} | self._details(completion)

    def extras(self, output: RequestOutput) -> dict[str, Any]:
        """What was asked to be told about the prompt."""
        return {
            "prompt_logprobs": prompt_logprobs(output.prompt_logprobs),
            "prompt_token_ids": output.prompt_token_ids if self.request.return_token_ids else None,
        }

    def opening(self, index: int, output: RequestOutput) -> dict[str, Any]:
        """The role, and what is echoed."""
        delta = {"role": self._role, "content": self._echoed}
        opening = {"choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]}
        return opening | ({"prompt_token_ids": output.prompt_token_ids} if self.request.return_token_ids else {})

    def delta(
        self, index: int, prompt_index: int, output: RequestOutput, completion: CompletionOutput, first: bool
    ) -> dict[str, Any]:
        """A piece of text."""
        return {"index": index, "delta": {"content": completion.text}} | self._details(completion)

    def _details(self, completion: CompletionOutput) -> dict[str, Any]:
        logprobs = None
        if self.request.logprobs:
            top = self.request.top_logprobs or 0
            logprobs = chat_logprobs(self.names, completion.token_ids, completion.logprobs or [], top)
        tokens = {"token_ids": completion.token_ids} if self.request.return_token_ids else {}
        return {"logprobs": logprobs} | ending(completion) | tokens
