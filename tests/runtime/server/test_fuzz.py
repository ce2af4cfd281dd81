"""Whatever a client sends, it is never the server's fault: no body gives a 5xx."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import httpx
from fake_engine import FakeEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import application

from distaff.runtime.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

PATHS = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
VALID = {
    "/v1/completions": {"prompt": "Hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [72]},
}
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.integers(),
    st.sampled_from([2**31, 2**32, 2**63 - 1, 2**63, -(2**63), 10**400, 299, 300]),
    st.floats(),
    st.floats(0, 1),
)
WORDS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["none", "auto", "text", "type", "role", "content", "user", "function", "name", "5", "-1", "\ud800"]
    ),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.one_of(st.sampled_from(["user", "assistant", "tool"]), VALUES), "content": VALUES},
        optional={"tool_calls": VALUES, "name": VALUES},
    ),
    max_size=3,
)


@st.composite
def requests(draw):
    path = draw(st.sampled_from(sorted(PATHS)))
    names = [field.name for field in dataclasses.fields(PATHS[path])] + ["anything"]
    fields = draw(st.dictionaries(st.sampled_from(names), VALUES, max_size=4))
    body = {**(VALID[path] if draw(st.booleans()) else {}), **fields}
    if draw(st.booleans()):
        body["messages"] = draw(MESSAGES)
    return path, body


def send(path: str, content: bytes) -> httpx.Response:
    async def post() -> httpx.Response:
        app, _ = application(FakeEngine("ok"), trust_request_chat_template=True, priority_scheduling=True)
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post(path, content=content)

    return asyncio.run(post())


def check(response: httpx.Response) -> None:
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code == 200:
        assert '"error"' not in response.text
    else:
        assert response.json()["error"]["message"]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(requests())
def test_no_json_gives_a_5xx(request):
    path, body = request
    check(send(path, json.dumps(body).encode()))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(PATHS)), st.binary(max_size=60))
def test_no_bytes_give_a_5xx(path, content):
    check(send(path, content))
