"""The server on the real engine, with a toy model in the place of compiled programs."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import pytest
from fake_engine import TEMPLATE
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from serving import events, ok
from toy_runner import ToyRunner, byte_backend, plain_generate, save_toy_artifact

from distaff.runtime.async_engine import AsyncEngine
from distaff.runtime.config import EngineConfig
from distaff.runtime.engine import Engine
from distaff.runtime.server import PrometheusStatLogger, ServerConfig, bind, build_app
from distaff.runtime.server.serve import Server, url

EXACT = {"temperature": 0, "ignore_eos": True}


class SlowRunner(ToyRunner):
    """Takes some time for a step, as models do."""

    def execute(self, program, batch, rows=None):
        time.sleep(0.02)
        return super().execute(program, batch, rows)


@contextlib.contextmanager
def served(folder, executables, runner=ToyRunner, **settings):
    """A server on a real socket; gives an HTTP client and the engine."""
    save_toy_artifact(folder, tokenizer=byte_backend(), max_model_len=64, num_pages=200)
    metrics = PrometheusStatLogger("toy", 64)
    make_runner = partial(runner, executables)
    engine = Engine(folder, EngineConfig(warm_up=False, **settings), stat_loggers=[metrics], make_runner=make_runner)
    asynchronous = AsyncEngine(engine)
    config = ServerConfig(
        served_model_names=("toy",),
        chat_template=TEMPLATE,
        enable_prompt_tokens_details=True,
        shutdown_grace_seconds=0.1,
    )
    sock = bind("127.0.0.1", 0)
    address = url(sock)
    server = Server(build_app(asynchronous, config, metrics), asynchronous, config, log_level="warning")
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        with httpx.Client(base_url=address, timeout=60) as http:
            yield http, engine
    finally:
        server.handle_exit(15, None)
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def executables(tmp_path_factory):
    return tmp_path_factory.mktemp("executables")


@pytest.fixture(scope="module")
def toy(tmp_path_factory, executables):
    with served(tmp_path_factory.mktemp("toy") / "a", executables) as (http, engine):
        yield http, engine


def complete(http, **body):
    return ok(http.post("/v1/completions", json=body))


def test_the_text_is_the_models(toy):
    http, engine = toy
    prompt = engine.tokenizer.encode("Hi")
    expected = plain_generate(prompt, 12, ignore_eos=True)
    body = complete(http, prompt="Hi", max_tokens=12, return_token_ids=True, **EXACT)
    assert body["choices"][0]["token_ids"] == expected
    assert body["choices"][0]["text"] == engine.tokenizer.decode(expected)
    stream = events(http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 12, "stream": True, **EXACT}))
    assert "".join(c["choices"][0]["text"] for c in stream) == body["choices"][0]["text"]


def test_many_at_once_get_their_own_answers(toy):
    http, engine = toy
    prompts = [f"prompt {i}" for i in range(12)]

    def ask(prompt):
        return complete(http, prompt=prompt, max_tokens=9, return_token_ids=True, **EXACT)["choices"][0]["token_ids"]

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, prompts))
    assert answers == [plain_generate(engine.tokenizer.encode(p), 9, ignore_eos=True) for p in prompts]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(toy, stream):
    http, _ = toy
    body = {"prompt": "Hello", "echo": True, "logprobs": 2, "max_tokens": 3, "stream": stream, **EXACT}
    response = http.post("/v1/completions", json=body)
    choices = [c["choices"][0] for c in events(response)] if stream else ok(response)["choices"]
    values = [v for c in choices for v in c["logprobs"]["token_logprobs"]]
    tops = [t for c in choices for t in c["logprobs"]["top_logprobs"]]
    assert len(values) == 8 and values[0] is None and all(v < 0 for v in values[1:])
    assert all(v == max(top.values()) for v, top in zip(values[5:], tops[5:], strict=True))


def test_chat_with_logprobs_prompt_logprobs_and_n(toy):
    http, _ = toy
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "n": 3,
        "seed": 2**63 - 1,
        "max_tokens": 4,
        "logprobs": True,
        "top_logprobs": 3,
        "prompt_logprobs": 1,
        "ignore_eos": True,
    }
    answer = ok(http.post("/v1/chat/completions", json=body))
    assert len(answer["choices"]) == 3 and answer["usage"]["completion_tokens"] == 12
    for choice in answer["choices"]:
        assert [len(e["top_logprobs"]) for e in choice["logprobs"]["content"]] == [3] * 4
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]


def test_cached_tokens_are_reported(toy):
    http, _ = toy
    body = {"prompt": "the same long prompt again", "max_tokens": 1, **EXACT}
    complete(http, **body)
    assert complete(http, **body)["usage"]["prompt_tokens_details"]["cached_tokens"] == 24
    assert complete(http, cache_salt="x", **body)["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_the_context_is_a_limit(toy):
    http, _ = toy
    chat = {"messages": [{"role": "user", "content": "Hi"}], **EXACT}
    assert ok(http.post("/v1/chat/completions", json=chat))["usage"]["total_tokens"] == 64
    assert http.post("/v1/completions", json={"prompt": "x" * 60, "max_tokens": 5}).status_code == 400
    assert complete(http, prompt="x" * 60, max_tokens=4, **EXACT)["usage"]["total_tokens"] == 64


def test_a_full_queue_is_a_429(tmp_path, executables):
    with served(tmp_path / "b", executables, max_waiting=2, max_num_seqs=1) as (http, _):

        def ask(i):
            return http.post("/v1/completions", json={"prompt": f"{i}", "max_tokens": 60, **EXACT})

        with ThreadPoolExecutor(10) as pool:
            answers = list(pool.map(ask, range(10)))
        codes = [a.status_code for a in answers]
        assert set(codes) == {200, 429} and codes.count(200) >= 2
        assert all(int(a.headers["Retry-After"]) >= 1 for a in answers if a.status_code == 429)
        assert http.post("/v1/completions", json={"prompt": ["a"] * 9, "max_tokens": 1}).status_code == 429
        assert ask("z").status_code == 200


def test_nothing_is_left_of_a_client_that_leaves(tmp_path, executables):
    with served(tmp_path / "d", executables, SlowRunner) as (http, engine):

        def gauge(name):
            return float(http.get("/metrics").text.split(f'vllm:{name}{{engine="0",model_name="toy"}} ')[1].split()[0])

        body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 60, "stream": True, "ignore_eos": True}
        with http.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_bytes())
            assert gauge("num_requests_running") == 4 and gauge("kv_cache_usage_perc") > 0
        end = time.monotonic() + 10
        while engine.has_unfinished and time.monotonic() < end:
            time.sleep(0.01)
        engine.check_idle()
        assert gauge("num_requests_running") == 0 and gauge("kv_cache_usage_perc") == 0
        assert 'finished_reason="abort",model_name="toy"} 4.0' in http.get("/metrics").text


def test_a_dead_loop_is_a_503(tmp_path, executables):
    with served(tmp_path / "c", executables) as (http, engine):
        assert http.get("/health").status_code == 200
        engine._runner.fail = RuntimeError("boom")
        response = http.post("/v1/completions", json={"prompt": "Hi"})
        assert response.status_code == 503 and "boom" in response.json()["error"]["message"]
        assert http.get("/health").status_code == 503
        assert http.get("/v1/models").status_code == 200


def test_logits_that_are_no_numbers_fail_their_request_alone(toy):
    http, engine = toy
    engine._runner.break_row = 9
    assert http.post("/v1/completions", json={"prompt": [9, 8]}).status_code == 500
    *_, last = events(http.post("/v1/completions", json={"prompt": [9, 8], "stream": True}))
    assert last["error"]["code"] == "generation_failed"
    engine._runner.break_row = None
    complete(http, prompt=[9, 8])


SMALL = st.one_of(st.none(), st.integers(-2, 8))
SHARE = st.one_of(st.none(), st.floats(-0.5, 2.5))
IDS = st.one_of(st.none(), st.lists(st.integers(0, 340), max_size=3))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@example({"prompt": "0", "repetition_penalty": 5e-324})
@example({"prompt": "0", "repetition_penalty": 1e308, "temperature": 0})
@example({"prompt": "0", "allowed_token_ids": [3], "min_tokens": 2, "stop_token_ids": [3]})
@given(
    st.fixed_dictionaries(
        {"prompt": st.one_of(st.text(max_size=10), st.lists(st.integers(0, 340), max_size=6))},
        optional={
            "n": SMALL, "max_tokens": SMALL, "min_tokens": SMALL, "logprobs": SMALL, "prompt_logprobs": SMALL,
            "top_k": SMALL, "temperature": SHARE, "top_p": SHARE, "min_p": SHARE, "repetition_penalty": SHARE,
            "presence_penalty": SHARE, "frequency_penalty": SHARE, "seed": st.integers(-(2**63), 2**63 - 1),
            "stop": st.one_of(st.none(), st.lists(st.sampled_from(["a", "e", "\n", ""]), max_size=2)),
            "stop_token_ids": IDS, "allowed_token_ids": IDS, "echo": st.booleans(), "stream": st.booleans(),
            "logit_bias": st.dictionaries(st.integers(0, 340).map(str), st.floats(-200, 200), max_size=3),
            "truncate_prompt_tokens": SMALL, "ignore_eos": st.booleans(), "return_token_ids": st.booleans(),
        },
    )
)  # fmt: skip
def test_no_parameters_are_the_engines_fault(toy, body):
    http, engine = toy
    response = http.post("/v1/completions", json=body)
    assert response.status_code in (200, 400), (body, response.text)
    if response.status_code == 200:
        assert '"error"' not in response.text, (body, response.text)
    assert not engine.has_unfinished
