"""The server behind uvicorn: OpenAI's own client, clients that leave, shutdown."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time

import httpx
import openai
import pytest
from fake_engine import FakeEngine, dead, overloaded
from serving import running, running_server

USER = {"role": "user", "content": "Hi"}


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def client(engine):
    with (
        running_server(engine, api_keys=("key",)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0, timeout=20) as client,
    ):
        yield client


def eventually(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_openais_client_chats(client):
    answer = client.chat.completions.create(model="fake", messages=[USER], logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == "Hello, wörld!"
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].token == "a"
    assert answer.usage == openai.types.CompletionUsage(completion_tokens=14, prompt_tokens=20, total_tokens=34)
    stream = client.chat.completions.create(
        model="fake", messages=[USER], stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello, wörld!"
    assert chunks[-1].usage.completion_tokens == 14 and chunks[0].choices[0].delta.role == "assistant"


def test_openais_client_completes(client):
    answer = client.completions.create(model="fake", prompt="Hi", echo=True, logprobs=1, extra_body={"top_k": 5})
    assert answer.choices[0].text == "HiHello, wörld!" and answer.choices[0].logprobs.tokens[:2] == ["H", "i"]
    assert "".join(c.choices[0].text for c in client.completions.create(model="fake", prompt="Hi", stream=True))
    assert [m.id for m in client.models.list()] == ["fake", "alias"]


def test_openais_client_knows_the_errors(client, engine):
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="Hi")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="fake", prompt="x" * 500)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    engine.fails = overloaded()
    with pytest.raises(openai.RateLimitError) as limited:
        client.completions.create(model="fake", prompt="Hi")
    assert limited.value.response.headers["Retry-After"] == "3"
    engine.fails = dead()
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="fake", prompt="Hi")
    engine.fails, engine.breaks_after = None, 3
    with pytest.raises(openai.APIError, match="unwell"):
        list(client.completions.create(model="fake", prompt="Hi", stream=True))


def test_text_with_unicode_line_ends_survives_a_stream(client, engine):
    engine.reply = "a\u2028b\u0085c\r\nd\x0ce"
    chunks = client.completions.create(model="fake", prompt="Hi", stream=True)
    assert "".join(c.choices[0].text for c in chunks) == engine.reply


def post(url: str, body: dict[str, object]) -> socket.socket:
    """A connection on which a request has been sent."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("started", [False, True])
def test_a_client_that_leaves_aborts_its_requests(engine, prompts, stream, started):
    engine.endless, engine.delay, engine.max_model_len = True, 0.01, 100_000
    if not started:
        engine.gate = asyncio.Event()  # no token ever comes
    with running_server(engine) as url:
        connection = post(url, {"prompt": ["Hi"] * prompts, "stream": stream, "max_tokens": 90_000})
        eventually(lambda: len(engine.running) == prompts)
        if stream and started:
            assert connection.recv(10_000)
        assert httpx.get(f"{url}/load").json() == {"server_load": 1}
        connection.close()
        eventually(lambda: len(engine.aborted) == prompts)
        assert not engine.running
        eventually(lambda: httpx.get(f"{url}/load").json() == {"server_load": 0})


def test_a_reader_that_stops_reading_does_not_disturb_others(engine):
    engine.endless, engine.max_model_len = True, 2_000_000
    with running_server(engine, shutdown_grace_seconds=0.1) as url:
        sleeper = post(url, {"prompt": "Hi", "stream": True, "max_tokens": 1_000_000})
        sleeper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        eventually(lambda: len(engine.running) == 1)
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "Hi", "max_tokens": 5}, timeout=20)
        assert answer.json()["usage"]["completion_tokens"] == 5
        sleeper.close()
        eventually(lambda: not engine.running)


def test_shutdown_lets_running_requests_end(engine):
    engine.delay = 0.02
    result = {}

    def stream(url):
        result["text"] = httpx.post(f"{url}/v1/completions", json={"prompt": "Hi", "stream": True}, timeout=20).text

    with running_server(engine) as url:
        thread = threading.Thread(target=stream, args=(url,))
        thread.start()
        eventually(lambda: engine.running)
    thread.join(20)
    assert '"finish_reason":"stop"' in result["text"] and result["text"].endswith("data: [DONE]\n\n")
    assert engine.shut_down.is_set() and not engine.aborted


@pytest.mark.parametrize("stream", [False, True])
def test_shutdown_aborts_what_outlives_the_grace_period(engine, stream):
    engine.endless, engine.delay, engine.max_model_len = True, 0.01, 100_000
    result = {}

    def request(url):
        body = {"prompt": "Hi", "stream": stream, "max_tokens": 90_000}
        result["text"] = httpx.post(f"{url}/v1/completions", json=body, timeout=20).text

    with running_server(engine, shutdown_grace_seconds=0.2) as url:
        thread = threading.Thread(target=request, args=(url,))
        thread.start()
        eventually(lambda: engine.running)
    thread.join(20)
    assert '"finish_reason":"abort"' in result["text"]
    assert not stream or result["text"].endswith("data: [DONE]\n\n")
    assert engine.shut_down.is_set() and not engine.running


def test_a_second_signal_does_not_wait(engine):
    engine.endless, engine.delay, engine.max_model_len = True, 0.01, 100_000
    began = time.monotonic()
    with running(engine, shutdown_grace_seconds=60) as (url, server):
        connection = post(url, {"prompt": "Hi", "stream": True, "max_tokens": 90_000})
        eventually(lambda: engine.running)
        server.handle_exit(2, None)  # and another one at the end of the block
    assert time.monotonic() - began < 10 and not engine.running
    connection.close()


def test_behind_a_proxy_that_adds_a_path(engine):
    with running_server(engine, root_path="/api", api_keys=("key",)) as url:
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer key"}).status_code == 200


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with the openssl command")
def test_https(engine, tmp_path, caplog):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = ["-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "1"]
    subprocess.run(["openssl", "req", "-x509", *made, *names], check=True, capture_output=True)
    caplog.set_level("INFO", "distaff")
    with running(engine, {"ssl_keyfile": key, "ssl_certfile": certificate}) as (address, _):
        trusting = ssl.create_default_context(cafile=certificate)
        secure = address.replace("http:", "https:")
        assert httpx.get(f"{secure}/health", verify=trusting).status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{address}/health")
    assert f"ready: {secure} serves" in caplog.text
