"""serve-model as users run it: flags and errors in the process, and one real server from start to signal."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest
from click.testing import CliRunner
from tiny_step import plain, tiny_step, tiny_weights

from distaff.compiler.buckets import default_buckets
from distaff.compiler.lowering.build import ModelInfo, build_artifact
from distaff.tools.serve_model import main


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "tiny"
    model = ModelInfo("tiny", max_model_len=32)
    build_artifact(tiny_step(), model, folder, buckets=default_buckets(2, 8), page_size=4, num_pages=40)
    return folder


@contextlib.contextmanager
def serve_model(*arguments):
    """A running server: its process, its URL and the lines that it has logged."""
    command = [sys.executable, "-m", "distaff.tools.serve_model", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    lines, ready = [], threading.Event()

    def read():
        for line in process.stderr:
            lines.append(line.rstrip())
            if " serves " in line:
                ready.set()
        ready.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert ready.wait(120) and process.poll() is None, "\n".join(lines)
        url = next(match[1] for line in lines if (match := re.search(r"ready: (\S+) serves", line)))
        yield process, url, lines
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stderr.close()


def greedy(prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(plain(tiny_weights(), tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_from_start_to_signal(artifact, number):
    neutral = ("--enforce_eager", "--disable-log-stats", "--tensor-parallel-size", 1, "--gpu-memory-utilization", 0.9)
    flags = ("--port", 0, "--served-model-name", "small", "--api-key", "k", *neutral)
    with serve_model(artifact, *flags) as (process, url, lines):
        with httpx.Client(base_url=url, headers={"Authorization": "Bearer k"}, timeout=60) as http:
            assert http.get("/health").status_code == 200
            body = {"prompt": [3, 1, 4], "max_tokens": 6, "temperature": 0, "return_token_ids": True}
            answer = http.post("/v1/completions", json=body)
            assert answer.json()["choices"][0]["token_ids"] == greedy([3, 1, 4], 6)
            assert http.get("/v1/models").json()["data"][0]["id"] == "small"
            metrics = http.get("/metrics").text
            assert 'model_name="small"' in metrics and 'block_size="4"' in metrics
            assert httpx.get(f"{url}/v1/models").status_code == 401
        process.send_signal(number)
        assert process.wait(30) == 0
        assert not any("Traceback" in line for line in lines)


def run(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_help_has_examples():
    result = run("--help")
    assert result.exit_code == 0 and "serve-model ./smollm2" in result.output and "--max-num-seqs" in result.output


@pytest.fixture(autouse=True)
def signals():
    """The command sets handlers, which would outlive the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["m", "--nonsense"],
        ["m", "--port", "70000"],
        ["m", "--max-num-seqs", "0"],
        ["m", "--scheduling-policy", "random"],
        ["m", "--allowed-origins", "*"],
        ["m", "--allowed-origins", "[1]"],
        ["m", "--max-model-len", "4x"],
        ["m", "--kv-cache-memory-bytes", "0"],
        ["m", "--gpu-memory-utilization", "1.5"],
        ["m", "--tensor-parallel-size", "2"],
        ["m", "--enable-lora"],
        ["m", "--load-format", "dummy"],
        ["m", "--default-chat-template-kwargs", "not json"],
        ["m", "--max-logprobs", "-2"],
    ],
)
def test_wrong_usage_exits_with_2(flags):
    result = run(*flags)
    assert result.exit_code == 2 and "Error" in result.output


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--max-num-seqs", 3], 2, "max_num_seqs is 3"),
        (["--max-model-len", "1k"], 2, "max_model_len is 1000"),
        (["--block-size", 8], 2, "--block-size is 8, but"),
        (["--dtype", "bfloat16"], 2, "compiled with float32"),
        (["-q", "int8"], 2, "--quantization is for a model that is compiled"),
        (["--chat-template", "/nowhere.jinja"], 1, "/nowhere.jinja"),
        (["--chat-template", "{% if %}"], 1, "not valid Jinja"),
        (["--override-generation-config", '{"top_p": 2}'], 2, "top_p must be"),
        (["--override-generation-config", '{"beams": 2}'], 2, "has beams; it takes temperature"),
        (["--tokenizer", "/nowhere"], 1, "tokenizer.json"),
        (["--uds", "/nowhere/socket"], 1, "/nowhere/socket"),
        (["--host", "256.0.0.1"], 1, "256.0.0.1"),
    ],
)
def test_what_cannot_be_served_is_one_line(artifact, flags, code, says):
    result = run(artifact, "--port", 0, *flags)
    assert result.exit_code == code, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert says in line


def test_kernels_are_shown_without_a_model():
    result = run("--show-kernels")
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    assert "paged_attention xla a mask of its own native: " in text and "native kernels: " in text


def test_models_that_are_not_there(tmp_path):
    result = run(tmp_path / "nothing", "--port", 0)
    assert result.exit_code == 1 and result.output.startswith("error: ") and "nothing" in result.output


def test_a_port_in_use_is_found_before_the_model_is_loaded(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run(tmp_path / "nothing", "--port", port)
    assert result.exit_code == 1 and str(port) in result.output and "in use" in result.output
