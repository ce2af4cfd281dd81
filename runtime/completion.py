"""What the engine keeps of a request besides its schedule: the text, log-probabilities and times of its completions.

A request with ``n`` completions is a `RequestGroup` of n `Completion`s, each of them one `Request` to the scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence

from distaff.runtime.detokenizer import Detokenizer
from distaff.runtime.outputs import CompletionOutput, PositionLogprobs, PromptLogprobs, RequestOutput, SampleLogprobs
from distaff.runtime.request import Request
from distaff.runtime.sampling_params import RequestOutputKind, SamplingParams
from distaff.runtime.stats import FinishedStats
from distaff.runtime.tokenizer import Tokenizer


class Completion:
    """One sequence of a request, whose tokens are drawn by ``seed``; ``tokenizer`` None leaves the text empty."""

    def __init__(
        self, group: RequestGroup, index: int, seed: int, request: Request, tokenizer: Tokenizer | None
    ) -> None:
        params = request.sampling_params
        self.group = group
        self.index = index
        self.seed = seed
        self.request = request
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.first_scheduled: float | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.ended: float | None = None
        self._include_stop = params.include_stop_str_in_output
        self._detokenizer = None
        if tokenizer is not None and params.detokenize:
            self._detokenizer = Detokenizer(
                tokenizer,
                request.prompt_token_ids,
                stop=params.stop,
                include_stop=params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
                skip_special_tokens=params.skip_special_tokens,
            )
        self._text = ""
        self._token_ids: list[int] = []
        self._logprobs: SampleLogprobs | None = None if params.logprobs is None else []
        self._cumulative_logprob = None if params.logprobs is None else 0.0
        self._taken = 0

    @property
    def finished(self) -> bool:
        """Whether the sequence has ended."""
        return self.finish_reason is not None

    def add(self, token_ids: Sequence[int], logprobs: PositionLogprobs | None, stopped: bool) -> str | None:
        """Takes over sampled tokens; returns the stop string that they complete.

        ``logprobs`` belong to the token if there is one. A token that ``stopped`` the sequence adds no text unless the
        request wants to see what stopped it.
        """
        self._token_ids += token_ids
        if self._logprobs is not None and logprobs is not None:
            self._logprobs.append(logprobs)
            self._cumulative_logprob = (self._cumulative_logprob or 0) + next(iter(logprobs.values())).logprob
        if self._detokenizer is None:
            return None
        return self._detokenizer.update(token_ids[:-1] if stopped and not self._include_stop else token_ids)

    def end(self, now: float, finish_reason: str, stop_reason: int | str | None, error: str | None) -> None:
        """Ends the sequence; a ``stop_reason`` that is a string has cut its text already."""
        self.ended, self.finish_reason, self.stop_reason, self.error = now, finish_reason, stop_reason, error
        if self._detokenizer is not None and not isinstance(stop_reason, str):
            self._detokenizer.finish()

    def output(self, delta: bool) -> CompletionOutput:
        """What there is to show: all so far, or with ``delta`` what came since the last call."""
        new_text = "" if self._detokenizer is None else self._detokenizer.take(self.finished)
        self._text += new_text
        since = self._taken if delta else 0
        self._taken = len(self._token_ids)
        return CompletionOutput(
            index=self.index,
            text=new_text if delta else self._text,
            token_ids=self._token_ids[since:],
            cumulative_logprob=self._cumulative_logprob,
            logprobs=None if self._logprobs is None else self._logprobs[since:],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def stats(self) -> FinishedStats:
        """Measurements of the ended sequence."""
        assert self.ended is not None and self.finish_reason is not None, "it has not ended"
        request, tokens = self.request, len(self._token_ids)
        decode = _between(self.first_token, self.last_token)
        return FinishedStats(
            finish_reason=self.finish_reason,
            prompt_tokens=len(request.prompt_token_ids),
            generation_tokens=tokens,
            cached_tokens=request.num_cached_tokens,
            queue_seconds=_between(request.arrival_time, self.first_scheduled),
            prefill_seconds=_between(self.first_scheduled, self.first_token),
            decode_seconds=decode,
            e2e_seconds=self.ended - request.arrival_time,
            time_to_first_token=_between(request.arrival_time, self.first_token),
            mean_inter_token_latency=None if decode is None or tokens < 2 else decode / (tokens - 1),
            n=self.group.params.n,
            max_tokens=request.sampling_params.max_tokens,
            preemptions=request.num_preemptions,
        )


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


class RequestGroup:
    """A request as its caller knows it. ``params`` are the caller's; ``deadline`` is on `time.monotonic`'s clock."""

    def __init__(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, deadline: float | None
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.deadline = deadline
        self.completions: list[Completion] = []
        self._prompt_token_ids = prompt_token_ids
        self._prompt_logprobs: PromptLogprobs | None = None
        if params.prompt_logprobs is not None:
            self._prompt_logprobs = [None] * len(prompt_token_ids)

    @property
    def finished(self) -> bool:
        """Whether all completions have ended."""
        return all(completion.finished for completion in self.completions)

    def set_prompt_logprobs(self, position: int, values: Sequence[PositionLogprobs]) -> None:
        """Log-probabilities of the prompt's tokens from ``position`` on."""
        if self._prompt_logprobs is not None:
            self._prompt_logprobs[position : position + len(values)] = values

    def output(self, changed: Sequence[Completion]) -> RequestOutput | None:
        """What the caller gets after ``changed`` have grown or ended; None if it only wants the end."""
        kind, finished = self.params.output_kind, self.finished
        if kind == RequestOutputKind.FINAL_ONLY and not finished:
            return None
        delta = kind == RequestOutputKind.DELTA
        shown = changed if delta else self.completions
        result = RequestOutput(
            request_id=self.request_id,
            prompt=None,
            prompt_token_ids=self._prompt_token_ids,
            prompt_logprobs=self._prompt_logprobs,
            outputs=[completion.output(delta) for completion in shown],
            finished=finished,
            metrics=[completion.stats() for completion in self.completions] if finished else None,
            num_cached_tokens=self.completions[0].request.num_cached_tokens,
            error=next((completion.error for completion in shown if completion.error), None),
        )
        if delta and self._prompt_logprobs:
            self._prompt_logprobs = []  # deltas show them once
        return result
