"""What the scheduler makes of the pool: cached prefixes, windows, and whom it admits with the pages that are free."""

from scheduling import ABORTED, add, ask, make, rows, step, tokens_for

from distaff.runtime.request import RequestStatus


def test_b18_prompt_logprobs_read_nothing_from_the_cache_but_write_to_it():
    scheduler = make(caching=True)
    prompt = list(range(9))
    add(scheduler, ask("a", prompt))
    step(scheduler)
    (b,) = add(scheduler, ask("b", prompt, prompt_logprobs=1))
    assert ("b", 0, 9, True) in step(scheduler)
    assert b.num_cached_tokens == 0
    assert scheduler.stats().prefix_cache.requests == 1
    scheduler.finish("a", ABORTED)
    scheduler.finish("b", ABORTED)
    assert scheduler.reset_prefix_cache()
    add(scheduler, ask("c", prompt, prompt_logprobs=1))
    step(scheduler)
    (d,) = add(scheduler, ask("d", prompt))
    assert ("d", 8, 1, True) in step(scheduler)
    assert d.num_cached_tokens == 8


def test_b17_the_id_of_a_request_does_not_matter_to_the_cache():
    scheduler = make(caching=True)
    prompt = list(range(9))
    add(scheduler, ask("a", prompt))
    step(scheduler)
    (b,) = add(scheduler, ask("another", prompt))
    step(scheduler)
    assert b.num_cached_tokens == 8


def test_b15_salted_requests_share_only_among_themselves():
    scheduler = make(caching=True)
    prompt, cached = list(range(9)), []
    for name, salt in (("a", "x"), ("b", "y"), ("c", "x"), ("d", None)):
        (request,) = add(scheduler, ask(name, prompt, cache_salt=salt))
        step(scheduler)
        cached.append(request.num_cached_tokens)
    assert cached == [0, 0, 8, 0]


def test_b20_a_prompt_is_not_found_before_its_step_is_done():
    scheduler = make(caching=True)
    prompt = list(range(9))
    a, b = add(scheduler, ask("a", prompt), ask("b", [*prompt[:4], *range(20, 32)]))
    assert step(scheduler) == [("a", 0, 9, True), ("b", 0, 16, True)]
    assert not set(a.page_ids) & set(b.page_ids)


def test_who_shares_most_of_a_prompt_waits_for_the_one_that_computes_it():
    scheduler = make(caching=True, max_num_batched_tokens=12)
    shared = list(range(16))
    a, b = add(scheduler, ask("a", [*shared, 50]), ask("b", [*shared, 60, 61]))
    add(scheduler, ask("c", 3))
    assert step(scheduler) == [("a", 0, 12, False)]
    # a's first pages are known now, but its fourth is most of what b would compute.
    assert step(scheduler) == [("a", 12, 5, True), ("c", 0, 3, True)]
    assert step(scheduler) == [("a", 17, 1, True), ("c", 3, 1, True), ("b", 16, 2, True)]
    assert set(a.page_ids[:4]) == set(b.page_ids[:4])


def test_nobody_waits_for_a_prompt_that_is_no_longer_computed():
    scheduler = make(caching=True, max_num_batched_tokens=8)
    add(scheduler, ask("a", range(20)), ask("b", range(20)))
    assert step(scheduler) == [("a", 0, 8, False)]
    scheduler.finish("a", ABORTED)
    assert step(scheduler) == [("b", 8, 8, False)]


def test_nobody_waits_for_someone_after_it():
    scheduler = make(caching=True, max_num_batched_tokens=12, policy="priority")
    add(scheduler, ask("a", range(20), priority=2))
    assert step(scheduler) == [("a", 0, 12, False)]
    add(scheduler, ask("b", range(20), priority=1))
    assert step(scheduler) == [("a", 12, 8, True), ("b", 12, 4, False)]


def test_output_is_cached_too():
    scheduler = make(caching=True)
    add(scheduler, ask("a", [1, 2, 3], max_tokens=6))
    while scheduler.has_work:
        step(scheduler, token=7)
    (b,) = add(scheduler, ask("b", [1, 2, 3, 7, 7, 7, 7, 7, 7]))
    step(scheduler)
    assert b.num_cached_tokens == 8


