"""Which requests the next step works on, and with how many tokens.

One rule: computed tokens catch up with known tokens, under a budget a step. There is no prefill or decode phase; a new
prompt, the rest of a long one and the token sampled last are all tokens that are known and not yet computed. Running
requests come first, then waiting ones. Both queues stand in one order of service (arrival, or priority), and when
pages run out the last of the running ones gives its pages back and is recomputed later; so nobody is ever preempted
for the sake of someone behind.

Steps may overlap: `schedule` may be called again before `update` (``max_steps_in_flight``). Pages that a step in flight
may still write to stay taken until it is updated, and nobody is preempted meanwhile.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from operator import attrgetter

from distaff.runtime.errors import DuplicateRequestError, EngineConfigError, PromptError
from distaff.runtime.kv_pool import KVPool, PageTable
from distaff.runtime.request import Request, RequestStatus, StopReason
from distaff.runtime.step_plan import RequestUpdate, ScheduledRequest, StepDraft, StepPlan

__all__ = [
    "LeakError",
    "PrefixCacheStats",
    "RequestUpdate",
    "ScheduledRequest",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerStats",
    "StepOrderError",
    "StepPlan",
]

POLICIES = ("fcfs", "priority")
_BY_RANK = attrgetter("rank")


class StepOrderError(RuntimeError):
    """Steps were not scheduled and updated in turn: a bug of the engine."""


class LeakError(RuntimeError):
    """Something of a finished request was left behind: a bug of the scheduler."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of the scheduler; raises `EngineConfigError` where they contradict each other.

    ``max_num_samples`` limits the rows of logits a step (None: no limit), and so prompt tokens with log-probabilities.
    ``long_prefill_token_threshold`` caps a prompt's tokens a step while it is not alone (0: no cap). ``policy`` is
    "fcfs" or "priority". ``watermark`` is the share of pages that an admission leaves free for those running.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_num_samples: int | None = None
    long_prefill_token_threshold: int = 0
    policy: str = "fcfs"
    enable_chunked_prefill: bool = True
    watermark: float = 0.01
    max_steps_in_flight: int = 1

    def __post_init__(self) -> None:
        for name, least, why in (
            ("max_num_seqs", 1, ""),
            ("max_num_batched_tokens", self.max_num_seqs, ", a token for each of max_num_seqs requests"),
            ("max_num_samples", self.max_num_seqs, ", a row of logits for each of max_num_seqs requests"),
            ("max_model_len", 2, ""),
            ("long_prefill_token_threshold", 0, ""),
            ("max_steps_in_flight", 1, ""),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise EngineConfigError(f"{name} is {value}; it must be at least {least}{why}")
        if self.policy not in POLICIES:
            raise EngineConfigError(
                f"scheduling policy {self.policy!r} is unknown; choose one of {', '.join(POLICIES)}"
            )
        if not 0 <= self.watermark < 1:
            raise EngineConfigError(f"watermark is {self.watermark}; it is a share of pages, at least 0 and below 1")
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise EngineConfigError(
                f"without chunked prefill a step must hold the longest prompt, but max_num_batched_tokens is "
                f"{self.max_num_batched_tokens} and max_model_len {self.max_model_len}; enable it or change one of them"
            )


@dataclasses.dataclass(slots=True)
class PrefixCacheStats:
    """Look-ups in the prefix cache since the start, one an admission: requests, tokens looked up, tokens found.

    Requests that come back after preemption find their own pages again and are counted apart.
    """

    requests: int = 0
    queries: int = 0
    hits: int = 0
    preempted_requests: int = 0
    preempted_queries: int = 0
    preempted_hits: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Queue lengths and use of pages (0..1) now; preemptions and look-ups since the start."""

    running: int
    waiting: int
    kv_usage: float
    preemptions: int
    prefix_cache: PrefixCacheStats


class Scheduler:
    """The queues of requests and the pages they hold; one thread's."""

    def __init__(self, config: SchedulerConfig, pool: KVPool) -> None:
        self.config = config
        self.pool = pool
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        pool_pages = pool.num_pages - 1
        self._step_tokens = config.max_num_batched_tokens * config.max_steps_in_flight
        fits = pool.peak_pages(config.max_model_len, self._step_tokens) <= pool_pages
        # The most tokens, prompt and output, that a request may have.
        self.max_len = config.max_model_len if fits else min(config.max_model_len, pool_pages * pool.page_size)
        self._watermark = math.ceil(config.watermark * pool_pages)
        self._max_logits = 2**62 if config.max_num_samples is None else config.max_num_samples
        self._requests: dict[str, Request] = {}
        self._arrivals = 0
        self._scheduled_step = self._updated_step = 0
        # Pages of finished requests, and the last step that may still write to them.
        self._fenced: list[tuple[int, PageTable]] = []
        self._preempted: list[Request] = []  # since the last plan
        self._preemptions = 0
        self._prefix_stats = PrefixCacheStats()

    # Requests come and go.

    def add(self, request: Request) -> None:
        """Queues a new request, which may still wait for its grammar or remote KV.

        Raises `PromptError` if it can never be served, and `DuplicateRequestError`.
        """
        if request.request_id in self._requests:
            raise DuplicateRequestError(f"request id {request.request_id!r} is in use; choose another")
        if not 0 < request.num_prompt_tokens < self.max_len:
            raise PromptError(
                f"the prompt has {request.num_prompt_tokens} tokens; it needs at least 1 and, so that one can be "
                f"generated, at most {self.max_len - 1} (max_model_len {self.config.max_model_len}, KV pool of "
                f"{self.pool.num_pages - 1} pages of {self.pool.page_size} tokens)"
            )
        self._arrivals += 1
        by_priority = self.config.policy == "priority"
        own = (request.priority, request.arrival_time, request.request_id)
        request.rank = own if by_priority else (0, self._arrivals, "")
        self._requests[request.request_id] = request
        insort(self.waiting, request, key=_BY_RANK)

    def finish(self, request_id: str, status: RequestStatus, stop_reason: StopReason = None) -> Request | None:
        """Ends a request in whatever state and returns it; None if there is none of that id (any more).

        Raises ValueError if ``status`` is not final.
        """
        if not status.is_finished:
            raise ValueError(f"a request cannot finish as {status.name}: {status.name} is not final")
        request = self._requests.get(request_id)
        if request is None:
            return None
        queue = self.running if request.status is RequestStatus.RUNNING else self.waiting
        request.transition(status)
        request.stop_reason = stop_reason
        _remove(queue, request)
        self._retire(request)
        return request

    def _retire(self, request: Request) -> None:
        del self._requests[request.request_id]
        if request.last_step > self._updated_step:
            self._fenced.append((request.last_step, request.pages))
        else:
            self.pool.free(request.pages)

    # Before a step.

    def schedule(self) -> StepPlan:
        """Plans the next step. Raises `StepOrderError` if too many steps are in flight."""
        if self.num_steps_in_flight >= self.config.max_steps_in_flight:
            raise StepOrderError(
                f"{self.num_steps_in_flight} steps are in flight, which is the limit; update one first"
            )
        draft = StepDraft(self.config.max_num_batched_tokens, self._max_logits, len(self.running))
        if self._schedule_running(draft):
            self._schedule_waiting(draft)
        plan = draft.plan(self._scheduled_step + 1, self._preempted)
        self._preempted = []
        if plan.scheduled:
            self._scheduled_step += 1
        return plan

    def _schedule_running(self, draft: StepDraft) -> bool:
        """Returns whether pages sufficed, so that someone may be admitted."""
        index, preemptions = 0, self._preemptions
        while index < len(self.running):
            request = self.running[index]
            num_known = len(request.token_ids) + request.num_pending_tokens
            num_tokens = self._num_tokens(draft, request, num_known)
            if num_tokens == 0:
                draft.give_back()
            elif self.pool.allocate(request.pages, request.num_computed_tokens + num_tokens):
                self._take(draft, request, num_tokens, num_known)
            elif self.num_steps_in_flight:
                # Preempting would free no page before the steps in flight are done; who finishes in them might.
                return False
            else:
                self._preempt_last()
                draft.give_back()
                continue
            index += 1
        return preemptions == self._preemptions

    def _num_tokens(self, draft: StepDraft, request: Request, num_known: int) -> int:
        pending = request.num_pending_tokens
        if pending and (
            len(request.output_token_ids) + pending == request.sampling_params.max_tokens or num_known >= self.max_len
        ):
            return 0  # the token in flight is its last
        wanted = num_known - request.num_computed_tokens
        threshold = self.config.long_prefill_token_threshold
        if threshold and len(self._requests) > 1 and self.config.enable_chunked_prefill:
            wanted = min(wanted, threshold)
        return draft.limit(request, request.num_computed_tokens, wanted)

    def _take(
        self, draft: StepDraft, request: Request, num_tokens: int, num_known: int, admitted: bool = False
    ) -> None:
        draft.take(request, num_tokens, num_known, admitted)
        request.num_computed_tokens += num_tokens
        request.num_pending_tokens += request.num_computed_tokens == num_known
        request.last_step = self._scheduled_step + 1

    def _preempt_last(self) -> None:
        """Takes the pages of the last running request; as rows are made in the same order, it has none in this step."""
        request = self.running.pop()
        request.transition(RequestStatus.PREEMPTED)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self._preemptions += 1
        self.pool.free(request.pages)
        insort(self.waiting, request, key=_BY_RANK)
        self._preempted.append(request)

    def _schedule_waiting(self, draft: StepDraft) -> None:
        """Admits in order, past those that wait for something else, until one does not fit."""
        index = 0
        while index < len(self.waiting) and len(self.running) < self.config.max_num_seqs:
            request = self.waiting[index]
            if not request.status.is_ready:
                index += 1
            elif not draft.set_aside():
                return
            elif self._is_underway(request, prefix := self._find_prefix(request)):
                draft.give_back()
                index += 1
            elif not self._admit(draft, request, prefix):
                return

    def _is_underway(self, request: Request, prefix: Sequence[int]) -> bool:
        """Whether someone before it is computing at least half of what it would compute, beginning after ``prefix``.

        It then waits for those pages. For fewer it does not: its first token would come later to save little.
        """
        pool, hashes, num_known = self.pool, request.pages.hashes, len(request.token_ids)
        half = (num_known - len(prefix) * pool.page_size) // 2
        # A page's hash covers the pages before it, so the one at which half is reached tells of all.
        page = len(prefix) + max(1, pool.num_pages_for(half)) - 1
        if _is_scored(request) or page >= min(len(hashes), (num_known - 1) // pool.page_size):
            return False
        for other in self.running:
            theirs = other.pages
            if theirs.num_published <= page < len(theirs.hashes) and theirs.hashes[page] == hashes[page]:
                return other.rank < request.rank
        return False

    def _admit(self, draft: StepDraft, request: Request, prefix: Sequence[int]) -> bool:
        """Starts a request if all its known tokens fit and leave the watermark, so that it is not preempted at once."""
        pool, num_known = self.pool, len(request.token_ids)
        request.num_computed_tokens = len(prefix) * pool.page_size
        num_tokens = self._num_tokens(draft, request, num_known)
        end = request.num_computed_tokens + num_tokens
        # A scored prompt is split even so if a step has too few rows of logits for it.
        cut = end < num_known and not (self.config.enable_chunked_prefill or _is_scored(request))
        # Pages of the whole prompt and of the token after it are taken at once; with a window only those of the step,
        # because earlier ones come back meanwhile.
        pages_until = end if pool.window is not None else num_known + 1
        later = pool.peak_pages(num_known + 1, self._step_tokens) - pool.num_pages_for(pages_until)
        reserve = max(0, later) + (self._watermark if self.running else 0)
        if cut or not pool.allocate(request.pages, pages_until, prefix, reserve):
            request.num_computed_tokens = 0
            return False
        self._count_prefix(request, len(prefix) * pool.page_size)
        _remove(self.waiting, request)
        insort(self.running, request, key=_BY_RANK)
        request.transition(RequestStatus.RUNNING)
        self._take(draft, request, num_tokens, num_known, admitted=True)
        return True

    def _find_prefix(self, request: Request) -> list[int]:
        # Log-probabilities of a prompt need all its logits, and the cache holds none.
        if _is_scored(request):
            return []
        return self.pool.find_prefix(request.pages, request.token_ids)

    def _count_prefix(self, request: Request, num_cached: int) -> None:
        if request.num_preemptions == 0:
            request.num_cached_tokens = num_cached
        if not self.pool.enable_prefix_caching or _is_scored(request):
            return
        stats = self._prefix_stats
        if request.num_preemptions == 0:
            stats.requests += 1
            stats.queries += len(request.token_ids)
            stats.hits += num_cached
        else:
            stats.preempted_requests += 1
            stats.preempted_queries += len(request.token_ids)
            stats.preempted_hits += num_cached

    # After a step.

    def update(self, plan: StepPlan, sampled: Mapping[str, Sequence[int]]) -> list[RequestUpdate]:
        """Takes in what a step sampled: tokens by request id, for each row that samples and has not finished since.

        Returns what the requests got, in order of rows. Raises `StepOrderError` if it is not the oldest step in flight,
        ValueError if tokens are missing.
        """
        if not plan.scheduled:
            return []
        if plan.step != self._updated_step + 1 or plan.step > self._scheduled_step:
            raise StepOrderError(f"step {plan.step} was updated, but step {self._updated_step + 1} is next")
        rows = [row for row in plan.scheduled if not row.request.status.is_finished]
        if missing := [r.request.request_id for r in rows if r.samples and not sampled.get(r.request.request_id)]:
            raise ValueError(f"step {plan.step} gives no tokens for {missing}; finish requests that failed first")
        self._updated_step = plan.step
        updates = []
        for row in rows:
            request = row.request
            end = row.start + row.num_tokens
            if row.samples:
                request.num_pending_tokens -= 1
                new_token_ids = self._accept(request, sampled[request.request_id])
                updates.append(RequestUpdate(request, new_token_ids, request.status.is_finished))
            self.pool.publish(request.pages, request.token_ids, end)
            if request.status.is_finished:
                _remove(self.running, request)
                self._retire(request)
            else:
                self.pool.free_passed(request.pages, end)
        self._free_fenced()
        return updates

    def _accept(self, request: Request, token_ids: Sequence[int]) -> list[int]:
        """Appends tokens up to the one that ends the request; returns them."""
        for count, token_id in enumerate(token_ids, start=1):
            request.append(token_id)
            if stop := request.check_stop(self.max_len):
                status, request.stop_reason = stop
                request.transition(status)
                return list(token_ids[:count])
        return list(token_ids)

    def _free_fenced(self) -> None:
        if self._fenced:
            for step, pages in self._fenced:
                if step <= self._updated_step:
                    self.pool.free(pages)
            self._fenced = [(step, pages) for step, pages in self._fenced if step > self._updated_step]

    # The whole.

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished or any step in flight."""
        return bool(self._requests) or self.num_steps_in_flight > 0

    @property
    def num_steps_in_flight(self) -> int:
        """Steps that were scheduled and not yet updated."""
        return self._scheduled_step - self._updated_step

    def stats(self) -> SchedulerStats:
        """A snapshot."""
        prefix_stats = dataclasses.replace(self._prefix_stats)
        return SchedulerStats(len(self.running), len(self.waiting), self.pool.usage, self._preemptions, prefix_stats)

    def reset_prefix_cache(self, preempt_running: bool = False) -> bool:
        """Forgets all cached prefixes (after a change of weights, say); with ``preempt_running`` also those in use.

        The next plan names those preempted.
        Returns False, and changes nothing, while a step is in flight or pages stay in use.
        """
        if self.num_steps_in_flight:
            return False
        while preempt_running and self.running:
            self._preempt_last()
        return self.pool.reset_prefix_cache()

    def check_integrity(self) -> None:
        """Raises `KVPoolError` unless running and fenced requests account for every page in use; for tests, slow."""
        self.pool.check_integrity([r.pages for r in self._requests.values()] + [pages for _, pages in self._fenced])

    def check_idle(self) -> None:
        """Raises `LeakError` or `KVPoolError` unless nothing at all is left of finished requests."""
        left = {
            "requests": len(self._requests),
            "running": len(self.running),
            "waiting": len(self.waiting),
            "steps in flight": self.num_steps_in_flight,
            "fenced page tables": len(self._fenced),
            "pages in use": self.pool.num_pages - 1 - self.pool.num_free_pages,
        }
        if any(left.values()):
            raise LeakError(f"an idle scheduler still has {', '.join(f'{n} {what}' for what, n in left.items() if n)}")
        self.pool.check_integrity(())


def _is_scored(request: Request) -> bool:
    return request.sampling_params.prompt_logprobs is not None


def _remove(queue: list[Request], request: Request) -> None:
    """Takes ``request`` out of a queue that is sorted by rank, where ranks are unique."""
    del queue[bisect_left(queue, request.rank, key=_BY_RANK)]
