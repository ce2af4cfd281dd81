"""Everything but generation: models, health, tokenising, API keys, ids, CORS, metrics, bad bodies."""

from __future__ import annotations

import pytest
from fake_engine import FakeEngine, dead, overloaded
from prometheus_client.parser import text_string_to_metric_families
from serving import USER, Client, ok

COMPLETIONS = "/v1/completions"


@pytest.fixture
def client():
    return Client(FakeEngine())


def test_models(client):
    body = ok(client.get("/v1/models"))
    assert body["object"] == "list" and [m["id"] for m in body["data"]] == ["fake", "alias"]
    card = body["data"][0]
    assert (card["object"], card["root"], card["max_model_len"]) == ("model", "fake/model", 128)
    assert ok(client.get("/v1/models/alias"))["id"] == "alias"
    assert client.get("/v1/models/a/b").json()["error"]["code"] == "model_not_found"


@pytest.mark.smoke
def test_health_version_load(client):
    for path in ("/health", "/ping"):
        assert client.get(path).status_code == 200
    assert client.post("/ping").status_code == 200
    assert ok(client.get("/version"))["version"]
    assert ok(client.get("/load")) == {"server_load": 0}
    client.engine.errored = True
    response = client.get("/health")
    assert response.status_code == 503 and response.json()["error"]["code"] == "engine_dead"


def test_tokenize_and_detokenize(client):
    assert ok(client.post("/tokenize", {"prompt": "Hé", "return_token_strs": True})) == {
        "count": 3,
        "max_model_len": 128,
        "tokens": [72, 195, 169],
        "token_strs": ["H", "Ã", "©"],
    }
    chat = ok(client.post("/tokenize", {"messages": [USER], "model": "fake"}))
    assert chat["tokens"] == [*b"<user>Hi", 256, *b"<assistant>"] and chat["token_strs"] is None
    assert ok(client.post("/detokenize", {"tokens": [72, 195, 169]})) == {"prompt": "Hé"}
    assert ok(client.post("/detokenize", {"tokens": []})) == {"prompt": ""}
    assert client.error("/tokenize", {})["param"] == "prompt"
    assert client.error("/tokenize", {"prompt": "a", "messages": [USER]})["param"] == "prompt"
    assert client.error("/detokenize", {})["param"] == "tokens"
    assert client.error("/detokenize", {"tokens": [300]})["param"] == "tokens"
    assert client.error("/detokenize", {"tokens": [1], "model": "x"}, 404)["param"] == "model"


def test_api_keys_guard_v1_alone():
    client = Client(FakeEngine(), api_keys=("one", "two"))
    for path in ("/health", "/metrics", "/version", "/load"):
        assert client.get(path).status_code == 200
    for headers in ({}, {"Authorization": "Bearer three"}, {"Authorization": "two"}, {"Authorization": "Basic two"}):
        response = client.get("/v1/models", headers=headers)
        assert response.status_code == 401, headers
        assert response.json()["error"]["code"] == "invalid_api_key"
        for path in (COMPLETIONS, "/invocations"):
            assert client.post(path, {"prompt": "Hi"}, headers=headers).status_code == 401
    assert not client.engine.calls
    for headers in ({"Authorization": "Bearer one"}, {"Authorization": "bearer two"}):
        assert client.get("/v1/models", headers=headers).status_code == 200


def test_cors(client):
    headers = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    guarded = Client(client.engine, api_keys=("k",), allowed_origins=("http://page",))
    assert guarded.request("OPTIONS", COMPLETIONS, headers=headers).status_code == 200
    assert guarded.request("OPTIONS", COMPLETIONS, headers=headers | {"Origin": "http://other"}).status_code == 400
    response = client.get("/health", headers={"Origin": "http://anyone"})
    assert response.headers["Access-Control-Allow-Origin"] == "*"


def test_request_ids_go_back_if_the_server_says_so(client):
    assert "X-Request-Id" not in client.get("/health", headers={"X-Request-Id": "abc"}).headers
    client = Client(client.engine, enable_request_id_headers=True, api_keys=("k",))
    assert client.get("/v1/models").headers["X-Request-Id"]
    assert client.get("/health", headers={"X-Request-Id": "abc"}).headers["X-Request-Id"] == "abc"
    for bad in ("x" * 129, "é".encode("latin-1"), ""):
        given = client.get("/health", headers={"X-Request-Id": bad}).headers["X-Request-Id"]
        assert len(given) == 32
    assert len(client.get("/nowhere").headers["X-Request-Id"]) == 32


