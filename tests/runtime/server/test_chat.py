"""``/v1/chat/completions``: messages and templates, streams, log-probabilities, what is refused."""

from __future__ import annotations

import pytest
from fake_engine import FakeEngine
from serving import USER, Client

PATH = "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.fixture
def client():
    return Client(FakeEngine())


def prompt_of(client: Client, call: int = -1) -> str:
    return client.engine.tokenizer.decode(client.engine.calls[call].prompt, skip_special_tokens=False)


@pytest.mark.smoke
def test_a_message_is_answered(client):
    body = client.chat(USER)
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "Hello, wörld!", "refusal": None}
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    assert prompt_of(client) == "<user>Hi</s><assistant>"
    assert body["usage"]["prompt_tokens"] == len("<user>Hi") + 1 + len("<assistant>")


def test_tokens_are_limited_by_the_context_unless_told(client):
    client.engine.endless = True
    usage = client.chat(USER)["usage"]
    assert usage["total_tokens"] == client.engine.max_model_len
    assert client.chat(USER, max_tokens=3)["usage"]["completion_tokens"] == 3
    assert client.chat(USER, max_tokens=3, max_completion_tokens=4)["usage"]["completion_tokens"] == 4


def test_a_stream_begins_with_the_role_and_joins_to_the_answer(client):
    first, *chunks = client.chunks(PATH, {"messages": [USER], "n": 1})
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert first["object"] == "chat.completion.chunk"
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert "".join(d.get("content", "") for d in deltas) == "Hello, wörld!"
    assert all("role" not in d for d in deltas)
    assert [c["choices"][0]["finish_reason"] for c in chunks][-2:] == [None, "stop"]


def test_every_chunk_of_a_stream_has_content_and_growing_usage(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = client.chunks(PATH, {"messages": [USER], "max_tokens": 3, "stream_options": options})
    assert [c["choices"][0]["delta"]["content"] for c in chunks] == ["", "H", "e", "l"]
    assert [c["usage"]["completion_tokens"] for c in [*chunks, last]] == [0, 1, 2, 3, 3]


def test_what_was_not_asked_for_is_null(client):
    body = client.chat(USER)
    unasked = (body["prompt_token_ids"], body["prompt_logprobs"], body["choices"][0]["token_ids"])
    assert unasked == (None, None, None) and body["usage"]["prompt_tokens_details"] is None


def test_roles_of_answers(client):
    client = Client(
        client.engine, response_role="robot", chat_template="{{ style }}", default_chat_template_kwargs={"style": "s"}
    )
    assert client.chat(USER)["choices"][0]["message"]["role"] == "robot" and prompt_of(client) == "s"
    assert client.chat(USER, add_generation_prompt=False)["choices"][0]["message"]["role"] == "user"
    client.chat(USER, chat_template_kwargs={"style": "t"})
    assert prompt_of(client) == "t"


def test_every_choice_of_a_stream_has_its_role(client):
    chunks = client.chunks(PATH, {"messages": [USER], "n": 2, "max_tokens": 2})
    roles = [c["choices"][0]["index"] for c in chunks if "role" in c["choices"][0]["delta"]]
    assert sorted(roles) == [0, 1]
    ends = [c["choices"][0]["index"] for c in chunks if c["choices"][0]["finish_reason"]]
    assert sorted(ends) == [0, 1]


def test_logprobs(client):
    content = client.chat(USER, max_tokens=2, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert [e["token"] for e in content] == ["H", "e"]
    assert content[0]["logprob"] == -2.5 and content[0]["bytes"] == [72]
    assert [(t["token"], t["logprob"], t["bytes"]) for t in content[0]["top_logprobs"]] == [
        ("a", -0.5, [97]),
        ("b", -1.5, [98]),
    ]


def test_logprobs_of_parts_of_a_character_have_its_bytes(client):
    client.engine.reply = "ö"
    content = client.chat(USER, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert bytes(b for e in content for b in e["bytes"]).decode() == "ö"
    assert content[0]["top_logprobs"] == []


def test_logprobs_in_a_stream(client):
    chunks = client.chunks(PATH, {"messages": [USER], "max_tokens": 2, "logprobs": True, "top_logprobs": 1})
    tokens = [c["choices"][0]["logprobs"]["content"][0]["token"] for c in chunks[1:]]
    assert tokens == ["H", "e"]


def test_prompt_logprobs_and_token_ids(client):
    body = client.chat(USER, max_tokens=1, prompt_logprobs=1, return_token_ids=True)
    assert body["prompt_logprobs"][0] is None and "117" in body["prompt_logprobs"][1]
    assert body["prompt_token_ids"][:2] == list(b"<u") and body["choices"][0]["token_ids"] == [72]
    first, *chunks = client.chunks(PATH, {"messages": [USER], "max_tokens": 2, "return_token_ids": True})
    assert first["prompt_token_ids"] == body["prompt_token_ids"] and "token_ids" not in first["choices"][0]
    assert all("prompt_token_ids" not in c for c in chunks)
    assert [c["choices"][0]["token_ids"] for c in chunks] == [[72], [101]]


def test_text_parts_are_joined(client):
    client.chat({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]})
    assert prompt_of(client) == "<user>a\nb</s><assistant>"


def test_earlier_tool_calls_and_their_results(client):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 5}'}}
    client.chat(
        USER,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "ok"},
        tools=[TOOL],
        tool_choice="none",
    )
    assert prompt_of(client) == "[tool f]<user>Hi</s><assistant>[call 5]</s><tool>ok</s><assistant>"


