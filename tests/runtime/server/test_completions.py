"""``/v1/completions``: texts, token ids, streams, log-probabilities, echo, usage."""

from __future__ import annotations

import pytest
from fake_engine import FakeEngine
from serving import Client

from distaff.runtime.sampling_params import RequestOutputKind

PATH = "/v1/completions"


@pytest.fixture
def client():
    return Client(FakeEngine())


@pytest.mark.smoke
def test_a_text_is_completed(client):
    body = client.completion("Hi", max_tokens=20)
    choice = body["choices"][0]
    assert choice["text"] == "Hello, wörld!"
    assert (choice["index"], choice["finish_reason"], choice["stop_reason"], choice["logprobs"]) == (
        0,
        "stop",
        None,
        None,
    )
    assert body["object"] == "text_completion" and body["model"] == "fake" and body["id"].startswith("cmpl-")
    assert body["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 14,
        "total_tokens": 16,
        "prompt_tokens_details": None,
    }
    assert (choice["token_ids"], choice["prompt_token_ids"], choice["prompt_logprobs"]) == (None, None, None)


def test_max_tokens_defaults_to_16_and_cuts(client):
    client.engine.endless = True
    assert client.completion("Hi")["usage"]["completion_tokens"] == 16
    choice = client.completion("Hi", max_tokens=5)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("Hello", "length")


@pytest.mark.parametrize("prompt", ["Hi", ["Hi"], [72, 105], [[72, 105]]])
def test_every_form_of_prompt(client, prompt):
    client.completion(prompt)
    assert client.engine.calls[0].prompt == [72, 105]


def test_several_prompts_and_n_number_their_choices(client):
    body = client.completion(["a", "bb", "ccc"], n=2, max_tokens=3)
    assert [c["index"] for c in body["choices"]] == list(range(6))
    assert body["usage"]["prompt_tokens"] == 6 and body["usage"]["completion_tokens"] == 18
    chunks = client.chunks(PATH, {"prompt": ["a", "bb", "ccc"], "n": 2, "max_tokens": 3})
    texts = dict.fromkeys(range(6), "")
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert set(texts.values()) == {"Hel"}


def test_a_stream_joins_to_the_same_text(client):
    chunks = client.chunks(PATH, {"prompt": "Hi", "max_tokens": 20})
    assert "".join(c["choices"][0]["text"] for c in chunks) == "Hello, wörld!"
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    assert all("usage" not in c for c in chunks)
    assert client.engine.calls[0].params.output_kind == RequestOutputKind.DELTA


def test_usage_at_the_end_of_a_stream(client):
    *chunks, last = client.chunks(PATH, {"prompt": "Hi", "stream_options": {"include_usage": True}})
    assert all(c["usage"] is None for c in chunks)
    assert last["choices"] == [] and last["usage"]["total_tokens"] == 16


def test_usage_is_forced_on_a_server_that_says_so(client):
    *chunks, last = Client(client.engine, enable_force_include_usage=True).chunks(PATH, {"prompt": "Hi"})
    assert [c["usage"]["completion_tokens"] for c in chunks] == list(range(1, 15)) and last["choices"] == []