def test_wrong_paths_and_methods_are_error_objects(client):
    missing = client.get("/v1/nothing")
    assert missing.status_code == 404 and "/v1/nothing" in missing.json()["error"]["message"]
    wrong = client.get(COMPLETIONS)
    assert wrong.status_code == 405 and wrong.json()["error"]["code"] == "method_not_allowed"
    assert wrong.headers["Allow"] == "POST"


def test_unknown_models_are_a_404(client):
    error = client.error(COMPLETIONS, {"prompt": "Hi", "model": "gpt"}, 404)
    assert error == {
        "message": "The model `gpt` does not exist.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b'"x"',
        b"null",
        b"\xff\xfe\xfa",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": -Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "temperature": ' + b"9" * 1000 + b"}",
        b"[" * 100_000,
        b'{"prompt": "a", "x": ' + b"[" * 100_000,
        b'{"prompt": [[72], "a"]}',
        b'{"prompt": ["a", 5]}',
        b'{"prompt": [1.5]}',
        b'{"prompt": [true]}',
        b'{"prompt": [-1]}',
        b'{"prompt": [1e300]}',
        b'{"prompt": [300]}',
        b'{"prompt": []}',
        b'{"prompt": [[]]}',
        b'{"prompt": ""}',
        b'{"prompt": {}}',
        b"{}",
    ],
    ids=lambda body: repr(body[:40]),
)
def test_bad_bodies_are_a_400(client, body):
    client.error(COMPLETIONS, None, content=body)
    assert not client.engine.calls


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": None, "prompt_embeds": []}, "Either prompt or prompt_embeds must be provided and non-empty."),
        ({"prompt": []}, "Either prompt or prompt_embeds must be provided and non-empty."),
        ({"prompt": ""}, "decoder prompt cannot be empty"),
        ({"prompt": [999999]}, "999999 is out of vocabulary"),
        ({"prompt": [[-1]]}, "greater than or equal to 0"),
        ({"logit_bias": {"bad1": 1, "5": 1, "bad2": 2}}, "bad1, bad2"),
    ],
)
def test_errors_say_what_clients_of_vllm_look_for(client, fields, message):
    assert message in client.error(COMPLETIONS, {"prompt": "Hi", **fields})["message"]


def test_numbers_out_of_range_have_a_code(client):
    for seed, code in ((2**63, "less_than_equal"), (-(2**63) - 1, "greater_than_equal")):
        error = client.error(COMPLETIONS, {"prompt": "Hi", "seed": seed})
        assert error["code"] == code and code in error["message"]


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain; charset=utf-8"])
def test_bodies_that_are_no_json_are_a_415(client, kind):
    error = client.error(COMPLETIONS, None, 415, content=b'{"prompt": "Hi"}', headers={"Content-Type": kind})
    assert error["code"] == "unsupported_media_type" and not client.engine.calls
    for good in ("application/json; charset=utf-8", "application/vnd.api+json"):
        ok(client.post(COMPLETIONS, content=b'{"prompt": "Hi"}', headers={"Content-Type": good}))


def test_invocations_are_chats_or_completions(client):
    for path, body in (("/v1/chat/completions", {"messages": [USER]}), (COMPLETIONS, {"prompt": "Hi"})):
        direct, invoked = ok(client.post(path, body)), ok(client.post("/invocations", body))
        assert (direct["object"], direct["choices"]) == (invoked["object"], invoked["choices"])
    assert client.error("/invocations", {})["param"] == "prompt"
    client.error("/invocations", [])


def test_the_tokenizer_tells_about_itself_on_demand(client):
    assert client.get("/tokenizer_info").status_code == 404
    info = ok(Client(client.engine, enable_tokenizer_info_endpoint=True).get("/tokenizer_info"))
    assert info["tokenizer_class"] and info["eos_token"] == "</s>" and "{% for m in" in info["chat_template"]
    assert info["added_tokens_decoder"] == {"256": {"content": "</s>", "special": True}}


def test_large_bodies_are_a_413(client):
    client = Client(client.engine, max_body_bytes=100)
    client.completion("Hi")
    assert client.error(COMPLETIONS, {"prompt": "x" * 100}, 413)["code"] == "body_too_large"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"prompt_embeds": "AA"}, "prompt_embeds"),
        ({"truncation_side": "top"}, "truncation_side"),
        ({"length_penalty": 2}, "length_penalty"),
        ({"kv_transfer_params": {}}, "kv_transfer_params"),
        ({"thinking_token_budget": 5}, "thinking_token_budget"),
        ({"n": 2, "prompt": ["x"] * 600}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 127}, "input_tokens"),
        ({"max_tokens": 2**70}, "max_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -2}, "logprobs"),
        ({"echo": "yes"}, "echo"),
        ({"stop_token_ids": [300]}, "stop_token_ids"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"stream_options": {}}, "stream_options"),
        ({"n": 2, "temperature": 0}, "n"),
    ],
)
def test_what_completions_refuse_names_its_field(client, fields, param):
    assert client.error(COMPLETIONS, {"prompt": "Hi", **fields})["param"] == param
    assert not client.engine.running


