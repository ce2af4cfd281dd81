"""Carries out what the scheduler planned: builds the batch, runs the model, samples, and reads the results back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from distaff.compiler.artifact import Manifest, ProgramSpec
from distaff.kernels.paged_attention import StepBatch
from distaff.kernels.sampling import INVALID_TOKEN, TokenLogprobs
from distaff.runtime.input_batch import Indices, InputBatch
from distaff.runtime.model_runner import ModelRunner
from distaff.runtime.outputs import Logprob, PositionLogprobs
from distaff.runtime.request import Request
from distaff.runtime.sampling import Method, Sampler
from distaff.runtime.scheduler import SchedulerConfig
from distaff.runtime.step_plan import ScheduledRequest


@dataclasses.dataclass
class StepResult:
    """What a step produced, by the scheduler's request ids."""

    tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    invalid: list[str] = dataclasses.field(default_factory=list)  # no token could be sampled
    logprobs: dict[str, PositionLogprobs] = dataclasses.field(default_factory=dict)
    # First position and the log-probabilities of the prompt tokens from there on.
    prompt_logprobs: dict[str, tuple[int, list[PositionLogprobs]]] = dataclasses.field(default_factory=dict)


class StepExecutor:
    """Owns the device side of an engine: model runner, input batch and sampler.

    ``seed_of`` gives the 64-bit seed of a request by its id, ``token_text`` the text of a token for log-probabilities
    (None: leave it out).
    """

    def __init__(
        self,
        runner: ModelRunner,
        manifest: Manifest,
        limits: SchedulerConfig,
        *,
        max_logprobs: int,
        seed_of: Callable[[str], int],
        token_text: Callable[[int], str] | None,
    ) -> None:
        self._runner = runner
        self._programs = manifest.programs
        self._seed_of = seed_of
        self._token_text = token_text
        self._batch = InputBatch(
            limits.max_num_seqs, limits.max_model_len, manifest.page_size, manifest.pages_per_request
        )
        self._sampler = Sampler(manifest.vocab_size, limits.max_num_seqs, max_logprobs, runner.executables)

    def warm_up(self) -> None:
        """Compiles every program that is not stored yet, the sampler's first."""
        sampling = {p.samples for p in self._programs if p.samples <= p.requests}
        self._sampler.warm_up(sampling, {p.samples for p in self._programs} - sampling)
        self._runner.warm_up()

    @property
    def rows_in_use(self) -> int:
        """Number of requests that have a row."""
        return len(self._batch)

    def release(self, request_id: str) -> None:
        """Forgets a request that ended or was preempted."""
        self._batch.release(request_id)

    def execute(self, scheduled: Sequence[ScheduledRequest]) -> StepResult:
        """Runs one step and waits for its results."""
        rows = np.array([self._row(s) for s in scheduled], np.int32)
        starts = np.array([s.start for s in scheduled], np.int32)
        lengths = np.array([s.num_tokens for s in scheduled], np.int32)
        lasts = np.cumsum(lengths, dtype=np.int32) - 1
        sampling = [i for i, s in enumerate(scheduled) if s.samples]
        scored = [i for i, s in enumerate(scheduled) if _scored_length(s) > 0]
        result = StepResult()
        if sampling or not scored:
            program = self._runner.bucket(int(lengths.sum()), len(rows), len(sampling))
            batch = self._batch.build(program, rows, starts, lengths, lasts[sampling])
            if sampling:
                self._sample(program, batch, [scheduled[i] for i in sampling], rows[sampling], result)
            else:
                self._runner.execute(program, batch)
        if scored:
            self._score(scheduled, scored, rows, starts, lengths, result)
        return result

    def _row(self, scheduled: ScheduledRequest) -> int:
        """The request's row with its pages; a request without one is new or comes back from preemption."""
        request = scheduled.request
        row = self._batch.row_of(request.request_id)
        if row is None:
            row = self._admit(request)
        self._batch.extend_table(row, request.page_ids)
        return row

    def _admit(self, request: Request) -> int:
        row = self._batch.admit(request.request_id, request.token_ids)
        self._sampler.admit(row, request, self._seed_of(request.request_id))
        return row

    def _sample(
        self,
        program: ProgramSpec,
        batch: StepBatch,
        scheduled: Sequence[ScheduledRequest],
        rows: Indices,
        result: StepResult,
    ) -> None:
        """Runs the step; of each row of ``scheduled`` it samples the next token."""
        for row, s in zip(rows.tolist(), scheduled, strict=True):
            if s.request.bad_words:
                self._sampler.forbid(row, s.request)
        positions = np.array([s.start + s.num_tokens for s in scheduled], np.int32)
        prompts = np.array([s.request.num_prompt_tokens for s in scheduled], np.int32)
        method, parameters = self._sampler.parameters(program.samples, rows, positions - prompts)
        logits, on_device = self._runner.execute(program, batch, parameters)
        if method == Method.STATEFUL:
            on_device = self._sampler.sample_with_state(logits, parameters)
        wanted = [s.request.sampling_params.logprobs for s in scheduled]
        logprobs = None
        if any(count is not None for count in wanted):
            logprobs = _on_host(self._sampler.logprobs(logits, on_device))
        tokens = np.asarray(on_device)[: len(rows)]
        self._batch.append(rows, positions, tokens)
        for i, (s, token) in enumerate(zip(scheduled, tokens.tolist(), strict=True)):
            if token == INVALID_TOKEN:
                result.invalid.append(s.request.request_id)
                continue
            result.tokens[s.request.request_id] = token
            count = wanted[i]
            if logprobs is not None and count is not None:
                result.logprobs[s.request.request_id] = self._position(logprobs, i, token, count, s.request)

    def _score(
        self,
        scheduled: Sequence[ScheduledRequest],
        scored: Sequence[int],
        rows: Indices,
        starts: Indices,
        lengths: Indices,
        result: StepResult,
    ) -> None:
        """Log-probabilities of prompt tokens: the logits of each position say how likely the next token was.

        The step is run once more for them, which writes what is there already, so that sampling keeps its few shapes.
        """
        counts = [_scored_length(scheduled[i]) for i in scored]
        firsts = np.cumsum(lengths) - lengths
        indices = np.concatenate([firsts[i] + np.arange(n) for i, n in zip(scored, counts, strict=True)])
        program = self._runner.bucket(int(lengths.sum()), len(rows), len(indices))
        batch = self._batch.build(program, rows, starts, lengths, indices.astype(np.int32))
        targets = np.zeros(program.samples, np.int32)
        prompts = [
            scheduled[i].request.prompt_token_ids[starts[i] + 1 :][:n] for i, n in zip(scored, counts, strict=True)
        ]
        targets[: len(indices)] = np.concatenate(prompts)
        logits, _ = self._runner.execute(program, batch)
        values = _on_host(self._sampler.logprobs(logits, targets))
        at = 0
        for i, prompt in zip(scored, prompts, strict=True):
            request = scheduled[i].request
            top = request.sampling_params.prompt_logprobs or 0
            entries = [self._position(values, at + j, token, top, request) for j, token in enumerate(prompt)]
            result.prompt_logprobs[request.request_id] = (int(starts[i]) + 1, entries)
            at += len(prompt)

    def _position(self, values: TokenLogprobs, i: int, token: int, top: int, request: Request) -> PositionLogprobs:
        """The token that is there, then the ``top`` most likely ones."""
        named = request.sampling_params.detokenize
        result = {token: self._logprob(token, values.logprobs[i], values.ranks[i], named)}
        for rank in range(top):
            candidate = int(values.top_tokens[i, rank])
            if candidate not in result:
                result[candidate] = self._logprob(candidate, values.top_logprobs[i, rank], rank + 1, named)
        return result

    def _logprob(self, token: int, logprob: jax.Array, rank: jax.Array | int, named: bool) -> Logprob:
        text = self._token_text(token) if named and self._token_text is not None else None
        return Logprob(float(logprob), int(rank), text)


def _scored_length(scheduled: ScheduledRequest) -> int:
    """How many of a row's tokens are followed by a prompt token whose log-probability is wanted and not known yet."""
    request = scheduled.request
    if request.sampling_params.prompt_logprobs is None or request.output_token_ids:
        return 0  # a prompt with output is computed again after preemption
    return max(0, min(scheduled.num_tokens, request.num_prompt_tokens - 1 - scheduled.start))


def _on_host(values: TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(*jax.device_get(tuple(values)))
