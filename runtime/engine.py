"""The synchronous engine: requests in, and at every step some more of their outputs.

A step schedules, runs the model on what was scheduled, samples, tells the scheduler, and turns new tokens into text.
It is to be used from one thread; `AsyncEngine` gives it a thread and a face for many callers.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distaff.compiler.artifact import TOKENIZER, Manifest
from distaff.runtime.bad_words import spellings
from distaff.runtime.completion import Completion, RequestGroup
from distaff.runtime.config import EngineConfig
from distaff.runtime.errors import DuplicateRequestError, EngineOverloadedError, TokenizerError
from distaff.runtime.kv_pool import KVPool
from distaff.runtime.model_runner import ModelRunner
from distaff.runtime.outputs import RequestOutput
from distaff.runtime.request import Request, RequestStatus
from distaff.runtime.request_check import ModelLimits
from distaff.runtime.sampling_params import SamplingParams, SamplingParamsError
from distaff.runtime.scheduler import LeakError, Scheduler
from distaff.runtime.stats import StatLogger, StepStats
from distaff.runtime.step_executor import StepExecutor, StepResult
from distaff.runtime.step_plan import RequestUpdate, StepPlan
from distaff.runtime.tokenizer import Tokenizer

_INVALID_LOGITS = "no token could be sampled: the model's logits are not finite"


class Engine:
    """Serves one artifact.

    ``tokenizer`` replaces the artifact's own. ``stat_loggers`` are told what happens. ``make_runner`` makes the model
    runner, by default the one that runs the artifact's programs. Raises `ArtifactError` if the folder cannot be served
    and `EngineConfigError` if it cannot be served with these settings.
    """

    def __init__(
        self,
        artifact: str | Path,
        config: EngineConfig | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        stat_loggers: Sequence[StatLogger] = (),
        make_runner: Callable[..., ModelRunner] = ModelRunner,
    ) -> None:
        folder = Path(artifact)
        self.manifest = Manifest.load(folder)
        self.config = config = config or EngineConfig()
        limits = config.scheduler_config(self.manifest)
        if tokenizer is None and self.manifest.has_tokenizer:
            tokenizer = Tokenizer.load(folder / TOKENIZER)
        self._tokenizer = tokenizer
        self.eos_token_ids = frozenset(self.manifest.eos_token_ids or (tokenizer.eos_token_ids if tokenizer else ()))
        self._runner = make_runner(
            folder,
            self.manifest,
            num_pages=config.num_pages,
            kv_cache_bytes=config.kv_cache_bytes,
            memory_share=config.gpu_memory_utilization,
            forbid_compiles=config.forbid_compiles,
            progress=config.progress,
        )
        max_logprobs = config.top_logprobs(self.manifest)
        self._completions: dict[str, Completion] = {}  # by the scheduler's request ids
        self._executor = StepExecutor(
            self._runner,
            self.manifest,
            limits,
            max_logprobs=max_logprobs,
            seed_of=lambda request_id: self._completions[request_id].seed,
            token_text=tokenizer.token_text if tokenizer else None,
        )
        pool = KVPool(
            self._runner.num_pages,
            self.manifest.page_size,
            enable_prefix_caching=config.enable_prefix_caching,
            windows=[cache.window for cache in self.manifest.caches],
        )
        self._scheduler = Scheduler(limits, pool)
        self._scheduler_stats = self._scheduler.stats()
        self._stat_loggers = tuple(stat_loggers)
        self._groups: dict[str, RequestGroup] = {}
        self._held: dict[str, list[Completion]] = {}  # by group: they wait for the first one to compute the prompt
        self._deadlines: list[tuple[float, str]] = []
        self._serial = itertools.count()
        self._random = random.Random(config.seed)
        self._mean_seconds = 1.0  # from arrival to end, of recent requests
        self._last_step = StepStats()
        # Less than the configured length if the pool has no room for that.
        self.max_model_len = self._scheduler.max_len
        self._limits = ModelLimits(
            self.manifest.vocab_size, self.max_model_len, max_logprobs, tokenizer is not None, self.eos_token_ids
        )
        if config.warm_up:
            self._executor.warm_up()

    @property
    def tokenizer(self) -> Tokenizer:
        """The artifact's tokenizer; raises `TokenizerError` if it has none."""
        if self._tokenizer is None:
            raise TokenizerError("this artifact has no tokenizer; send token ids, or compile it with a tokenizer")
        return self._tokenizer

    @property
    def num_pages(self) -> int:
        """Pages of the KV pool, the null page included."""
        return self._runner.num_pages

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """What ``generation_config.json`` of the model recommends; empty without one."""
        return self._tokenizer.generation_config if self._tokenizer else {}

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything left to do."""
        return bool(self._groups)

    @property
    def stats(self) -> StepStats:
        """Measurements: counts of the latest step, queues and pages as they are now."""
        now = self._scheduler.stats()
        return dataclasses.replace(
            self._last_step, running=now.running, waiting=self._num_waiting(), kv_usage=now.kv_usage
        )

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        arrival_time: float | None = None,
        timeout: float | None = None,
    ) -> None:
        """Queues a request. ``arrival_time`` is on `time.monotonic`'s clock; it ends ``timeout`` seconds later.

        Raises `PromptError`, `SamplingParamsError`, `DuplicateRequestError` or `EngineOverloadedError`; then nothing
        has changed.
        """
        params = params.clone()
        prompt = self._limits.check_prompt(prompt_token_ids, params)
        params = self._limits.check_params(params)
        bad_words = spellings(params.bad_words, self._tokenizer) if self._tokenizer else ()
        if request_id in self._groups:
            raise DuplicateRequestError(f"a request with id {request_id!r} is still running; choose another id")
        self._check_room(params.n)
        arrival = time.monotonic() if arrival_time is None else arrival_time
        group = RequestGroup(request_id, prompt, params, None if timeout is None else arrival + timeout)
        for index in range(params.n):
            request = Request(
                # The serial number makes it unique among the completions of all requests, whatever their ids.
                request_id=f"{request_id}#{next(self._serial)}",
                prompt_token_ids=prompt,
                # The prompt is scored once.
                sampling_params=dataclasses.replace(
                    params, n=1, prompt_logprobs=None if index else params.prompt_logprobs
                ),
                eos_token_ids=self.eos_token_ids,
                arrival_time=arrival,
                priority=priority,
                cache_salt=cache_salt,
                bad_words=bad_words,
            )
            # Every completion draws its own numbers.
            seed = self._random.getrandbits(64) if params.seed is None else params.seed + index
            group.completions.append(Completion(group, index, seed, request, self._tokenizer))
        self._groups[request_id] = group
        first, *others = group.completions
        self._submit(first)
        if others:
            self._held[request_id] = others
        if group.deadline is not None:
            heapq.heappush(self._deadlines, (group.deadline, request_id))

    def _check_room(self, count: int) -> None:
        limit, places = self.config.max_waiting, self._scheduler.config.max_num_seqs
        if limit is None:
            return
        if count > places + limit:
            raise SamplingParamsError("n", f"is {count}, but only {places} can run and {limit} wait (max_waiting)")
        waiting = self._num_waiting()
        # Some of those in the queue only wait for the next step.
        starting = min(waiting + count, places - len(self._scheduler.running))
        if waiting + count - starting > limit:
            # A queue empties about as fast as a batch of requests ends.
            raise EngineOverloadedError(waiting, min(60.0, max(1.0, waiting / places * self._mean_seconds)))

    def _num_waiting(self) -> int:
        return len(self._scheduler.waiting) + sum(map(len, list(self._held.values())))

    def _submit(self, completion: Completion) -> None:
        self._completions[completion.request.request_id] = completion
        self._scheduler.add(completion.request)

    def abort(self, request_ids: Iterable[str]) -> list[RequestOutput]:
        """Ends requests in whatever state they are and returns their last outputs; unknown ids are ignored."""
        return [self._abort(self._groups[i], None) for i in list(request_ids) if i in self._groups]

    def _abort(self, group: RequestGroup, error: str | None) -> RequestOutput:
        changed = [completion for completion in group.completions if not completion.finished]
        self._held.pop(group.request_id, None)
        for completion in changed:
            self._end(completion, RequestStatus.FINISHED_ABORTED, error=error)
        output = group.output(changed)
        assert output is not None, "the output of a finished request is never withheld"
        return output

    def step(self) -> list[RequestOutput]:
        """Advances the requests by one step of the model; returns the outputs that this gave."""
        began = time.monotonic()
        outputs = self._expire(began)
        plan = self._scheduler.schedule()
        for request in plan.preempted:
            self._executor.release(request.request_id)
        for scheduled in plan.scheduled:
            completion = self._completions[scheduled.request.request_id]
            if completion.first_scheduled is None:
                completion.first_scheduled = began
        result = self._execute(plan)
        changed = self._apply(plan, result)
        by_group: dict[str, list[Completion]] = {}
        for completion in changed:
            by_group.setdefault(completion.group.request_id, []).append(completion)
        for completions in by_group.values():
            output = completions[0].group.output(completions)
            if output is not None:
                outputs.append(output)
        self._record_step(began, plan, result)
        return outputs

    def _execute(self, plan: StepPlan) -> StepResult:
        if not plan.scheduled:
            return StepResult()
        try:
            return self._executor.execute(plan.scheduled)
        except BaseException as error:
            # An interrupt, say: these requests cannot go on, but the engine is whole when the caller handles it.
            for scheduled in plan.scheduled:
                completion = self._completions[scheduled.request.request_id]
                self._end(completion, RequestStatus.FINISHED_ERROR, error=f"{type(error).__name__}: {error}")
            self._scheduler.update(plan, {})
            raise

    def _apply(self, plan: StepPlan, result: StepResult) -> list[Completion]:
        """Hands a step's results to the scheduler and to the completions; returns those that changed."""
        now = time.monotonic()
        for request_id, (position, values) in result.prompt_logprobs.items():
            self._completions[request_id].group.set_prompt_logprobs(position, values)
        changed = [self._completions[request_id] for request_id in result.invalid]
        for completion in changed:
            self._end(completion, RequestStatus.FINISHED_ERROR, error=_INVALID_LOGITS)
        sampled = {request_id: [token] for request_id, token in result.tokens.items()}
        for update in self._scheduler.update(plan, sampled):
            completion = self._completions[update.request.request_id]
            changed.append(completion)
            self._add_tokens(completion, update, result, now)
        return changed

    def _add_tokens(self, completion: Completion, update: RequestUpdate, result: StepResult, now: float) -> None:
        request = update.request
        stopped = request.status == RequestStatus.FINISHED_STOPPED
        found = completion.add(update.new_token_ids, result.logprobs.get(request.request_id), stopped)
        self._record_token(completion, now)
        if found is not None:
            self._end(completion, RequestStatus.FINISHED_STOPPED, stop_reason=found)
        elif update.finished:
            self._end(completion, request.status, stop_reason=request.stop_reason)
        elif completion.index == 0:
            self._release_held(completion.group)

    def _end(
        self,
        completion: Completion,
        status: RequestStatus,
        stop_reason: int | str | None = None,
        error: str | None = None,
    ) -> None:
        """Ends one completion everywhere, and with the last one its request."""
        request_id, group = completion.request.request_id, completion.group
        if self._completions.pop(request_id, None) is not None:
            self._scheduler.finish(request_id, status, stop_reason)
            self._executor.release(request_id)
        completion.end(time.monotonic(), status.finish_reason or "", stop_reason, error)
        stats = completion.stats()
        self._mean_seconds += 0.1 * (stats.e2e_seconds - self._mean_seconds)
        for logger in self._stat_loggers:
            logger.on_finished(stats)
        self._release_held(group)
        if group.finished:
            del self._groups[group.request_id]

    def _release_held(self, group: RequestGroup) -> None:
        """Lets the other completions start: the prompt is in the prefix cache now, or will not be."""
        for completion in self._held.pop(group.request_id, ()):
            self._submit(completion)

    def _expire(self, now: float) -> list[RequestOutput]:
        outputs = []
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, request_id = heapq.heappop(self._deadlines)
            group = self._groups.get(request_id)
            if group is not None and group.deadline == deadline:  # else that request is gone, its id perhaps reused
                seconds = deadline - group.completions[0].request.arrival_time
                outputs.append(self._abort(group, f"the request was not done after its timeout of {seconds:g} s"))
        return outputs

    def _record_token(self, completion: Completion, now: float) -> None:
        if completion.first_token is None:
            completion.first_token = now
            for logger in self._stat_loggers:
                logger.on_first_token(now - completion.request.arrival_time)
        elif completion.last_token is not None:
            for logger in self._stat_loggers:
                logger.on_token_gap(now - completion.last_token)
        completion.last_token = now

    def _record_step(self, began: float, plan: StepPlan, result: StepResult) -> None:
        now, before = self._scheduler.stats(), self._scheduler_stats
        self._scheduler_stats = now
        self._last_step = StepStats(
            preemptions=now.preemptions - before.preemptions,
            prompt_tokens=plan.num_tokens - plan.num_decodes,
            generation_tokens=len(result.tokens),
            prefix_cache_queries=now.prefix_cache.queries - before.prefix_cache.queries,
            prefix_cache_hits=now.prefix_cache.hits - before.prefix_cache.hits,
            compiles=self._runner.compiles,
            step_seconds=time.monotonic() - began,
        )
        for logger in self._stat_loggers:
            logger.on_step(self.stats)

    def reset_prefix_cache(self) -> bool:
        """Forgets cached prompts; False, and nothing changes, while pages are in use."""
        return self._scheduler.reset_prefix_cache()

    def check_idle(self) -> None:
        """Raises `LeakError` or `KVPoolError` unless nothing at all is left of finished requests."""
        self._scheduler.check_idle()
        left = (len(self._groups), len(self._completions), len(self._held), self._executor.rows_in_use)
        if any(left):
            raise LeakError("an idle engine still has {} requests, {} + {} completions and {} rows".format(*left))

    def shutdown(self) -> None:
        """Ends all requests and stops loading programs in the background."""
        self.abort(self._groups)
        self._runner.close()
