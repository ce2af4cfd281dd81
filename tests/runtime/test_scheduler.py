"""Whom the scheduler runs in a step and with how many tokens, preemption, how requests end, and steps in flight."""

import pytest
from scheduling import ABORTED, add, ask, make, rows, step, tokens_for

from distaff.runtime.errors import DuplicateRequestError, EngineConfigError, PromptError
from distaff.runtime.request import RequestStatus
from distaff.runtime.scheduler import LeakError, StepOrderError


@pytest.mark.smoke
def test_b27_running_before_waiting_and_waiting_in_order_of_arrival():
    scheduler = make(max_num_seqs=3)
    add(scheduler, ask("a"), ask("b", 6))
    assert step(scheduler) == [("a", 0, 5, True), ("b", 0, 6, True)]
    add(scheduler, ask("c", 4), ask("d"))
    assert step(scheduler) == [("a", 5, 1, True), ("b", 6, 1, True), ("c", 0, 4, True)]
    scheduler.finish("a", ABORTED)
    assert [name for name, *_ in step(scheduler)] == ["b", "c", "d"]


def test_b27_the_token_budget_is_never_exceeded():
    scheduler = make(max_num_batched_tokens=10)
    add(scheduler, *(ask(name, 7) for name in "abcdefgh"))
    for _ in range(20):
        plan = scheduler.schedule()
        assert plan.num_tokens == sum(row.num_tokens for row in plan.scheduled) <= 10
        scheduler.update(plan, tokens_for(plan))
    assert len(scheduler.running) == 8


def test_b28_a_long_prompt_is_split_and_samples_only_at_its_end():
    scheduler = make(max_num_batched_tokens=10)
    add(scheduler, ask("a", 25))
    assert step(scheduler) == [("a", 0, 10, False)]
    assert step(scheduler) == [("a", 10, 10, False)]
    assert step(scheduler) == [("a", 20, 5, True)]
    assert step(scheduler) == [("a", 25, 1, True)]


def test_decodes_stand_first_and_are_never_starved_by_prompts():
    scheduler = make(max_num_batched_tokens=10, policy="priority")
    add(scheduler, ask("a", 4, priority=5), ask("b", 4, priority=6))
    step(scheduler)
    add(scheduler, ask("c", 30, priority=0))
    plan = scheduler.schedule()
    assert rows(plan) == [("a", 4, 1, True), ("b", 4, 1, True), ("c", 0, 8, False)]
    assert plan.num_decodes == 2
    scheduler.update(plan, tokens_for(plan))
    # From now on c is served first, but only from what is not set aside for a and b.
    assert step(scheduler) == [("a", 5, 1, True), ("b", 5, 1, True), ("c", 8, 8, False)]


def test_without_chunking_a_prompt_waits_until_it_fits_whole():
    scheduler = make(max_num_batched_tokens=64, enable_chunked_prefill=False, long_prefill_token_threshold=3)
    add(scheduler, ask("a", 40), ask("b", 40))
    assert step(scheduler) == [("a", 0, 40, True)]
    assert step(scheduler) == [("a", 40, 1, True), ("b", 0, 40, True)]


def test_b29_the_long_prefill_cap_applies_only_in_company():
    scheduler = make(long_prefill_token_threshold=6)
    add(scheduler, ask("a", 20))
    assert step(scheduler) == [("a", 0, 20, True)]
    add(scheduler, ask("b", 20), ask("c", 20))
    assert step(scheduler) == [("a", 20, 1, True), ("b", 0, 6, False), ("c", 0, 6, False)]
    scheduler.finish("a", ABORTED)
    scheduler.finish("c", ABORTED)
    assert step(scheduler) == [("b", 6, 14, True)]


def test_b30_the_number_of_running_requests_is_capped():
    scheduler = make(max_num_seqs=2)
    add(scheduler, ask("a"), ask("b"), ask("c"))
    assert len(step(scheduler)) == 2
    assert scheduler.stats().running == 2 and scheduler.stats().waiting == 1


