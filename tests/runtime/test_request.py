import itertools

import pytest

from distaff.runtime.request import InvalidTransitionError, Request, RequestStatus
from distaff.runtime.sampling_params import SamplingParams

FINAL = [status for status in RequestStatus if status.is_finished]


def make(output=(), eos=(), **params):
    request = Request("r", [1, 2, 3], SamplingParams(**params), eos_token_ids=frozenset(eos))
    for token in output:
        request.append(token)
    return request


def test_tokens_are_prompt_then_output():
    request = make([7, 8])
    assert request.token_ids == [1, 2, 3, 7, 8]
    assert request.output_token_ids == [7, 8]
    assert request.num_prompt_tokens == 3


def test_finish_reasons_are_those_of_openai():
    assert {s.name: s.finish_reason for s in FINAL} == {
        "FINISHED_STOPPED": "stop",
        "FINISHED_LENGTH_CAPPED": "length",
        "FINISHED_ABORTED": "abort",
        "FINISHED_ERROR": "error",
    }
    assert all(status.finish_reason is None for status in RequestStatus if not status.is_finished)


def test_b38_every_live_state_may_finish_and_no_final_state_may_change():
    for before, after in itertools.product(RequestStatus, RequestStatus):
        request = make()
        request.status = before
        if before.is_finished or before == after:
            with pytest.raises(InvalidTransitionError, match=f"from {before.name} to {after.name}"):
                request.transition(after)
            assert request.status is before
        elif after.is_finished:
            request.transition(after)
            assert request.status is after


def test_states_follow_one_another():
    S = RequestStatus
    request = make()
    for status in (S.WAITING_FOR_GRAMMAR, S.WAITING_FOR_REMOTE_KV, S.WAITING, S.RUNNING, S.PREEMPTED, S.RUNNING):
        request.transition(status)
    with pytest.raises(InvalidTransitionError):
        request.transition(S.WAITING)
    assert [s.is_ready for s in S if not s.is_finished] == [True, False, False, False, True]


def test_b36_length_caps():
    assert make([5], max_tokens=2).check_stop(100) is None
    assert make([5, 6], max_tokens=2).check_stop(100) == (RequestStatus.FINISHED_LENGTH_CAPPED, None)
    assert make([5], max_tokens=None).check_stop(5) is None
    assert make([5, 6], max_tokens=None).check_stop(5) == (RequestStatus.FINISHED_LENGTH_CAPPED, None)


def test_b36_stop_tokens_name_the_token_and_eos_does_not():
    assert make([5], stop_token_ids=[5]).check_stop(100) == (RequestStatus.FINISHED_STOPPED, 5)
    assert make([5], eos=[4, 5]).check_stop(100) == (RequestStatus.FINISHED_STOPPED, None)
    assert make([5], eos=[5], stop_token_ids=[5]).check_stop(100) == (RequestStatus.FINISHED_STOPPED, None)


def test_b36_an_end_token_that_is_also_the_last_one_allowed_counts_as_stop():
    assert make([5], eos=[5], max_tokens=1).check_stop(100) == (RequestStatus.FINISHED_STOPPED, None)


def test_b36_ignore_eos_masks_eos_only():
    assert make([5], eos=[5], ignore_eos=True).check_stop(100) is None
    stopped = make([5], eos=[5], ignore_eos=True, stop_token_ids=[5]).check_stop(100)
    assert stopped == (RequestStatus.FINISHED_STOPPED, 5)


def test_b37_a_stop_token_sampled_before_min_tokens_still_ends_the_request():
    assert make([5], eos=[5], min_tokens=3).check_stop(100) == (RequestStatus.FINISHED_STOPPED, None)


def test_b37_end_tokens_to_mask_hold_eos_even_if_ignored():
    assert make(eos=[4], stop_token_ids=[5], ignore_eos=True).end_token_ids == {4, 5}
