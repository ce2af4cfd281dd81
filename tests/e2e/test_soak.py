"""500 requests of random sizes, with cancels, disconnects and bad bodies, leave every page free and no queue filled."""

import asyncio
import contextlib
import threading
import time

import httpx
import model_zoo as zoo
import numpy as np
import pytest
from fake_engine import TEMPLATE, byte_tokenizer
from tally import Tally

from distaff.compiler import compile_model
from distaff.compiler.buckets import parse_buckets
from distaff.runtime import AsyncEngine, Engine, EngineConfig
from distaff.runtime.server import PrometheusStatLogger, ServerConfig, bind, build_app
from distaff.runtime.server.serve import Server, url

REQUESTS = 500
BAD_BODIES = [
    b"",
    b"{",
    b"[]",
    b'"text"',
    b'{"prompt": 5}',
    b'{"prompt": [999999]}',
    b'{"prompt": []}',
    b'{"prompt": [1], "max_tokens": -1}',
    b'{"prompt": [1], "temperature": "hot"}',
    b'{"prompt": [1], "n": 1e9}',
    b'{"prompt": [1], "logit_bias": {"x": 1}}',
    b'{"prompt": [1], "model": "unknown"}',
    b"\xff\xfe",
]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A compiled two-layer model behind a real socket, with a pool that is too small for what is asked of it."""
    folder = tmp_path_factory.mktemp("soak") / "artifact"
    buckets = parse_buckets("decode=1,8 mixed=32x8")
    compile_model(
        zoo.decoder(zoo.causal_where), zoo.parameters(), output=folder, max_model_len=64, page_size=4, buckets=buckets
    )
    metrics, tally = PrometheusStatLogger("tiny", 64), Tally()
    config = EngineConfig(num_pages=40, max_waiting=600)
    engine = Engine(folder, config, tokenizer=byte_tokenizer(), stat_loggers=[metrics, tally])
    asynchronous = AsyncEngine(engine)
    settings = ServerConfig(served_model_names=("tiny",), chat_template=TEMPLATE, shutdown_grace_seconds=1)
    sock = bind("127.0.0.1", 0)
    server = Server(build_app(asynchronous, settings, metrics), asynchronous, settings, log_level="error")
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield url(sock), engine, tally
    server.handle_exit(15, None)
    thread.join(30)
    assert not thread.is_alive()


async def one(http: httpx.AsyncClient, rng: np.random.Generator) -> str:
    """Sends one request of a random kind and says how it went."""
    kind = rng.choice(["whole", "stream", "leave", "cancel", "bad"], p=[0.3, 0.2, 0.2, 0.15, 0.15])
    await asyncio.sleep(rng.random() * 4)
    if kind == "bad":
        body = BAD_BODIES[rng.integers(len(BAD_BODIES))]
        answer = await http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert 400 <= answer.status_code < 500, (body, answer.status_code, answer.text)
        assert answer.json()["error"]["message"]
        return "bad"
    prompt = rng.integers(3, zoo.VOCAB, rng.integers(1, 40)).tolist()
    temperature, n = ((0.0, 1), (1.0, 1), (1.0, 2))[rng.integers(3)]
    size = {"max_tokens": int(rng.integers(1, 64 - len(prompt))), "n": n}
    body = {"prompt": prompt, "temperature": temperature, "ignore_eos": True, **size}
    if kind == "whole":
        answer = await http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == body["max_tokens"] * body["n"]
    elif kind == "cancel":
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(http.post("/v1/completions", json=body), timeout=rng.random() * 0.3)
    else:
        async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            assert answer.status_code == 200
            seen = 0
            async for _ in answer.aiter_lines():
                seen += 1
                if kind == "leave" and seen > rng.integers(1, 6):
                    break
    return str(kind)


def test_nothing_is_left_behind(served):
    address, engine, tally = served
    rng = np.random.default_rng()
    limits = httpx.Limits(max_connections=None)

    async def everything() -> list[str]:
        async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as http:
            return await asyncio.gather(*(one(http, r) for r in rng.spawn(REQUESTS)))

    kinds = asyncio.run(everything())
    assert {*kinds} == {"whole", "stream", "leave", "cancel", "bad"}
    deadline = time.monotonic() + 30
    while engine.has_unfinished and time.monotonic() < deadline:
        time.sleep(0.05)
    stats = engine.stats
    assert not engine.has_unfinished
    engine.check_idle()
    assert (stats.running, stats.waiting, stats.kv_usage) == (0, 0, 0.0)
    assert tally.preemptions > 0, "the pool was small enough to matter"
    answer = httpx.post(f"{address}/v1/completions", json={"prompt": [5, 9], "max_tokens": 4, "temperature": 0})
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] >= 1