def test_b32_the_last_one_is_preempted_keeps_its_output_and_recomputes_first():
    scheduler = make(num_pages=6, max_model_len=20)  # five pages
    _, b = add(scheduler, ask("a", 7), ask("b", 7))
    step(scheduler, token=7)  # both: 2 pages, and the token at 7 is inside
    add(scheduler, ask("c", 7))
    step(scheduler, token=8)  # both: 8 computed, a takes the fifth page next
    plan = scheduler.schedule()
    assert rows(plan) == [("a", 8, 1, True)]
    assert plan.preempted == [b]
    assert b.status is RequestStatus.PREEMPTED and b.num_preemptions == 1
    assert b.output_token_ids == [7, 8] and b.num_computed_tokens == 0 and b.page_ids == []
    assert [request.request_id for request in scheduler.waiting] == ["b", "c"]
    scheduler.update(plan, tokens_for(plan))
    assert scheduler.stats().preemptions == 1
    scheduler.finish("a", ABORTED)
    assert step(scheduler)[0] == ("b", 0, 9, True)
    assert b.output_token_ids == [7, 8, 7]


def test_b32_with_priorities_the_worst_is_preempted():
    scheduler = make(num_pages=6, max_model_len=20, policy="priority")
    a, b = add(scheduler, ask("a", 7, priority=2), ask("b", 7, priority=1))
    step(scheduler)
    step(scheduler)
    plan = scheduler.schedule()
    assert rows(plan) == [("b", 8, 1, True)]
    assert plan.preempted == [a]
    assert b.status is RequestStatus.RUNNING


def test_b32_nobody_is_admitted_in_a_step_that_preempts():
    scheduler = make(num_pages=7, max_model_len=24, policy="priority")
    _, b = add(scheduler, ask("a", 7, priority=0), ask("b", 15, priority=5))
    step(scheduler)
    add(scheduler, ask("w", 3, priority=1))
    assert len(step(scheduler)) == 2
    plan = scheduler.schedule()
    assert plan.preempted == [b] and [name for name, *_ in rows(plan)] == ["a"]
    scheduler.update(plan, tokens_for(plan))
    assert [name for name, *_ in step(scheduler)] == ["a", "w"]


def test_b33_the_worst_preempts_itself():
    scheduler = make(num_pages=6, max_model_len=20)
    a, b = add(scheduler, ask("a", 9), ask("b", 7))
    step(scheduler)
    step(scheduler)
    plan = scheduler.schedule()  # b needs a third page, of which a has three
    assert rows(plan) == [("a", 10, 1, True)] and plan.preempted == [b]
    assert a.status is RequestStatus.RUNNING


def test_b34_a_preempted_request_gives_back_its_budget():
    scheduler = make(num_pages=10, max_num_batched_tokens=8, max_model_len=36, policy="priority")
    _, c = add(scheduler, ask("a", 7, priority=0), ask("c", 1, priority=2))
    step(scheduler)
    step(scheduler)
    step(scheduler)
    scheduler.finish("a", ABORTED)
    add(scheduler, ask("b", 7, priority=0))
    assert step(scheduler) == [("c", 3, 1, True), ("b", 0, 7, True)]
    add(scheduler, ask("d", 16, priority=1))
    # Pages: two of b, two of c, five of d.
    assert step(scheduler) == [("b", 7, 1, True), ("c", 4, 1, True), ("d", 0, 6, False)]
    plan = scheduler.schedule()
    assert plan.preempted == [c]
    assert rows(plan) == [("b", 8, 1, True), ("d", 6, 7, False)]  # d has the token that was set aside for c


def test_b35_with_room_priority_never_preempts_and_ties_fall_to_arrival_then_id():
    scheduler = make(policy="priority", max_num_seqs=4)
    add(scheduler, ask("x", 5, priority=9))
    step(scheduler)
    add(
        scheduler,
        ask("d", priority=2, arrival_time=1.0),
        ask("c", priority=1, arrival_time=2.0),
        ask("b", priority=1, arrival_time=1.0),
        ask("a", priority=1, arrival_time=1.0),
    )
    plan = scheduler.schedule()
    assert plan.preempted == []
    assert [row.request.request_id for row in plan.scheduled] == ["x", "a", "b", "c"]


