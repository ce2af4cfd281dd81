"""What both generation endpoints' answers have in common: envelope, usage, and the order of a stream's chunks."""

from __future__ import annotations

import abc
import dataclasses
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from distaff.runtime.outputs import CompletionOutput, RequestOutput
from distaff.runtime.server.errors import ApiError
from distaff.runtime.server.logprobs import TokenNames
from distaff.runtime.server.output_stream import OutputStream
from distaff.runtime.server.protocol import GenerationRequest

RequestT = TypeVar("RequestT", bound=GenerationRequest)


@dataclasses.dataclass
class Usage:
    """Token counts of one HTTP request, summed over its prompts and choices."""

    prompt: dict[int, int] = dataclasses.field(default_factory=dict)
    cached: dict[int, int] = dataclasses.field(default_factory=dict)
    completion: int = 0

    def add(self, prompt_index: int, output: RequestOutput, prompt_only: bool) -> None:
        """Counts what is new in an output."""
        self.prompt[prompt_index] = len(output.prompt_token_ids)
        self.cached[prompt_index] = output.num_cached_tokens
        if not prompt_only:
            self.completion += sum(len(completion.token_ids) for completion in output.outputs)

    def as_json(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        prompt = sum(self.prompt.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion,
            "total_tokens": prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
        }


class Answer(abc.ABC, Generic[RequestT]):
    """Turns outputs of the engine into the response to one request, whole or as chunks of a stream."""

    object_name: ClassVar[str]
    chunk_object_name: ClassVar[str]

    def __init__(self, request: RequestT, answer_id: str, model: str, names: TokenNames) -> None:
        self.request = request
        self.names = names
        self._envelope = {"id": answer_id, "created": int(time.time()), "model": model}
        self._usage = Usage()

    @abc.abstractmethod
    def choice(self, index: int, prompt_index: int, output: RequestOutput, completion: CompletionOutput) -> Any:
        """A finished choice; ``index`` is its number in the response."""

    @abc.abstractmethod
    def deltas(
        self, index: int, prompt_index: int, output: RequestOutput, completion: CompletionOutput
    ) -> Iterator[dict[str, Any]]:
        """The choice of each chunk that a new piece of a completion needs."""

    def extras(self, output: RequestOutput) -> dict[str, Any]:
        """Further fields of a whole response."""
        return {}

    def response(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The body of a response that is not streamed, from the final output of each prompt."""
        choices: list[Any] = []
        for prompt_index, output in enumerate(outputs):
            self._count(prompt_index, output)
            for completion in sorted(output.outputs, key=lambda completion: completion.index):
                choices.append(self.choice(len(choices), prompt_index, output, completion))
        fields = {"object": self.object_name, "choices": choices, "usage": self._usage.as_json()}
        return self._envelope | fields | self.extras(outputs[0])

    async def chunks(self, outputs: OutputStream) -> AsyncGenerator[dict[str, Any]]:
        """The chunks of a stream; the last one holds the usage if that was asked for."""
        options = self.request.stream_options
        with_usage = options is not None and options.include_usage
        always = with_usage and options is not None and options.continuous_usage_stats
        envelope = self._envelope | {"object": self.chunk_object_name}
        async for prompt_index, output in outputs:
            self._count(prompt_index, output)
            usage = {"usage": self._usage.as_json() if always else None} if with_usage else {}
            for completion in output.outputs:
                index = prompt_index * self.request.n + completion.index
                for delta in self.deltas(index, prompt_index, output, completion):
                    yield envelope | {"choices": [delta]} | usage
        if with_usage:
            yield envelope | {"choices": [], "usage": self._usage.as_json()}

    def _count(self, prompt_index: int, output: RequestOutput) -> None:
        if output.error is not None or any(completion.finish_reason == "error" for completion in output.outputs):
            raise ApiError(500, output.error or "Generation failed.", type="server_error", code="generation_failed")
        self._usage.add(prompt_index, output, self.request.prompt_only)


def ending(completion: CompletionOutput) -> dict[str, Any]:
    """Why a choice ended, null while it goes on; ``stop_reason`` is vLLM's: the stop string or token id."""
    return {"finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason}
