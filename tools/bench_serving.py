"""bench-serving: drives any OpenAI-compatible server with a workload and measures throughput and latencies.

Every request is a stream of ``/v1/completions``, greedy and with the end of sequence ignored, so that each engine
generates the same number of tokens; servers that do not know ``ignore_eos`` may stop earlier, which the report shows.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import click
import httpx
from rich.console import Console

from distaff.tools.bench_report import BenchReport
from distaff.tools.workload import WorkItem
from distaff.tools.workload_options import requested_items, workload_options

_HELP = """Measures an OpenAI-compatible server.

\b
Examples:
  python -m distaff.tools.bench_serving --base-url http://127.0.0.1:8000
  python -m distaff.tools.bench_serving --request-rate 4 --max-concurrency 32 --json result.json --plot result.png
  python -m distaff.tools.bench_serving --workload shared-prefix --prefix-len 512 --num-prompts 200
"""


class ServerError(Exception):
    """The server cannot be reached, or answers what a benchmark cannot use."""


@dataclasses.dataclass
class Measurement:
    """One request; times in seconds from when it was sent. ``gaps`` lie between the pieces of its stream."""

    time_to_first_token: float = 0.0
    latency: float = 0.0
    gaps: list[float] = dataclasses.field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def time_per_output_token(self) -> float | None:
        """Mean over all tokens but the first; None if there are no others."""
        others = self.output_tokens - 1
        return (self.latency - self.time_to_first_token) / others if others > 0 else None


async def stream_events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON events of a stream up to [DONE]; raises `ServerError` for an error event or a stream without end."""
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            content = line.removeprefix(b"data:").strip()
            if not line.startswith(b"data:"):
                continue
            if content == b"[DONE]":
                return
            event = json.loads(content)
            if "error" in event:
                raise ServerError(str(event["error"].get("message", event["error"])))
            yield event
    raise ServerError("the stream ended without [DONE]")


async def send(client: httpx.AsyncClient, model: str, item: WorkItem) -> Measurement:
    """Runs one request to its end; failures are noted in the measurement."""
    body = {
        "model": model,
        "prompt": item.prompt,
        "max_tokens": item.output_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    result = Measurement()
    began = latest = time.perf_counter()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise ServerError(
                    f"status {response.status_code}: {(await response.aread())[:500].decode(errors='replace')}"
                )
            async for event in stream_events(response):
                now = time.perf_counter()
                if event.get("usage"):
                    result.prompt_tokens = event["usage"]["prompt_tokens"]
                    result.output_tokens = event["usage"]["completion_tokens"]
                if not event["choices"]:
                    continue
                if result.latency:
                    result.gaps.append(now - latest)
                else:
                    result.time_to_first_token = now - began
                latest = now
                result.latency = now - began
    except (ServerError, httpx.HTTPError, ValueError, KeyError) as error:
        result.error = f"{type(error).__name__}: {error}"
    return result


async def run(
    client: httpx.AsyncClient,
    model: str,
    items: Sequence[WorkItem],
    *,
    request_rate: float = math.inf,
    max_concurrency: int | None = None,
    seed: int = 0,
) -> tuple[list[Measurement], float]:
    """Sends all requests, at Poisson times of ``request_rate`` a second (infinite: all at once); and the total time.

    No more than ``max_concurrency`` run at a time; the time that a request waits for that does not count as its own.
    """
    rng = random.Random(seed)
    room = asyncio.Semaphore(max_concurrency or len(items))

    async def one(item: WorkItem, delay: float) -> Measurement:
        await asyncio.sleep(delay)
        async with room:
            return await send(client, model, item)

    delay, delays = 0.0, []
    for _ in items:
        delays.append(delay)
        delay += 0.0 if math.isinf(request_rate) else rng.expovariate(request_rate)
    began = time.perf_counter()
    results = await asyncio.gather(*(one(item, delay) for item, delay in zip(items, delays, strict=True)))
    return results, time.perf_counter() - began


def report(model: str, results: Sequence[Measurement], duration: float) -> BenchReport:
    """Sums up the requests that succeeded."""
    good = [result for result in results if result.error is None]
    prompt, output = sum(r.prompt_tokens for r in good), sum(r.output_tokens for r in good)
    facts: dict[str, Any] = {
        "model": model,
        "requests": len(good),
        "failed requests": len(results) - len(good),
        "duration [s]": duration,
        "prompt tokens": prompt,
        "output tokens": output,
        "requests/s": len(good) / duration,
        "output tokens/s": output / duration,
        "total tokens/s": (prompt + output) / duration,
    }
    seconds = {
        "TTFT": [r.time_to_first_token for r in good],
        "TPOT": [tpot for r in good if (tpot := r.time_per_output_token) is not None],
        "ITL": [gap for r in good for gap in r.gaps],
        "E2E": [r.latency for r in good],
    }
    return BenchReport("serving", facts, seconds)


async def served_model(client: httpx.AsyncClient) -> str:
    """The first model of the server; raises `ServerError`."""
    try:
        response = await client.get("/v1/models")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise ServerError(f"{client.base_url} does not list its models ({error}); is it running?") from None


async def bench(flags: dict[str, Any], items: Sequence[WorkItem]) -> tuple[BenchReport, list[Measurement]]:
    """The whole benchmark: warm-up requests, which do not count, then the workload."""
    headers = {"Authorization": f"Bearer {flags['api_key']}"} if flags["api_key"] else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    url = flags["base_url"].rstrip("/").removesuffix("/v1")
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=flags["timeout"]) as client:
        model = flags["model"] or await served_model(client)
        short = WorkItem(items[0].prompt[:8], 8)  # too short to leave a prefix in a cache
        warm, _ = await run(client, model, [short] * flags["num_warmups"])
        if warm and warm[0].error:
            raise ServerError(warm[0].error)
        results, duration = await run(
            client,
            model,
            items,
            request_rate=flags["request_rate"],
            max_concurrency=flags["max_concurrency"],
            seed=flags["seed"],
        )
    return report(model, results, duration), results


@click.command(help=_HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--base-url", default="http://127.0.0.1:8000", show_default=True, help="The server.")
@click.option("--model", help="Name of the model.  [default: the server's first]")
@click.option("--api-key", envvar="OPENAI_API_KEY", help="Sent as bearer token.")
@click.option("--request-rate", type=click.FloatRange(min=0, min_open=True), default=math.inf, show_default=True,
              help="Requests a second, at Poisson times.")  # fmt: skip
@click.option("--max-concurrency", type=click.IntRange(min=1), help="Most requests at a time.")
@click.option("--num-warmups", type=click.IntRange(min=0), default=1, show_default=True, help="Uncounted requests.")
@click.option("--timeout", type=float, default=600.0, show_default=True, help="Seconds without a sign of the server.")
@workload_options
def main(**flags: Any) -> None:
    """Entry point of the command line; exit code 1 if a request failed."""
    items = requested_items(flags)
    console = Console()
    try:
        result, measurements = asyncio.run(bench(flags, items))
    except ServerError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    result.deliver(console, flags["json_path"], flags["plot_path"])
    errors = [m.error for m in measurements if m.error is not None]
    if errors:
        click.echo(f"error: {len(errors)} requests failed, the first with {errors[0]}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