def test_b36_max_tokens_ends_a_request_in_the_update():
    scheduler = make()
    (a,) = add(scheduler, ask("a", max_tokens=2))
    step(scheduler)
    plan = scheduler.schedule()
    (update,) = scheduler.update(plan, tokens_for(plan))
    assert update.finished and update.new_token_ids == [7]
    assert a.status is RequestStatus.FINISHED_LENGTH_CAPPED
    assert not scheduler.has_work
    scheduler.check_idle()


def test_b36_a_stop_in_the_middle_of_several_tokens_drops_the_rest():
    scheduler = make()
    (a,) = add(scheduler, ask("a", stop_token_ids=[9]))
    plan = scheduler.schedule()
    (update,) = scheduler.update(plan, {"a": [8, 9, 10]})
    assert update.new_token_ids == a.output_token_ids == [8, 9]
    assert update.finished and a.stop_reason == 9
    scheduler.check_idle()


def test_several_tokens_at_once_are_caught_up_with():
    scheduler = make()
    add(scheduler, ask("a", 5))
    scheduler.update(scheduler.schedule(), {"a": [8, 9, 10]})
    assert step(scheduler) == [("a", 5, 3, True)]


def test_b36_the_length_never_exceeds_the_model():
    scheduler = make(max_model_len=8)
    (a,) = add(scheduler, ask("a", 5))
    while scheduler.has_work:
        step(scheduler)
    assert len(a.token_ids) == 8 and a.status is RequestStatus.FINISHED_LENGTH_CAPPED
    scheduler.check_idle()


def test_b36_the_length_never_exceeds_the_pool():
    scheduler = make(num_pages=4, max_model_len=64)  # 12 tokens
    (a,) = add(scheduler, ask("a", 5))
    while scheduler.has_work:
        step(scheduler)
    assert len(a.token_ids) == 12 and a.status is RequestStatus.FINISHED_LENGTH_CAPPED
    assert a.num_preemptions == 0


STATES = ["waiting", "grammar", "remote", "running", "prefilling", "preempted"]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("status", [s for s in RequestStatus if s.is_finished])
def test_b38_finish_works_in_every_state_and_twice(state, status):
    scheduler = make(num_pages=6, max_model_len=20, max_num_batched_tokens=8)
    other, request = add(scheduler, ask("o", 4), ask("r", 12 if state == "prefilling" else 3))
    if state == "grammar":
        request.transition(RequestStatus.WAITING_FOR_GRAMMAR)
    elif state == "remote":
        request.transition(RequestStatus.WAITING_FOR_REMOTE_KV)
    elif state != "waiting":
        step(scheduler)
    if state == "preempted":
        while request.status is not RequestStatus.PREEMPTED:
            step(scheduler)
    assert scheduler.finish("r", status, stop_reason="why") is request
    assert request.status is status and request.stop_reason == "why" and request.page_ids == []
    assert scheduler.finish("r", ABORTED) is None
    assert request.status is status
    scheduler.check_integrity()
    assert [name for name, *_ in step(scheduler)] == ["o"]
    scheduler.finish("o", ABORTED)
    assert other.status is ABORTED
    scheduler.check_idle()


def test_finishing_takes_a_final_state():
    scheduler = make()
    (a,) = add(scheduler, ask("a"))
    with pytest.raises(ValueError, match="WAITING_FOR_GRAMMAR is not final"):
        scheduler.finish("a", RequestStatus.WAITING_FOR_GRAMMAR)
    assert a.status is RequestStatus.WAITING and scheduler.has_work


