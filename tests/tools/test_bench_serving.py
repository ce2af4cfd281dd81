"""bench-serving against the real server on a fake engine."""

from __future__ import annotations

import asyncio
import json
import time

import httpx
import pytest
from click.testing import CliRunner
from fake_engine import FakeEngine
from serving import running_server

from distaff.tools.bench_serving import Measurement, ServerError, main, report, run, stream_events
from distaff.tools.workload import WorkItem


def bench(url, *flags):
    return CliRunner().invoke(main, ["--base-url", url, *map(str, flags)])


@pytest.fixture
def engine():
    engine = FakeEngine(max_model_len=4000)
    engine.endless, engine.delay = True, 0.001
    return engine


def test_a_benchmark_counts_and_writes(engine, tmp_path):
    flags = [
        "--num-prompts",
        6,
        "--input-len",
        3,
        9,
        "--output-len",
        4,
        12,
        "--max-concurrency",
        3,
        "--request-rate",
        200,
    ]
    files = ["--json", tmp_path / "r.json", "--plot", tmp_path / "r.png", "--save-dataset", tmp_path / "w.jsonl"]
    with running_server(engine) as url:
        result = bench(url, *flags, *files)
    assert result.exit_code == 0, result.output
    measured = json.loads((tmp_path / "r.json").read_text())
    items = [json.loads(line) for line in (tmp_path / "w.jsonl").read_text().splitlines()]
    assert measured["requests"] == 6 and measured["failed requests"] == 0 and measured["model"] == "fake"
    assert measured["output tokens"] == sum(item["output_tokens"] for item in items)
    assert measured["prompt tokens"] == sum(len(item["prompt"]) for item in items)
    for name in ("TTFT", "TPOT", "ITL", "E2E"):
        values = measured["milliseconds"][name]
        assert 0 < values["p50"] <= values["p90"] <= values["p99"] and name in result.output
    assert len(measured["seconds"]["ITL"]) <= measured["output tokens"] - 6
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    warmup, *calls = engine.calls
    assert len(warmup.prompt) == 8 and len(calls) == 6
    assert all(call.params.ignore_eos and call.params.is_greedy for call in calls)


def test_the_same_workload_can_be_sent_again(engine, tmp_path):
    with running_server(engine) as url:
        first = bench(url, "--num-prompts", 3, "--output-len", 1, 5, "--save-dataset", tmp_path / "w.jsonl")
        second = bench(url, "--dataset-path", tmp_path / "w.jsonl", "--num-warmups", 0)
    assert first.exit_code == second.exit_code == 0
    prompts = [call.prompt for call in engine.calls]
    assert sorted(prompts[1:4]) == sorted(prompts[4:])


def test_no_more_run_at_a_time_than_allowed(engine):
    most = 0

    async def watched():
        nonlocal most
        transport = httpx.MockTransport(answer)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await run(client, "m", [WorkItem("a", 2)] * 10, max_concurrency=3)

    under_way = 0

    async def answer(request):
        nonlocal most, under_way
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.005)
        under_way -= 1
        usage = b'data: {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}\n\n'
        return httpx.Response(200, content=b'data: {"choices": [{}]}\n\n' + usage + b"data: [DONE]\n\n")

    results, _ = asyncio.run(watched())
    assert most == 3 and [r.output_tokens for r in results] == [2] * 10 and all(r.error is None for r in results)


def test_request_rate_spreads_the_requests():
    async def answer(request):
        return httpx.Response(500)

    async def timed(rate):
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://x") as client:
            began = time.perf_counter()
            await run(client, "m", [WorkItem("a", 1)] * 10, request_rate=rate)
            return time.perf_counter() - began

    assert asyncio.run(timed(50)) > 0.05 > asyncio.run(timed(1e9))


def test_failures_are_counted_and_told(engine):
    engine.breaks_after = 2
    with running_server(engine) as url:
        result = bench(url, "--num-prompts", 2, "--num-warmups", 0, "--output-len", 4, 4)
    assert result.exit_code == 1 and "2 requests failed" in result.output and "unwell" in result.output


def test_a_server_that_is_not_there():
    result = bench("http://127.0.0.1:9")
    assert result.exit_code == 1 and result.output.startswith("error: http://127.0.0.1:9")


@pytest.mark.parametrize(
    "flags", [["--num-prompts", 0], ["--request-rate", 0], ["--input-len", 5, 3], ["--dataset-path", "/nowhere"]]
)
def test_wrong_usage_exits_with_2(flags):
    assert bench("http://127.0.0.1:9", *flags).exit_code == 2


def test_numbers_are_what_was_measured():
    results = [
        Measurement(0.1, 0.5, [0.1, 0.3], prompt_tokens=10, output_tokens=3),
        Measurement(0.3, 0.3, [], prompt_tokens=20, output_tokens=1),
        Measurement(error="gone"),
    ]
    measured = report("m", results, 2.0)
    assert measured.facts["output tokens/s"] == 2 and measured.facts["total tokens/s"] == 17
    assert measured.facts["failed requests"] == 1
    summary = measured.summary()
    assert summary["TTFT"]["mean"] == pytest.approx(200) and summary["TPOT"]["p99"] == pytest.approx(200)
    assert summary["ITL"]["p50"] == pytest.approx(200) and summary["E2E"]["mean"] == pytest.approx(400)


@pytest.mark.parametrize(
    ("content", "why"),
    [(b'data: {"error": {"message": "bad"}}\n\n', "bad"), (b'data: {"choices": []}\n\n', r"without \[DONE\]")],
)
def test_streams_that_fail(content, why):
    async def read():
        return [event async for event in stream_events(httpx.Response(200, content=content))]

    with pytest.raises(ServerError, match=why):
        asyncio.run(read())
