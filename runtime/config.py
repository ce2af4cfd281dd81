"""The engine's settings, and how they fit what an artifact was compiled for."""

from __future__ import annotations

import dataclasses

from distaff.compiler.artifact import Manifest
from distaff.runtime.errors import EngineConfigError
from distaff.runtime.scheduler import SchedulerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of an `Engine`; None takes what the artifact allows at most.

    ``max_model_len`` limits prompt plus output of a request, in tokens; ``max_num_seqs`` the requests in one step;
    ``max_num_batched_tokens`` the tokens in one step. ``num_pages`` or ``kv_cache_bytes`` size the KV pool, or else
    ``gpu_memory_utilization``, the share (0..1] of the device's memory for it and the weights.
    ``long_prefill_token_threshold`` caps a prompt's tokens a step while others wait (0: no cap). ``max_waiting`` limits
    the queue (None: endless). ``seed`` starts the numbers that requests without a seed draw from. ``max_logprobs`` is
    the most top log-probabilities a request may ask for (-1: as many as there are tokens). With ``forbid_compiles``
    serving raises where it would have to compile; ``warm_up`` prepares every program before the first request, with a
    bar if ``progress``.
    """

    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    num_pages: int | None = None
    kv_cache_bytes: int | None = None
    gpu_memory_utilization: float | None = None
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    scheduling_policy: str = "fcfs"
    long_prefill_token_threshold: int = 0
    max_waiting: int | None = None
    seed: int = 0
    max_logprobs: int = 20
    forbid_compiles: bool = False
    warm_up: bool = True
    progress: bool = False

    def scheduler_config(self, manifest: Manifest) -> SchedulerConfig:
        """The limits with every None filled in; raises `EngineConfigError` naming the one that cannot be met."""
        if self.max_waiting is not None and self.max_waiting < 1:
            raise EngineConfigError(f"max_waiting is {self.max_waiting}; it must be at least 1, or None for no limit")
        share = self.gpu_memory_utilization
        if share is not None and not 0 < share <= 1:
            raise EngineConfigError(f"gpu_memory_utilization is {share}; it must be above 0 and at most 1")
        return SchedulerConfig(
            max_num_seqs=_within("max_num_seqs", self.max_num_seqs, manifest.max_batch),
            max_num_batched_tokens=_within(
                "max_num_batched_tokens", self.max_num_batched_tokens, manifest.max_step_tokens
            ),
            max_model_len=_within("max_model_len", self.max_model_len, manifest.max_model_len),
            max_num_samples=manifest.max_samples,
            long_prefill_token_threshold=self.long_prefill_token_threshold,
            policy=self.scheduling_policy,
            enable_chunked_prefill=self.enable_chunked_prefill,
        )

    def top_logprobs(self, manifest: Manifest) -> int:
        """The most top log-probabilities of a request."""
        if self.max_logprobs < -1:
            raise EngineConfigError(f"max_logprobs is {self.max_logprobs}; it must be at least 0, or -1 for all tokens")
        return manifest.vocab_size if self.max_logprobs == -1 else min(self.max_logprobs, manifest.vocab_size)


def _within(name: str, wanted: int | None, limit: int) -> int:
    if wanted is None:
        return limit
    if not 1 <= wanted <= limit:
        raise EngineConfigError(
            f"{name} is {wanted}, but this artifact serves 1 to {limit}; lower it, or compile the model for more"
        )
    return wanted