def test_b39_b40_blocked_requests_let_others_pass_and_keep_their_place():
    scheduler = make(max_num_seqs=2)
    blocked, broken = ask("a"), ask("z")
    blocked.transition(RequestStatus.WAITING_FOR_GRAMMAR)
    broken.transition(RequestStatus.WAITING_FOR_REMOTE_KV)
    add(scheduler, blocked, broken, ask("b"), ask("c"), ask("d"))
    assert [name for name, *_ in step(scheduler)] == ["b", "c"]
    blocked.transition(RequestStatus.WAITING)
    assert scheduler.finish("z", RequestStatus.FINISHED_ERROR) is broken
    assert [name for name, *_ in step(scheduler)] == ["b", "c"]
    scheduler.finish("b", ABORTED)
    assert [name for name, *_ in step(scheduler)] == ["c", "a"]


def ahead(**config):
    return make(max_steps_in_flight=2, **config)


def test_b41_a_step_may_be_scheduled_on_tokens_that_are_still_to_come():
    scheduler = ahead()
    (a,) = add(scheduler, ask("a", 5))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert rows(second) == [("a", 5, 1, True)]
    assert second.scheduled[0].start == len(a.token_ids)  # its token is not known yet
    with pytest.raises(StepOrderError, match="2 steps are in flight"):
        scheduler.schedule()
    with pytest.raises(StepOrderError, match="step 1 is next"):
        scheduler.update(second, tokens_for(second))
    scheduler.update(first, {"a": [8]})
    scheduler.update(second, {"a": [9]})
    assert a.output_token_ids == [8, 9]
    with pytest.raises(StepOrderError, match="step 3 is next"):
        scheduler.update(second, tokens_for(second))


@pytest.mark.parametrize(("max_tokens", "max_model_len"), [(1, 64), (None, 6)])
def test_b41_nothing_is_scheduled_beyond_max_tokens_or_the_context(max_tokens, max_model_len):
    scheduler = ahead(max_model_len=max_model_len)
    add(scheduler, ask("a", 5, max_tokens=max_tokens))
    first = scheduler.schedule()
    assert scheduler.schedule().scheduled == []
    (update,) = scheduler.update(first, tokens_for(first))
    assert update.finished
    scheduler.check_idle()


def test_b41_a_step_in_flight_gives_nothing_to_a_request_that_ended_meanwhile():
    scheduler = ahead()
    (a,) = add(scheduler, ask("a", 5, stop_token_ids=[9]))
    first, second = scheduler.schedule(), scheduler.schedule()
    (update,) = scheduler.update(first, {"a": [9]})
    assert update.finished
    assert scheduler.has_work  # a step is in flight
    assert scheduler.update(second, {"a": [10]}) == []
    assert a.output_token_ids == [9]
    scheduler.check_idle()


def test_b42_pages_stay_taken_while_a_step_may_write_to_them():
    scheduler = make(num_pages=3, max_model_len=8)
    a, _ = add(scheduler, ask("a", 7), ask("b", 7))
    plan = scheduler.schedule()
    pages = list(a.page_ids)
    assert scheduler.finish("a", ABORTED) is a
    assert scheduler.pool.num_free_pages == 0
    scheduler.check_integrity()
    with pytest.raises(LeakError, match="1 steps in flight, 1 fenced page tables, 2 pages in use"):
        scheduler.finish("b", ABORTED)
        scheduler.check_idle()
    assert scheduler.update(plan, {}) == []
    assert scheduler.pool.num_free_pages == len(pages) == 2
    scheduler.check_idle()


def test_b42_nobody_is_preempted_for_pages_that_would_not_come_free_yet():
    scheduler = ahead(num_pages=5, max_model_len=16)
    a, b = add(scheduler, ask("a", 7, stop_token_ids=[9]), ask("b", 7))
    first = scheduler.schedule()
    second = scheduler.schedule()
    assert len(second.scheduled) == 2
    scheduler.update(first, {"a": [7], "b": [7]})
    third = scheduler.schedule()  # a needs a page, and both are in flight
    assert third.scheduled == [] and third.preempted == []
    scheduler.update(second, {"a": [9], "b": [7]})  # a ends, and b can go on
    fourth = scheduler.schedule()
    assert rows(fourth) == [("b", 8, 1, True)] and fourth.preempted == []
    assert b.num_preemptions == 0 and a.stop_reason == 9


