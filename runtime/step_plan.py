"""What one step computes, and the budget it is drawn up under.

Every running request has one token and one row of logits of the step set aside, so a long prompt never holds up those
that decode; prompts share what is left, in order.
"""

from __future__ import annotations

import dataclasses

from distaff.runtime.request import Request


@dataclasses.dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """One row of a step: the tokens at positions ``start : start + num_tokens`` of the request.

    ``samples``: these are the last known tokens, so the step gives the next one. ``admitted``: the request's first row
    since it entered the batch, new or resumed after preemption. With ``prompt_logprobs`` the logits at all positions
    of the row that lie in the prompt may be read; recomputation after preemption passes them once more. A position
    at ``len(request.token_ids)`` or beyond is a token that a step in flight will sample.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool
    admitted: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """Rows of a step: first ``num_decodes`` rows of one token, then longer ones, each in order of service.

    ``num_tokens`` is the sum over rows, ``preempted`` who lost their pages since the plan before; after a reset of the
    prefix cache they may be admitted again at once. A plan without rows needs neither execution nor update.
    """

    step: int
    scheduled: list[ScheduledRequest]
    num_decodes: int
    num_tokens: int
    preempted: list[Request]


@dataclasses.dataclass(frozen=True, slots=True)
class RequestUpdate:
    """What a step gave a request: its new tokens, up to and with the one that ended it if it is ``finished``."""

    request: Request
    new_token_ids: list[int]
    finished: bool


class StepDraft:
    """A plan in the making. ``spare_tokens`` and ``spare_logits`` are what is not set aside for anyone."""

    def __init__(self, max_tokens: int, max_logits: int, num_running: int) -> None:
        self.spare_tokens = max_tokens - num_running
        self.spare_logits = max_logits - num_running
        self._decodes: list[ScheduledRequest] = []
        self._prefills: list[ScheduledRequest] = []
        self._num_tokens = 0

    def set_aside(self) -> bool:
        """Sets aside one token and one row of logits for one more request; False if there is none."""
        if self.spare_tokens < 1 or self.spare_logits < 1:
            return False
        self.spare_tokens -= 1
        self.spare_logits -= 1
        return True

    def give_back(self) -> None:
        """Returns what was set aside for a request that does not take part."""
        self.spare_tokens += 1
        self.spare_logits += 1

    def limit(self, request: Request, start: int, num_tokens: int) -> int:
        """How many of ``num_tokens`` tokens from ``start`` on the budget allows; at least one."""
        if num_tokens == 1:
            return 1
        num_tokens = min(num_tokens, 1 + self.spare_tokens)
        if _reads_prompt_logits(request, start):
            num_tokens = min(num_tokens, 1 + self.spare_logits)
        return num_tokens

    def take(self, request: Request, num_tokens: int, num_known: int, admitted: bool = False) -> None:
        """Adds the next ``num_tokens`` tokens of a request that has one token set aside."""
        start = request.num_computed_tokens
        samples = start + num_tokens == num_known
        row = ScheduledRequest(request, start, num_tokens, samples, admitted)
        (self._decodes if num_tokens == 1 else self._prefills).append(row)
        self._num_tokens += num_tokens
        self.spare_tokens -= num_tokens - 1
        if _reads_prompt_logits(request, start):
            self.spare_logits -= num_tokens - 1

    def plan(self, step: int, preempted: list[Request]) -> StepPlan:
        """The finished plan."""
        return StepPlan(step, self._decodes + self._prefills, len(self._decodes), self._num_tokens, preempted)


def _reads_prompt_logits(request: Request, start: int) -> bool:
    return request.sampling_params.prompt_logprobs is not None and start < request.num_prompt_tokens
