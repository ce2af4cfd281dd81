"""What a request gives back; names of classes and fields as in vLLM's ``outputs``."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

from distaff.runtime.stats import FinishedStats


@dataclasses.dataclass(slots=True)
class Logprob:
    """One candidate token at one position.

    ``logprob`` is its natural-log probability under the model's own distribution, before any sampling parameter;
    ``rank`` counts from 1, the most likely; ``decoded_token`` is its text (None without a tokenizer).
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


# By token id; the token that was sampled (or stood in the prompt) comes first, then the most likely ones in order.
PositionLogprobs: TypeAlias = dict[int, Logprob]
SampleLogprobs: TypeAlias = list[PositionLogprobs]
# One entry a prompt token; the first token follows nothing and has None.
PromptLogprobs: TypeAlias = list[PositionLogprobs | None]


@dataclasses.dataclass(slots=True)
class CompletionOutput:
    """One of the ``n`` completions of a request.

    ``text``, ``token_ids`` and ``logprobs`` hold everything so far, or with ``RequestOutputKind.DELTA`` only what is
    new. ``finish_reason`` is "stop", "length", "abort", "error" or None while running; ``stop_reason`` is the stop
    string or stop token id that ended it (None for end-of-sequence).
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: SampleLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None

    def extend(self, later: CompletionOutput) -> None:
        """Appends a later delta of the same completion."""
        self.text += later.text
        self.token_ids = self.token_ids + later.token_ids
        if later.logprobs:
            self.logprobs = (self.logprobs or []) + later.logprobs
        self.cumulative_logprob = later.cumulative_logprob
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason


@dataclasses.dataclass(slots=True)
class RequestOutput:
    """What one request has produced; see `CompletionOutput` for what is cumulative.

    ``outputs`` holds the completions that changed (DELTA) or all of them; ``finished`` is True in the last one only.
    ``num_cached_tokens`` counts prompt tokens that came from the prefix cache. ``error`` says why a completion ended
    with finish_reason "error". ``metrics`` comes with the last output, one entry a completion.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: PromptLogprobs | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: list[FinishedStats] | None = None
    num_cached_tokens: int = 0
    error: str | None = None

    def add(self, later: RequestOutput, aggregate: bool) -> None:
        """Merges a later output of the same request into this one: deltas if ``aggregate``, else replacing."""
        self.finished = later.finished
        self.metrics = later.metrics or self.metrics
        self.num_cached_tokens = later.num_cached_tokens
        self.error = later.error or self.error
        self.prompt_logprobs = later.prompt_logprobs or self.prompt_logprobs
        place = {output.index: i for i, output in enumerate(self.outputs)}
        for output in later.outputs:
            if output.index not in place:
                self.outputs.append(output)
            elif aggregate:
                self.outputs[place[output.index]].extend(output)
            else:
                self.outputs[place[output.index]] = output