def test_b21_reset_while_running_preempts_all_on_request():
    scheduler = make(caching=True)
    prompt = list(range(9))
    a, b = add(scheduler, ask("a", prompt), ask("b"))
    plan = scheduler.schedule()
    assert not scheduler.reset_prefix_cache(preempt_running=True)  # a step is in flight
    scheduler.update(plan, tokens_for(plan))
    assert not scheduler.reset_prefix_cache()
    assert a.status is b.status is RequestStatus.RUNNING
    assert scheduler.reset_prefix_cache(preempt_running=True)
    assert scheduler.waiting == [a, b] and scheduler.running == []
    plan = scheduler.schedule()
    assert rows(plan) == [("a", 0, 10, True), ("b", 0, 6, True)]
    assert plan.preempted == [b, a]
    scheduler.update(plan, tokens_for(plan))
    assert a.output_token_ids == [7, 7]


def test_b23_a_windowed_request_runs_in_few_pages():
    scheduler = make(num_pages=6, windows=(6,), max_num_batched_tokens=8, max_model_len=64)
    (a,) = add(scheduler, ask("a", 40))
    while scheduler.has_work:
        step(scheduler)
    assert len(a.token_ids) == 64 and a.num_preemptions == 0
    scheduler.check_idle()


def test_b23_a_windowed_request_is_admitted_only_if_its_most_pages_fit():
    scheduler = make(num_pages=7, windows=(6,), max_num_batched_tokens=8, max_model_len=64)
    add(scheduler, ask("a", 13))
    step(scheduler)
    step(scheduler)
    assert scheduler.pool.num_free_pages == 4
    add(scheduler, ask("b", 40))  # its first step takes two, later ones up to five
    assert step(scheduler) == [("a", 13, 1, True)]
    scheduler.finish("a", ABORTED)
    assert step(scheduler) == [("b", 0, 8, False)]


def test_b23_the_most_pages_of_a_window_grow_with_steps_in_flight():
    for steps, max_len in ((1, 64), (2, 20)):  # five and seven pages of five
        config = {"max_num_batched_tokens": 8, "max_steps_in_flight": steps}
        assert make(num_pages=6, windows=(6,), **config).max_len == max_len


def test_b26_statistics_count_a_request_once_and_apart_after_preemption():
    scheduler = make(num_pages=6, caching=True, max_model_len=20)
    prompt = list(range(8))
    (a,) = add(scheduler, ask("a", prompt))
    step(scheduler)
    (b,) = add(scheduler, ask("b", [*prompt[:4], 50, 51, 52, 53, 54, 55, 56, 57, 58]))
    for _ in range(3):  # it does not fit; each time it is looked up again
        assert [name for name, *_ in step(scheduler)] == ["a"]
    scheduler.finish("a", ABORTED)
    step(scheduler)
    stats = scheduler.stats().prefix_cache
    assert (stats.requests, stats.queries, stats.hits) == (2, 8 + 13, 4)
    assert (a.num_cached_tokens, b.num_cached_tokens) == (0, 4)
    scheduler.reset_prefix_cache(preempt_running=True)
    step(scheduler)
    stats = scheduler.stats().prefix_cache
    assert (stats.requests, stats.queries, stats.hits) == (2, 8 + 13, 4)
    assert (stats.preempted_requests, stats.preempted_queries, stats.preempted_hits) == (1, 14, 0)
    assert b.num_cached_tokens == 4


def test_b13_without_caching_there_are_no_statistics():
    scheduler = make()
    add(scheduler, ask("a"))
    step(scheduler)
    assert scheduler.stats().prefix_cache.requests == 0


def test_admission_waits_for_pages_of_the_whole_prompt_and_of_its_first_token():
    scheduler = make(num_pages=8, max_num_batched_tokens=8, max_model_len=28)  # seven pages
    add(scheduler, ask("a", 7), ask("b", 20), ask("c", 3))
    # b would begin, but its 21 tokens take six pages of five; c, which would fit, does not overtake it.
    assert step(scheduler) == [("a", 0, 7, True)]
    scheduler.finish("a", ABORTED)
    assert step(scheduler) == [("b", 0, 8, False)]
    assert scheduler.pool.num_free_pages == 1


def test_admission_leaves_the_watermark_to_those_that_run():
    scheduler = make(num_pages=11, watermark=0.2, max_model_len=40)
    add(scheduler, ask("a", 11))  # 3 pages
    step(scheduler)
    add(scheduler, ask("b", 23))  # 6 pages, and 2 must stay
    assert len(step(scheduler)) == 1
    scheduler.finish("b", ABORTED)
    add(scheduler, ask("c", 15))  # 4 pages
    assert len(step(scheduler)) == 2
    # Alone, a request may take everything.
    scheduler = make(num_pages=11, watermark=0.2, max_model_len=40)
    add(scheduler, ask("a", 39))
    assert len(step(scheduler)) == 1
