"""Random use of the scheduler, against a simulated device that remembers what each page holds.

The "model" is a function of all tokens so far. The device writes the prefix of each scheduled token to its slot and,
as attention would, looks at every slot within the window: wrong pages, stale prefixes and pages that were handed out
too early all show as a wrong prefix.
"""

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from distaff.runtime.errors import PromptError
from distaff.runtime.kv_pool import KVPool
from distaff.runtime.request import Request, RequestStatus
from distaff.runtime.sampling_params import SamplingParams
from distaff.runtime.scheduler import Scheduler, SchedulerConfig

PS = 2
VOCAB = 3
EOS = 2


def next_token(prefix):
    """The model: any function that depends on the whole prefix."""
    return (sum((i + 1) * token for i, token in enumerate(prefix)) // 2 + len(prefix)) % VOCAB


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        pages=st.integers(3, 16),
        caching=st.booleans(),
        windows=st.sampled_from([(), (), (1,), (3,), (4, 6)]),
        seqs=st.integers(1, 4),
        spare_tokens=st.integers(0, 8),
        spare_logits=st.integers(0, 4),
        threshold=st.sampled_from([0, 0, 1, 3]),
        policy=st.sampled_from(["fcfs", "priority"]),
        chunked=st.booleans(),
        watermark=st.sampled_from([0.0, 0.2]),
        ahead=st.integers(1, 3),
    )
    def make(
        self, pages, caching, windows, seqs, spare_tokens, spare_logits, threshold, policy, chunked, watermark, ahead
    ):
        self.config = SchedulerConfig(
            max_num_seqs=seqs,
            max_num_batched_tokens=seqs + spare_tokens if chunked else max(20, seqs + spare_tokens),
            max_num_samples=seqs + spare_logits,
            max_model_len=20,
            long_prefill_token_threshold=threshold,
            policy=policy,
            enable_chunked_prefill=chunked,
            watermark=watermark,
            max_steps_in_flight=ahead,
        )
        self.pool = KVPool(pages, PS, caching, windows)
        self.scheduler = Scheduler(self.config, self.pool)
        self.memory = {}
        self.in_flight = deque()
        self.requests = []
        self.progress = {}  # tokens that steps have computed, by request
        self.serial = 0
        self.was_reset = False

    @rule(
        prompt=st.lists(st.integers(0, VOCAB - 1), max_size=21),
        max_tokens=st.sampled_from([None, 1, 2, 9]),
        ignore_eos=st.booleans(),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        priority=st.integers(0, 2),
        salt=st.sampled_from([None, "a"]),
        blocked=st.booleans(),
    )
    def add(self, prompt, max_tokens, ignore_eos, prompt_logprobs, priority, salt, blocked):
        self.serial += 1
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, prompt_logprobs=prompt_logprobs)
        request = Request(
            f"r{self.serial}", prompt, params, frozenset({EOS}), float(self.serial), priority, cache_salt=salt
        )
        if blocked and self.serial % 3 == 0:
            request.transition(RequestStatus.WAITING_FOR_GRAMMAR)
        try:
            self.scheduler.add(request)
        except PromptError:
            assert not 0 < len(prompt) < self.scheduler.max_len
        else:
            self.requests.append(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def unblock(self, data):
        request = data.draw(st.sampled_from(self.requests))
        if request.status is RequestStatus.WAITING_FOR_GRAMMAR:
            request.transition(RequestStatus.WAITING)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data):
        request = data.draw(st.sampled_from(self.requests))
        live = not request.status.is_finished
        ended = self.scheduler.finish(request.request_id, RequestStatus.FINISHED_ABORTED)
        assert (ended is request) == live

    @rule()
    def reset(self):
        if self.scheduler.reset_prefix_cache(preempt_running=True):
            assert not self.in_flight and not self.scheduler.running
            self.was_reset = True

    @precondition(lambda self: len(self.in_flight) < self.config.max_steps_in_flight)
    @rule()
    def schedule(self):
        running, ranks = list(self.scheduler.running), {r: r.rank for r in self.scheduler.running}
        plan = self.scheduler.schedule()
        for request in plan.preempted:
            assert not self.in_flight
            self.progress.pop(request, None)
        self.check_plan(plan, running)
        if plan.preempted and not self.was_reset:  # b33: nobody better than those who stayed
            stayed = [ranks[r] for r in running if r not in plan.preempted]
            assert all(ranks[r] > rank for r in plan.preempted for rank in stayed)
        self.was_reset = False
        if plan.scheduled:
            tables = {row.request: list(row.request.page_ids) for row in plan.scheduled}
            self.in_flight.append((plan, self.execute(plan), tables))

    def check_plan(self, plan, running):
        rows = plan.scheduled
        assert plan.num_tokens == sum(row.num_tokens for row in rows) <= self.config.max_num_batched_tokens
        assert [row.num_tokens == 1 for row in rows] == [i < plan.num_decodes for i in range(len(rows))]
        assert len(self.scheduler.running) <= self.config.max_num_seqs
        assert len({row.request for row in rows}) == len(rows)
        assert self.was_reset or not {row.request for row in rows} & set(plan.preempted)
        logits = 0
        for row in rows:
            request = row.request
            assert request.status is RequestStatus.RUNNING and row.num_tokens >= 1
            assert row.admitted == (request not in running)
            if row.admitted:
                assert row.start % PS == 0 and (row.start < len(request.token_ids))
            else:
                assert row.start == self.progress[request]
            self.progress[request] = end = row.start + row.num_tokens
            in_prompt = max(0, min(end, request.num_prompt_tokens) - row.start)
            if request.sampling_params.prompt_logprobs is None:
                logits += row.samples
            else:
                assert not row.admitted or row.start == 0
                logits += in_prompt + (row.samples and end > request.num_prompt_tokens)
        assert logits <= self.config.max_num_samples

    def execute(self, plan):
        """What the device writes, checks and samples; tokens that are still in flight are known to it."""
        sampled = {}
        for row in plan.scheduled:
            request, end = row.request, row.start + row.num_tokens
            full = self.sequence(request, end)
            for position in range(row.start, end):
                page = request.page_ids[position // PS]
                assert page != 0
                self.memory[page, position % PS] = (request.cache_salt, tuple(full[: position + 1]))
        for row in plan.scheduled:
            request, end = row.request, row.start + row.num_tokens
            full = self.sequence(request, end)
            seen_from = 0 if self.pool.window is None else max(0, row.start - self.pool.window + 1)
            for position in range(seen_from, end):
                page = request.page_ids[position // PS]
                assert self.memory[page, position % PS] == (request.cache_salt, tuple(full[: position + 1]))
            if row.samples:
                assert end >= len(request.token_ids)
                sampled[request.request_id] = [next_token(full)]
        return sampled

    def sequence(self, request, length):
        """The first ``length`` tokens as the model goes on from those that the scheduler knows."""
        full = list(request.token_ids[:length])
        while len(full) < length:
            full.append(next_token(full))
        return full

    @precondition(lambda self: self.in_flight)
    @rule()
    def update(self):
        plan, sampled, _ = self.in_flight.popleft()
        live = [r.request for r in plan.scheduled if r.samples and not r.request.status.is_finished]
        updates = self.scheduler.update(plan, sampled)
        assert [update.request for update in updates] == live
        for update in updates:
            assert update.new_token_ids == sampled[update.request.request_id]
            assert update.finished == update.request.status.is_finished

    @invariant()
    def books_agree(self):
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        assert (0, 0) not in self.memory and (0, 1) not in self.memory
        for request in self.requests:
            if request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED):
                assert request.page_ids == [] and request.num_computed_tokens == 0
            if request.status is RequestStatus.RUNNING:
                assert request.num_computed_tokens == self.progress[request]
            assert len(request.token_ids) <= self.scheduler.max_len
            output = request.output_token_ids
            assert len(output) <= (request.sampling_params.max_tokens or 10**6)
            assert request.token_ids == self.sequence_from_prompt(request)
        for queue in (self.scheduler.running, self.scheduler.waiting):
            assert [r.rank for r in queue] == sorted(r.rank for r in queue)
        # b42: pages that a step in flight may touch belong to no one else.
        for plan, _, tables in self.in_flight:
            for row in plan.scheduled:
                first = 0 if self.pool.window is None else max(0, row.start - self.pool.window + 1) // PS
                for page in tables[row.request][first:]:
                    assert self.pool._references[page] > 0

    def sequence_from_prompt(self, request):
        full = list(request.prompt_token_ids)
        while len(full) < len(request.token_ids):
            full.append(next_token(full))
        return full

    def teardown(self):
        """Whatever is left ends by itself within few steps, and nothing stays behind (b45)."""
        if not hasattr(self, "scheduler"):
            return
        for request in self.requests:
            if request.status is RequestStatus.WAITING_FOR_GRAMMAR:
                request.transition(RequestStatus.WAITING)
        steps = 0
        while self.scheduler.has_work:
            if len(self.in_flight) < self.config.max_steps_in_flight:
                self.schedule()
            if self.in_flight:
                self.update()
            self.books_agree()
            steps += 1
            assert steps < 100 * (1 + len(self.requests)), "no progress"
        self.scheduler.check_idle()
        for request in self.requests:
            assert request.status.is_finished
            self.check_end(request)

    def check_end(self, request):
        """It ended where it had to: not before, and not after."""
        params, output = request.sampling_params, request.output_token_ids
        if request.status is RequestStatus.FINISHED_ABORTED:
            return
        ended = EOS in output and not params.ignore_eos
        assert (request.status is RequestStatus.FINISHED_STOPPED) == ended
        if ended:
            assert output.index(EOS) == len(output) - 1
        else:
            assert len(output) == params.max_tokens or len(request.token_ids) == self.scheduler.max_len


SchedulerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestScheduler = SchedulerMachine.TestCase
