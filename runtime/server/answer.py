"""What both generation endpoints' answers have in common: envelope, usage, and the order of a stream's chunks."""

from __future__ import annotations

import abc
import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from distaff.runtime.outputs import CompletionOutput, RequestOutput
from distaff.runtime.server.config import ServerConfig
from distaff.runtime.server.errors import ApiError
from distaff.runtime.server.logprobs import TokenNames
from distaff.runtime.server.output_stream import OutputStream
from distaff.runtime.server.protocol import GenerationRequest

RequestT = TypeVar("RequestT", bound=GenerationRequest)


@dataclasses.dataclass
class Usage:
    """Token counts of one HTTP request, summed over its prompts and choices; cached ones are told ``with_details``."""

    with_details: bool
    prompt: dict[int, int] = dataclasses.field(default_factory=dict)
    cached: dict[int, int] = dataclasses.field(default_factory=dict)
    completion: int = 0

    def add_prompt(self, prompt_index: int, output: RequestOutput) -> None:
        """Counts the prompt of an output."""
        self.prompt[prompt_index] = len(output.prompt_token_ids)
        self.cached[prompt_index] = output.num_cached_tokens

    def as_json(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        prompt = sum(self.prompt.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion,
            "total_tokens": prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())} if self.with_details else None,
        }


class Answer(abc.ABC, Generic[RequestT]):
    """Turns outputs of the engine into the response to one request, whole or as chunks of a stream."""

    object_name: ClassVar[str]
    chunk_object_name: ClassVar[str]

    def __init__(self, request: RequestT, answer_id: str, model: str, names: TokenNames, config: ServerConfig) -> None:
        self.request = request
        self.names = names
        self._envelope = {"id": answer_id, "created": int(time.time()), "model": model}
        self._usage = Usage(config.enable_prompt_tokens_details)
        options = request.stream_options
        forced = config.enable_force_include_usage
        self._with_usage = forced or (options is not None and options.include_usage)
        self._usage_always = forced or (options is not None and options.continuous_usage_stats)
        self._opened: set[int] = set()  # choices of a stream

    @abc.abstractmethod
    def choice(self, index: int, prompt_index: int, output: RequestOutput, completion: CompletionOutput) -> Any:
        """A finished choice; ``index`` is its number in the response."""

    @abc.abstractmethod
    def delta(
        self, index: int, prompt_index: int, output: RequestOutput, completion: CompletionOutput, first: bool
    ) -> dict[str, Any]:
        """A new piece of a choice in a stream, the ``first`` or a later one."""

    def opening(self, index: int, output: RequestOutput) -> dict[str, Any] | None:
        """Fields of a chunk that goes before the first piece of a choice."""
        return None

    def extras(self, output: RequestOutput) -> dict[str, Any]:
        """Further fields of a whole response."""
        return {}

    def response(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The body of a response that is not streamed, from the final output of each prompt."""
        choices: list[Any] = []
        for prompt_index, output in enumerate(outputs):
            self._take(prompt_index, output)
            for completion in sorted(output.outputs, key=lambda completion: completion.index):
                self._count(completion)
                choices.append(self.choice(len(choices), prompt_index, output, completion))
        fields: dict[str, Any] = {"object": self.object_name, "choices": choices, "usage": self._usage.as_json()}
        fields |= {"service_tier": None, "system_fingerprint": None}
        return self._envelope | fields | self.extras(outputs[0])

    async def chunks(self, outputs: OutputStream) -> AsyncGenerator[dict[str, Any]]:
        """The chunks of a stream; the last one holds the usage if that was asked for."""
        envelope = self._envelope | {"object": self.chunk_object_name}
        async for prompt_index, output in outputs:
            self._take(prompt_index, output)
            for completion in output.outputs:
                index = prompt_index * self.request.n + completion.index
                first = index not in self._opened
                self._opened.add(index)
                if first and (opening := self.opening(index, output)) is not None:
                    yield envelope | opening | self._chunk_usage()
                self._count(completion)
                delta = self.delta(index, prompt_index, output, completion, first)
                yield envelope | {"choices": [delta]} | self._chunk_usage()
        if self._with_usage:
            yield envelope | {"choices": [], "usage": self._usage.as_json()}

    def _chunk_usage(self) -> dict[str, Any]:
        if not self._with_usage:
            return {}
        return {"usage": self._usage.as_json() if self._usage_always else None}

    def _take(self, prompt_index: int, output: RequestOutput) -> None:
        if output.error is not None or any(completion.finish_reason == "error" for completion in output.outputs):
            message = f"Internal server error: {output.error or 'generation failed'}"
            raise ApiError(500, message, type="server_error", code="generation_failed")
        self._usage.add_prompt(prompt_index, output)

    def _count(self, completion: CompletionOutput) -> None:
        if not self.request.prompt_only:
            self._usage.completion += len(completion.token_ids)


def ending(completion: CompletionOutput) -> dict[str, Any]:
    """Why a choice ended, null while it goes on; ``stop_reason`` is vLLM's: the stop string or token id."""
    return {"finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason}
