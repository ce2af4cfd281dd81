"""Prometheus metrics under vLLM's names, labels and buckets, so that existing dashboards and alerts work.

Source: https://docs.vllm.ai/en/stable/usage/metrics/
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    gc_collector,
    platform_collector,
    process_collector,
)

from distaff.runtime.stats import FinishedStats, StepStats

FINISH_REASONS = ("stop", "length", "abort", "error")

_TTFT_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0,
    2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKEN_SECONDS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_SECONDS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

MetricT = TypeVar("MetricT", Counter, Gauge, Histogram)


def one_two_five(limit: int) -> list[float]:
    """1, 2, 5, 10, 20, 50, … up to ``limit``."""
    steps = (m * 10**e for e in range(len(str(limit))) for m in (1, 2, 5))
    return [float(step) for step in steps if step <= limit]


class PrometheusStatLogger:
    """Writes what the engine measures into ``registry``; also holds the server's own count of HTTP requests."""

    def __init__(self, model_name: str, max_model_len: int, registry: CollectorRegistry | None = None) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        process_collector.ProcessCollector(registry=self.registry)
        platform_collector.PlatformCollector(registry=self.registry)
        gc_collector.GCCollector(registry=self.registry)
        self.http_requests = Counter(
            "http_requests", "HTTP requests answered.", ("handler", "method", "status"), registry=self.registry
        )
        self._labels = {"model_name": model_name, "engine": "0"}
        self._lengths = one_two_five(max_model_len)
        self._make_state()
        self._make_request_histograms()

    def _make_state(self) -> None:
        self._running = self._gauge("num_requests_running", "Requests in model execution batches.")
        self._waiting = self._gauge("num_requests_waiting", "Requests waiting to be processed.")
        self._waiting_for_room = Gauge(
            "vllm:num_requests_waiting_by_reason",
            "Requests waiting to be processed, by what they wait for.",
            (*self._labels, "reason"),
            registry=self.registry,
        ).labels(**self._labels, reason="capacity")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.")
        self._compiles = self._gauge("programs_compiled", "Programs compiled since the engine started.", "distaff")
        self._cache_queries = self._counter("prefix_cache_queries", "Prefix cache queries, in tokens.")
        self._cache_hits = self._counter("prefix_cache_hits", "Prefix cache hits, in tokens.")
        self._preemptions = self._counter("num_preemptions", "Preemptions.")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens computed.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._step_tokens = self._histogram("iteration_tokens_total", "Tokens of one engine step.", _STEP_TOKENS)
        success = Counter(
            "vllm:request_success",
            "Finished requests by reason.",
            (*self._labels, "finished_reason"),
            registry=self.registry,
        )
        self._success = {r: success.labels(**self._labels, finished_reason=r) for r in FINISH_REASONS}

    def _make_request_histograms(self) -> None:
        seconds, lengths = _REQUEST_SECONDS, self._lengths
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.", _TTFT_SECONDS)
        self._gap = self._histogram("inter_token_latency_seconds", "Time between tokens.", _TOKEN_SECONDS)
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds", "Mean time between a request's tokens.", _TOKEN_SECONDS
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to end.", seconds)
        self._queue = self._histogram("request_queue_time_seconds", "Time spent waiting.", seconds)
        self._inference = self._histogram("request_inference_time_seconds", "First scheduled to end.", seconds)
        self._prefill = self._histogram("request_prefill_time_seconds", "First scheduled to first token.", seconds)
        self._decode = self._histogram("request_decode_time_seconds", "First token to last token.", seconds)
        self._request_prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", lengths)
        self._request_output = self._histogram("request_generation_tokens", "Tokens generated by a request.", lengths)
        self._max_output = self._histogram(
            "request_max_num_generation_tokens", "Most tokens that a request could generate.", lengths
        )
        self._preempted = self._histogram(
            "request_num_preemptions", "Preemptions of a request.", (0, 1, 2, 5, 10, 20, 50, 100)
        )
        self._n = self._histogram("request_params_n", "The n parameter.", (1, 2, 5, 10, 20))
        self._max_tokens = self._histogram("request_params_max_tokens", "The max_tokens parameter.", lengths)

    def _gauge(self, name: str, help: str, prefix: str = "vllm") -> Gauge:
        return self._bound(Gauge(f"{prefix}:{name}", help, tuple(self._labels), registry=self.registry))

    def _counter(self, name: str, help: str) -> Counter:
        return self._bound(Counter(f"vllm:{name}", help, tuple(self._labels), registry=self.registry))

    def _histogram(self, name: str, help: str, buckets: Sequence[float]) -> Histogram:
        labels = tuple(self._labels)
        return self._bound(Histogram(f"vllm:{name}", help, labels, registry=self.registry, buckets=buckets))

    def _bound(self, metric: MetricT) -> MetricT:
        return metric.labels(**self._labels)

    def set_cache_config(self, **settings: Any) -> None:
        """Tells about the KV cache in the labels of ``vllm:cache_config_info``; to be called once."""
        labels = {"engine": self._labels["engine"]} | {name: str(value) for name, value in settings.items()}
        info = Gauge("vllm:cache_config_info", "Settings of the KV cache.", tuple(labels), registry=self.registry)
        info.labels(**labels).set(1)

    def set_gauges(self, stats: StepStats) -> None:
        """What is the case now; requests may come and go between steps."""
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._waiting_for_room.set(stats.waiting)
        self._kv_usage.set(stats.kv_usage)
        self._compiles.set(stats.compiles)

    def on_step(self, stats: StepStats) -> None:
        """Counters of a step."""
        self._cache_queries.inc(stats.prefix_cache_queries)
        self._cache_hits.inc(stats.prefix_cache_hits)
        self._preemptions.inc(stats.preemptions)
        self._prompt_tokens.inc(stats.prompt_tokens)
        self._generation_tokens.inc(stats.generation_tokens)
        self._step_tokens.observe(stats.prompt_tokens + stats.generation_tokens)

    def on_first_token(self, seconds: float) -> None:
        """Time to a request's first token."""
        self._ttft.observe(seconds)

    def on_token_gap(self, seconds: float) -> None:
        """Time since the token before."""
        self._gap.observe(seconds)

    def on_finished(self, stats: FinishedStats) -> None:
        """One completion; times that it never reached are left out."""
        self._success[stats.finish_reason].inc()
        self._e2e.observe(stats.e2e_seconds)
        self._request_prompt.observe(stats.prompt_tokens)
        self._request_output.observe(stats.generation_tokens)
        self._n.observe(stats.n)
        self._preempted.observe(stats.preemptions)
        if stats.max_tokens is not None:
            self._max_tokens.observe(stats.max_tokens)
            self._max_output.observe(stats.max_tokens)
        inference = None
        if stats.prefill_seconds is not None:
            inference = stats.prefill_seconds + (stats.decode_seconds or 0.0)
        for histogram, value in (
            (self._queue, stats.queue_seconds),
            (self._prefill, stats.prefill_seconds),
            (self._decode, stats.decode_seconds),
            (self._inference, inference),
            (self._tpot, stats.mean_inter_token_latency),
        ):
            if value is not None:
                histogram.observe(value)