def test_template_options(client):
    client.chat(USER, add_generation_prompt=False)
    assert prompt_of(client) == "<user>Hi</s>"
    client.chat(USER, chat_template_kwargs={"style": "brief"})
    assert prompt_of(client) == "<user>Hi</s>[brief]<assistant>"


@pytest.mark.parametrize("stream", [False, True])
def test_the_last_message_is_continued(client, stream):
    messages = [USER, {"role": "assistant", "content": "Well,"}]
    body = {"messages": messages, "continue_final_message": True, "echo": True, "max_tokens": 5}
    if stream:
        deltas = [c["choices"][0]["delta"] for c in client.chunks(PATH, body)]
        text = "".join(d.get("content", "") for d in deltas)
    else:
        text = client.chat(*messages, **{k: v for k, v in body.items() if k != "messages"})["choices"][0]["message"][
            "content"
        ]
    assert prompt_of(client) == "<user>Hi</s><assistant>Well,"
    assert text == "Well,Hello"


def test_templates_of_requests_need_trust(client):
    body = {"messages": [USER], "chat_template": "T{{ messages[0].content }}"}
    assert client.error(PATH, body)["param"] == "chat_template"
    Client(client.engine, trust_request_chat_template=True).chat(**{"chat_template": body["chat_template"]})
    assert prompt_of(client) == "THi"


def test_the_servers_template_replaces_the_models(client):
    Client(client.engine, chat_template="S{{ messages[0].content }}").chat(USER)
    assert prompt_of(client) == "SHi"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content.nothing.more }}", "nothing"),
        ("{% if %}", "not valid Jinja"),
    ],
)
def test_templates_that_fail_are_a_400(client, template, why):
    error = Client(client.engine, chat_template=template).error(PATH, {"messages": [USER]})
    assert error["param"] == "messages" and why in error["message"]


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [USER, {"role": "user", "content": [IMAGE]}]}, "messages[1].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"tools": []}, "tools"),
        ({"tools": [TOOL]}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "auto"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": [{"type": "function"}], "tool_choice": "none"}, "tools[0].function"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_json": {}}, "guided_json"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"mm_processor_kwargs": {}}, "mm_processor_kwargs"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"max_completion_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 2**64}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"299999": 1}}, "logit_bias"),
        ({"logit_bias": {"5": "x"}}, "logit_bias.5"),
        ({"priority": 1}, "priority"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"bad_words": [""]}, "bad_words"),
    ],
)
def test_what_is_refused_names_its_field(client, fields, param):
    error = client.error(PATH, {"messages": [USER], **fields})
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert not client.engine.running and (not client.engine.calls or param in ("logit_bias", "logprobs"))


def test_harmless_values_of_refused_fields_pass(client):
    client.chat(
        USER,
        response_format={"type": "text"},
        use_beam_search=False,
        tool_choice="none",
        parallel_tool_calls=True,
        functions=[],
        function_call="none",
        modalities=["text"],
        logprobs="true",
    )


def test_a_prompt_that_is_too_long(client):
    error = client.error(PATH, {"messages": [{"role": "user", "content": "x" * 200}]})
    assert error["message"].startswith(
        "This model's maximum context length is 128 tokens. However, your request has 218"
    )
    assert error["code"] == "context_length_exceeded"
    error = client.error(PATH, {"messages": [USER], "max_tokens": 120})
    assert "you requested 120 output tokens and your prompt contains 20 input tokens" in error["message"]
