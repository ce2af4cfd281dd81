"""One completion on its way through the engine: what was asked, what is known so far, and its state."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import TypeAlias

from distaff.runtime.bad_words import TokenSequences
from distaff.runtime.kv_pool import PageTable
from distaff.runtime.page_hash import CacheKeys, LoRAKey, MediaKey
from distaff.runtime.sampling_params import SamplingParams

StopReason: TypeAlias = int | str | None


class InvalidTransitionError(RuntimeError):
    """A request was moved between two states that do not follow each other."""


class RequestStatus(enum.IntEnum):
    """Where a request stands; everything after PREEMPTED is final."""

    WAITING = 0
    WAITING_FOR_GRAMMAR = 1
    WAITING_FOR_REMOTE_KV = 2
    RUNNING = 3
    PREEMPTED = 4
    FINISHED_STOPPED = 5
    FINISHED_LENGTH_CAPPED = 6
    FINISHED_ABORTED = 7
    FINISHED_ERROR = 8

    @property
    def is_finished(self) -> bool:
        """Whether the state is final."""
        return self > RequestStatus.PREEMPTED

    @property
    def is_ready(self) -> bool:
        """Whether a request in the queue can be started now."""
        return self in (RequestStatus.WAITING, RequestStatus.PREEMPTED)

    @property
    def finish_reason(self) -> str | None:
        """OpenAI's word for a final state, None for the others."""
        return _FINISH_REASONS.get(self)


_FINISH_REASONS = {
    RequestStatus.FINISHED_STOPPED: "stop",
    RequestStatus.FINISHED_LENGTH_CAPPED: "length",
    RequestStatus.FINISHED_ABORTED: "abort",
    RequestStatus.FINISHED_ERROR: "error",
}

# From every state that is not final a request may also finish.
_NEXT = {
    RequestStatus.WAITING: {
        RequestStatus.RUNNING,
        RequestStatus.WAITING_FOR_GRAMMAR,
        RequestStatus.WAITING_FOR_REMOTE_KV,
    },
    RequestStatus.WAITING_FOR_GRAMMAR: {RequestStatus.WAITING, RequestStatus.WAITING_FOR_REMOTE_KV},
    RequestStatus.WAITING_FOR_REMOTE_KV: {RequestStatus.WAITING},
    RequestStatus.RUNNING: {RequestStatus.PREEMPTED},
    RequestStatus.PREEMPTED: {RequestStatus.RUNNING},
}


@dataclasses.dataclass(eq=False, slots=True)
class Request:
    """A request of one completion (``n`` is fanned out before).

    ``priority``: lower is served first. ``arrival_time`` is in seconds of the engine's clock.
    ``eos_token_ids`` end the output unless ``ignore_eos``. The fields below are kept by the scheduler.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling_params: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    arrival_time: float = 0.0
    priority: int = 0
    cache_salt: str | None = None
    lora: LoRAKey | None = None
    media: tuple[MediaKey, ...] = ()
    # Token sequences of the words that must not be generated.
    bad_words: TokenSequences = ()

    status: RequestStatus = RequestStatus.WAITING
    # The stop token id or stop string that ended it; None for the end of sequence.
    stop_reason: StopReason = None
    output_token_ids: list[int] = dataclasses.field(default_factory=list)
    # Prompt and output.
    token_ids: list[int] = dataclasses.field(init=False)
    # Output tokens that steps in flight will give: known to come, of unknown value.
    num_pending_tokens: int = 0
    # Tokens whose KV rows are computed, or will be by the steps in flight.
    num_computed_tokens: int = 0
    # Prompt tokens found in the prefix cache when it first ran.
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    # The last step that it was scheduled in; steps count from 1.
    last_step: int = 0
    # Its place in the order of service; smaller is served first and preempted last.
    rank: tuple[float, float, str] = (0, 0, "")
    pages: PageTable = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)
        self.pages = PageTable(CacheKeys(self.cache_salt, self.lora, self.media))

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def page_ids(self) -> list[int]:
        """Page of each block of its tokens; 0, the null page, where no attention window reaches any more."""
        return self.pages.page_ids

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Tokens that may not be sampled before ``min_tokens``: stop tokens and, ignored or not, end of sequence."""
        return self.eos_token_ids.union(self.sampling_params.stop_token_ids)

    def transition(self, status: RequestStatus) -> None:
        """Moves to ``status``; raises `InvalidTransitionError` where that does not follow the present one."""
        follows = status.is_finished and not self.status.is_finished
        if not follows and status not in _NEXT.get(self.status, ()):
            raise InvalidTransitionError(
                f"request {self.request_id!r} cannot go from {self.status.name} to {status.name}"
            )
        self.status = status

    def append(self, token_id: int) -> None:
        """Adds a sampled token."""
        self.output_token_ids.append(token_id)
        self.token_ids.append(token_id)

    def check_stop(self, max_model_len: int) -> tuple[RequestStatus, StopReason] | None:
        """The final state and stop reason if the newest output token ends the request, else None.

        As in vLLM an end token counts before a length that is reached with it, and a stop token id that is also the
        end of sequence gives no stop reason. ``min_tokens`` is not looked at: sampling masks end tokens until then.
        """
        params, token_id = self.sampling_params, self.output_token_ids[-1]
        if token_id in self.eos_token_ids and not params.ignore_eos:
            return RequestStatus.FINISHED_STOPPED, None
        if token_id in params.stop_token_ids:
            return RequestStatus.FINISHED_STOPPED, token_id
        if len(self.output_token_ids) == params.max_tokens or len(self.token_ids) >= max_model_len:
            return RequestStatus.FINISHED_LENGTH_CAPPED, None
        return None
