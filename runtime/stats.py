"""Measurements that the engine hands out: plain values, so that loggers and metric exporters stay outside it."""

from __future__ import annotations

import dataclasses
from typing import Protocol


@dataclasses.dataclass(frozen=True, slots=True)
class StepStats:
    """One engine step; counts are of this step, gauges are taken after it."""

    running: int = 0  # requests that hold pages
    waiting: int = 0  # requests in the queue
    kv_usage: float = 0.0  # share of pages in use, 0..1
    preemptions: int = 0
    prompt_tokens: int = 0  # prompt tokens computed
    generation_tokens: int = 0  # tokens sampled
    prefix_cache_queries: int = 0  # prompt tokens looked up
    prefix_cache_hits: int = 0  # prompt tokens found
    compiles: int = 0  # programs compiled since the engine started
    step_seconds: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class FinishedStats:
    """One finished completion; all times in seconds, None where the request never came that far."""

    finish_reason: str
    prompt_tokens: int
    generation_tokens: int
    cached_tokens: int
    queue_seconds: float | None  # arrival to first scheduled
    prefill_seconds: float | None  # first scheduled to first token
    decode_seconds: float | None  # first token to last token
    e2e_seconds: float  # arrival to end
    time_to_first_token: float | None  # arrival to first token
    mean_inter_token_latency: float | None  # decode_seconds / (generation_tokens - 1)
    n: int
    max_tokens: int | None
    preemptions: int = 0


class StatLogger(Protocol):
    """Receives measurements on the engine's thread; must be quick and must not raise."""

    def on_step(self, stats: StepStats) -> None:
        """After every step."""

    def on_first_token(self, seconds: float) -> None:
        """A request's first token, ``seconds`` after its arrival."""

    def on_token_gap(self, seconds: float) -> None:
        """A later token, ``seconds`` after the one before it."""

    def on_finished(self, stats: FinishedStats) -> None:
        """A completion ended, for whatever reason."""
