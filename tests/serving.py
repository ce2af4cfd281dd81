"""Ways to talk to the server in tests: in the process, or over a socket with uvicorn in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
from fake_engine import MODEL, FakeEngine

from distaff.runtime.server import PrometheusStatLogger, ServerConfig, bind, build_app
from distaff.runtime.server.serve import Server, url


def application(engine: FakeEngine, **settings: Any):
    config = ServerConfig(**{"served_model_names": (MODEL, "alias"), **settings})
    metrics = PrometheusStatLogger(MODEL, engine.max_model_len)
    engine.stat_loggers.append(metrics)
    return build_app(engine, config, metrics), config


class Client:
    """Requests against an application in this process, each on an event loop of its own."""

    def __init__(self, engine: FakeEngine, **settings: Any) -> None:
        self.engine = engine
        self.app, _ = application(engine, **settings)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=True)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.request("POST", path, **({"json": body} if body is not None else {}), **options)

    def completion(self, prompt: Any = "Hi", **fields: Any) -> dict[str, Any]:
        return ok(self.post("/v1/completions", {"prompt": prompt, **fields}))

    def chat(self, *messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
        return ok(self.post("/v1/chat/completions", {"messages": list(messages) or [USER], **fields}))

    def chunks(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        return events(self.post(path, {**body, "stream": True}))

    def error(self, path: str, body: Any, status: int = 400, **options: Any) -> dict[str, Any]:
        response = self.post(path, body, **options)
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"} and error["message"]
        return error


USER = {"role": "user", "content": "Hi"}


def ok(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return response.json()


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON events of a stream, which must end with [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *data, last = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert last == "[DONE]"
    return [json.loads(line) for line in data]


@contextlib.contextmanager
def running(
    engine: FakeEngine, uvicorn_settings: dict[str, Any] | None = None, **settings: Any
) -> Iterator[tuple[str, Server]]:
    """The URL of a server, and the server; it is stopped as by a signal at the end."""
    app, config = application(engine, **settings)
    sock = bind("127.0.0.1", 0)
    address = url(sock)
    server = Server(app, engine, config, log_level="warning", **(uvicorn_settings or {}))
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            threading.Event().wait(0.01)
        yield address, server
    finally:
        server.handle_exit(15, None)
        thread.join(20)
        assert not thread.is_alive()


@contextlib.contextmanager
def running_server(engine: FakeEngine, **settings: Any) -> Iterator[str]:
    """The URL of a server."""
    with running(engine, **settings) as (address, _):
        yield address