def test_cached_tokens_are_told_by_a_server_that_says_so(client):
    usage = Client(client.engine, enable_prompt_tokens_details=True).completion("eight ch")["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}


def test_usage_in_every_chunk_of_a_stream(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = client.chunks(PATH, {"prompt": "Hi", "max_tokens": 3, "stream_options": options})
    assert [c["usage"]["completion_tokens"] for c in chunks] == [1, 2, 3]
    assert last["usage"]["completion_tokens"] == 3


def test_logprobs(client):
    logprobs = client.completion("Hi", max_tokens=3, logprobs=2)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["H", "e", "l"]
    assert logprobs["token_logprobs"] == [-2.5, -2.5, -2.5]
    assert logprobs["text_offset"] == [0, 1, 2]
    assert logprobs["top_logprobs"][0] == {"a": -0.5, "b": -1.5, "H": -2.5}


def test_logprobs_0_reports_the_sampled_token_alone(client):
    logprobs = client.completion("Hi", max_tokens=2, logprobs=0)["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"H": -2.5}, {"e": -2.5}]


def test_minus_infinity_is_sent_as_a_number(client):
    top = client.completion("Hi", max_tokens=1, logprobs=20)["choices"][0]["logprobs"]["top_logprobs"][0]
    assert min(top.values()) == -9999.0


def test_text_offsets_go_on_through_a_stream(client):
    chunks = client.chunks(PATH, {"prompt": "Hi", "max_tokens": 4, "logprobs": 0})
    assert [c["choices"][0]["logprobs"]["text_offset"] for c in chunks] == [[0], [1], [2], [3]]


def test_text_offsets_count_names_of_tokens_though_the_text_comes_later(client):
    client.engine.reply = "öab"  # the first token alone is no character
    whole = client.completion("Hi", logprobs=0)["choices"][0]["logprobs"]["text_offset"]
    chunks = client.chunks(PATH, {"prompt": "Hi", "logprobs": 0})
    assert chunks[0]["choices"][0]["text"] == ""
    assert [o for c in chunks for o in c["choices"][0]["logprobs"]["text_offset"]] == whole == [0, 1, 2, 3]


def test_tokens_as_token_ids(client):
    fields = {"max_tokens": 2, "logprobs": 1, "return_tokens_as_token_ids": True}
    logprobs = client.completion("Hi", **fields)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["token_id:72", "token_id:101"]
    assert logprobs["top_logprobs"][0] == {"token_id:97": -0.5, "token_id:72": -2.5}


@pytest.mark.parametrize("prompt", ["Hi", [72, 105]])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_in_front(client, prompt, stream):
    body = {"prompt": prompt, "echo": True, "max_tokens": 3, "logprobs": 1}
    choices = [c["choices"][0] for c in client.chunks(PATH, body)] if stream else client.completion(**body)["choices"]
    assert "".join(c["text"] for c in choices) == "HiHel"
    assert [t for c in choices for t in c["logprobs"]["tokens"]] == ["H", "i", "H", "e", "l"]
    assert choices[0]["logprobs"]["token_logprobs"][:2] == [None, -2.5]
    assert choices[0]["logprobs"]["top_logprobs"][0] is None
    assert client.engine.calls[0].params.prompt_logprobs == 1


@pytest.mark.parametrize("stream", [False, True])
def test_echo_of_the_prompt_alone(client, stream):
    body = {"prompt": "Hi", "echo": True, "max_tokens": 0, "logprobs": 1}
    if stream:
        body["stream_options"] = {"include_usage": True}
        first, usage = client.chunks(PATH, body)
        choice, tokens = first["choices"][0], usage["usage"]["completion_tokens"]
    else:
        answer = client.completion(**body)
        choice, tokens = answer["choices"][0], answer["usage"]["completion_tokens"]
    assert (choice["text"], choice["logprobs"]["tokens"], tokens) == ("Hi", ["H", "i"], 0)


def test_prompt_logprobs(client):
    found = client.completion("Hi", prompt_logprobs=1)["choices"][0]["prompt_logprobs"]
    assert found[0] is None
    assert found[1]["105"] == {"logprob": -2.5, "rank": 3, "decoded_token": "i"}
    assert found[1]["97"]["rank"] == 1
    assert client.completion("Hi", prompt_logprobs=0)["choices"][0]["prompt_logprobs"][1].keys() == {"105"}


def test_token_ids_on_request(client):
    choice = client.completion("Hi", max_tokens=2, return_token_ids=True)["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([72, 105], [72, 101])
    chunks = client.chunks(PATH, {"prompt": "Hi", "max_tokens": 2, "return_token_ids": True})
    assert [c["choices"][0]["prompt_token_ids"] for c in chunks] == [[72, 105], None]
    assert [c["choices"][0]["token_ids"] for c in chunks] == [[72], [101]]


def test_parameters_reach_the_engine(client):
    client = Client(client.engine, priority_scheduling=True)
    client.completion(
        "Hi",
        n=2,
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        min_p=0.1,
        seed=5,
        stop="\n",
        stop_token_ids=[7],
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.5,
        ignore_eos=True,
        min_tokens=2,
        max_tokens=9,
        logit_bias={"72": 3, "5": -1000},
        skip_special_tokens=False,
        include_stop_str_in_output=True,
        allowed_token_ids=[72, 73],
        priority=-3,
        cache_salt="s",
        user="me",
        an_unknown_field={},
    )
    call = client.engine.calls[0]
    params = call.params
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (2, 0.5, 0.9, 3, 0.1)
    assert (params.seed, params.stop, params.stop_token_ids) == (5, ["\n"], [7])
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1, -1, 1.5)
    assert (params.ignore_eos, params.min_tokens, params.max_tokens) == (True, 2, 9)
    assert params.logit_bias == {72: 3, 5: -100}
    assert (params.skip_special_tokens, params.include_stop_str_in_output) == (False, True)
    assert (params.allowed_token_ids, call.priority, call.salt) == ([72, 73], -3, "s")


def test_open_parameters_are_the_models_own_unless_switched_off(client):
    client.completion("Hi", temperature=None)
    Client(client.engine, use_generation_config=False).completion("Hi")
    client.completion("Hi", temperature=1.5)
    seen = [(c.params.temperature, c.params.top_k) for c in client.engine.calls]
    assert seen == [(0.6, 7), (1.0, 0), (1.5, 7)]


def test_the_server_overrides_the_models_own(client):
    client = Client(client.engine, override_generation_config={"temperature": 0.2, "max_new_tokens": 5})
    client.completion("Hi")
    client.completion("Hi", temperature=1.5, max_tokens=3)
    seen = [(c.params.temperature, c.params.top_k, c.params.max_tokens) for c in client.engine.calls]
    assert seen == [(0.2, 7, 5), (1.5, 7, 3)]


def test_null_stands_for_the_default(client):
    client.completion("Hi", n=None, max_tokens=None, stop=None, logprobs=None, stream=None, seed=None, suffix=None)
    params = client.engine.calls[0].params
    assert (params.n, params.max_tokens, params.stop, params.logprobs) == (1, 16, [], None)


def test_the_end_of_a_long_prompt_is_kept(client):
    client.completion("abcdef", truncate_prompt_tokens=2, max_tokens=1, echo=True)
    client.completion("x" * 500, truncate_prompt_tokens=-1, max_tokens=100)
    client.completion("abcdef", truncate_prompt_tokens=2, truncation_side="right", max_tokens=1)
    assert client.engine.calls.pop().prompt == list(b"ab")
    assert client.engine.calls[0].prompt == list(b"ef")
    assert len(client.engine.calls[1].prompt) == 28


def test_request_ids(client):
    assert client.completion("Hi", request_id="mine")["id"] == "cmpl-mine"
    response = client.post(PATH, {"prompt": "Hi", "request_id": "mine"}, headers={"X-Request-Id": "theirs"})
    assert response.json()["id"] == "cmpl-theirs"
    ids = [call.id for call in client.engine.calls]
    assert len(set(ids)) == 2 and ids[0].startswith("cmpl-mine-0-")


def test_other_names_of_the_model(client):
    for name in ("alias", "fake", "", None):
        assert client.completion("Hi", model=name)["model"] == "fake"


def test_without_a_tokenizer_token_ids_still_work():
    client = Client(FakeEngine(has_tokenizer=False))
    choice = client.completion([5, 6], max_tokens=2, return_token_ids=True, logprobs=1)["choices"][0]
    assert choice["token_ids"] == [72, 101] and choice["logprobs"]["tokens"] == ["token_id:72", "token_id:101"]
    assert client.error(PATH, {"prompt": "Hi"})["param"] == "prompt"
    assert client.error(PATH, {"prompt": [1], "echo": True})["param"] == "echo"
    choice = client.completion([5, 6], max_tokens=2, return_token_ids=True, echo=True)["choices"][0]
    assert (choice["text"], choice["prompt_token_ids"], choice["token_ids"]) == ("", [5, 6], [72, 101])