def test_prompt_logprobs_are_limited_by_rows_of_logits():
    scheduler = make(max_num_samples=8, max_num_seqs=3)
    add(scheduler, ask("a", 4), ask("b", 20, prompt_logprobs=0), ask("c", 9))
    # One row each for a, b and what else runs; the other 6, and b's own, score b's prompt.
    assert step(scheduler) == [("a", 0, 4, True), ("b", 0, 7, False)]
    assert step(scheduler) == [("a", 4, 1, True), ("b", 7, 7, False)]
    scheduler.finish("a", ABORTED)
    assert step(scheduler) == [("b", 14, 6, True), ("c", 0, 9, True)]


@pytest.mark.parametrize(("prompt", "num_pages"), [(0, 100), (64, 100), (65, 100), (12, 4)])
def test_a_prompt_that_never_fits_is_refused(prompt, num_pages):
    scheduler = make(num_pages=num_pages)
    with pytest.raises(PromptError, match=f"the prompt has {prompt} tokens"):
        scheduler.add(ask("a", prompt))
    scheduler.check_idle()


def test_the_longest_prompt_that_fits_is_served():
    for num_pages, prompt in ((100, 63), (4, 11)):
        scheduler = make(num_pages=num_pages)
        (a,) = add(scheduler, ask("a", prompt))
        assert step(scheduler) == [("a", 0, prompt, True)]
        assert a.status is RequestStatus.FINISHED_LENGTH_CAPPED


def test_duplicate_ids_are_refused():
    scheduler = make()
    add(scheduler, ask("a"))
    with pytest.raises(DuplicateRequestError, match="'a'"):
        scheduler.add(ask("a"))
    assert [request.request_id for request in scheduler.waiting] == ["a"]


def test_missing_tokens_are_refused_before_anything_changes():
    scheduler = make()
    a, b = add(scheduler, ask("a"), ask("b"))
    plan = scheduler.schedule()
    for sampled in ({"a": [7]}, {"a": [7], "b": []}):
        with pytest.raises(ValueError, match=r"no tokens for \['b'\]"):
            scheduler.update(plan, sampled)
    assert a.output_token_ids == []
    scheduler.finish("b", RequestStatus.FINISHED_ERROR)
    (update,) = scheduler.update(plan, {"a": [7]})
    assert update.request is a and b.output_token_ids == []


def test_rows_say_who_was_admitted():
    scheduler = make(num_pages=6, max_model_len=20)
    _, b = add(scheduler, ask("a", 7), ask("b", 7))
    admitted = []
    for _ in range(12):
        plan = scheduler.schedule()
        admitted += [row.request.request_id for row in plan.scheduled if row.admitted]
        scheduler.update(plan, tokens_for(plan))
        if b.num_preemptions:
            scheduler.finish("a", ABORTED)
    assert admitted == ["a", "b", "b"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_num_batched_tokens": 7}, "max_num_batched_tokens is 7; it must be at least 8"),
        ({"max_num_samples": 7}, "max_num_samples is 7; it must be at least 8"),
        ({"max_model_len": 1}, "max_model_len is 1"),
        ({"policy": "lottery"}, "fcfs, priority"),
        ({"watermark": 1.0}, "watermark is 1.0"),
        ({"enable_chunked_prefill": False, "max_model_len": 65}, "without chunked prefill"),
        ({"max_steps_in_flight": 0}, "max_steps_in_flight is 0"),
    ],
)
def test_contradictory_limits_are_refused(config, message):
    with pytest.raises(EngineConfigError, match=message):
        make(**config)


def test_b45_check_idle_names_what_is_left():
    scheduler = make()
    scheduler.check_idle()
    add(scheduler, ask("a"))
    with pytest.raises(LeakError, match="1 requests, 1 waiting"):
        scheduler.check_idle()
    step(scheduler)
    with pytest.raises(LeakError, match="1 requests, 1 running, 2 pages in use"):
        scheduler.check_idle()
    scheduler.finish("a", ABORTED)
    scheduler.check_idle()
    assert scheduler.stats().kv_usage == 0