@pytest.mark.parametrize("stream", [False, True])
def test_overload_says_when_to_come_back(client, stream):
    client.engine.fails = overloaded()
    response = client.post(COMPLETIONS, {"prompt": "Hi", "stream": stream})
    assert response.status_code == 429 and response.headers["Retry-After"] == "3"
    assert response.json()["error"]["code"] == "engine_overloaded"


@pytest.mark.parametrize("stream", [False, True])
def test_a_dead_engine_is_a_503(client, stream):
    client.engine.fails = dead()
    error = client.error(COMPLETIONS, {"prompt": "Hi", "stream": stream}, 503)
    assert "boom" in error["message"] and error["type"] == "server_error"


@pytest.mark.parametrize("stream", [False, True])
def test_an_unexpected_error_is_a_500_and_the_server_goes_on(client, stream, caplog):
    client.engine.fails = RuntimeError("a secret")
    error = client.error(COMPLETIONS, {"prompt": "Hi", "stream": stream}, 500)
    assert error["type"] == "server_error" and "secret" not in error["message"]
    assert "a secret" in caplog.text
    client.engine.fails = None
    client.completion("Hi")


@pytest.mark.parametrize("prompt", ["Hi", ["Hi", "Ho"]])
def test_a_generation_that_fails_is_a_500(client, prompt):
    client.engine.breaks_after = 2
    error = client.error(COMPLETIONS, {"prompt": prompt}, 500)
    assert error["message"] == "Internal server error: the model is unwell"
    assert not client.engine.running


@pytest.mark.parametrize("how", [None, dead(), RuntimeError("a secret")])
def test_a_stream_that_fails_ends_with_an_error_event(client, how):
    client.engine.breaks_after, client.engine.break_with = 2, how
    *chunks, last = client.chunks(COMPLETIONS, {"prompt": ["Hi", "Ho"]})
    assert len(chunks) >= 2 and all("choices" in c for c in chunks)
    assert last["error"]["type"] == "server_error" and "secret" not in last["error"]["message"]
    assert not client.engine.running


def test_metrics_have_vllms_names(client):
    client.completion("Hi")
    client.get("/nowhere")
    text = client.get("/metrics").text
    families = {f.name: f for f in text_string_to_metric_families(text)}
    labels = {"model_name": "fake", "engine": "0"}

    def value(family: str, sample: str, **more: str) -> float:
        return next(s.value for s in families[family].samples if s.name == sample and more.items() <= s.labels.items())

    assert value("vllm:num_requests_waiting", "vllm:num_requests_waiting", **labels) == 2
    by_reason = "vllm:num_requests_waiting_by_reason"
    assert value(by_reason, by_reason, reason="capacity") == 2
    assert value("vllm:request_num_preemptions", "vllm:request_num_preemptions_count") == 1
    assert value("vllm:kv_cache_usage_perc", "vllm:kv_cache_usage_perc", **labels) == 0.25
    assert value("vllm:prompt_tokens", "vllm:prompt_tokens_total", **labels) == 2
    assert value("vllm:request_success", "vllm:request_success_total", finished_reason="stop") == 1
    assert value("vllm:request_success", "vllm:request_success_total", finished_reason="abort") == 0
    assert value("vllm:time_to_first_token_seconds", "vllm:time_to_first_token_seconds_bucket", le="0.02") == 1
    assert value("vllm:time_to_first_token_seconds", "vllm:time_to_first_token_seconds_bucket", le="0.01") == 0
    assert value("vllm:e2e_request_latency_seconds", "vllm:e2e_request_latency_seconds_sum") == 0.6
    assert value("vllm:request_inference_time_seconds", "vllm:request_inference_time_seconds_sum") == 0.5
    assert value("vllm:request_prompt_tokens", "vllm:request_prompt_tokens_bucket", le="1.0") == 0
    assert value("vllm:request_prompt_tokens", "vllm:request_prompt_tokens_bucket", le="2.0") == 1
    assert value("http_requests", "http_requests_total", handler=COMPLETIONS, method="POST", status="200") == 1
    assert value("http_requests", "http_requests_total", handler="none", status="404") == 1
    assert "vllm:num_preemptions_total" in text and "process_resident_memory_bytes" in text


def test_requests_are_logged_on_demand(client, caplog):
    caplog.set_level("INFO", "distaff")
    client.completion("Hi")
    assert "2 prompt tokens" not in caplog.text
    Client(client.engine, enable_log_requests=True).completion("Hi")
    assert "2 prompt tokens" in caplog.text
