"""``make demo``: compiles a small chat model, serves it, asks it a question over HTTP, shows the streamed answer."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from distaff.tools.compile_on_demand import artifact_for, build_executables
from distaff.tools.report import live_status

MODEL = "smollm2-135m"
QUESTION = "What is the capital of France? Answer in one sentence."
START_SECONDS = 120
SHUTDOWN_SECONDS = 20


class DemoError(Exception):
    """The server did not start or did not answer."""


@click.command(help=__doc__)
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".cache"), show_default=True)
@click.option("--model", default=MODEL, show_default=True, help="A chat model that compile-model knows, or its folder.")
@click.option("--question", default=QUESTION, show_default=True)
def main(cache: Path, model: str, question: str) -> None:
    """Runs the demo; exit code 0 only if an answer came."""
    console = Console()
    os.environ["DISTAFF_CACHE"] = str(cache.resolve())  # for the download of the model and for the artifact
    try:
        console.print(f"[bold]1. compile[/] {model} (the first time takes a minute)")
        with live_status(console) as progress:
            artifact = artifact_for(model, progress=progress)
        build_executables(artifact)
        console.print(f"   artifact: {artifact}")
        console.print("[bold]2. serve[/]")
        log = artifact.parent / "demo-server.log"
        with serving(artifact, log) as url:
            console.print(f"   {url}/v1")
            console.print(f"[bold]3. ask[/] {question}")
            answer = "".join(_printed(ask(url, question)))
        if not answer.strip():
            raise DemoError(f"the server answered nothing; its log is {log}")
    except DemoError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    console.print(
        f"\n[bold]Next[/]  serve-model {artifact}   then use any OpenAI client with base_url http://HOST:PORT/v1"
    )
    console.print("      compile-model --help   for other models, and README.md for your own JAX model")


@contextmanager
def serving(artifact: Path, log: Path) -> Iterator[str]:
    """Serves ``artifact`` in a process of its own; gives its URL when it is ready, and shuts it down at the end."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "distaff.tools.serve_model", str(artifact), "--host", "127.0.0.1"]
    with log.open("w") as output:
        server = subprocess.Popen([*command, "--port", str(port)], stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_until_ready(url, server, log)
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def ask(url: str, question: str) -> Iterator[str]:
    """The pieces of the answer to ``question`` as the chat endpoint streams them."""
    body = {
        "model": _served_model(url),
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 80,
        "temperature": 0,
        "stream": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            for line in response:
                event = line.decode().strip().removeprefix("data: ")
                if event and event != "[DONE]":
                    yield _content(json.loads(event))
    except urllib.error.HTTPError as error:
        raise DemoError(f"the server refused the question: {error.read().decode()}") from None
    except OSError as error:
        raise DemoError(f"the connection broke: {error}") from None


def _content(event: dict[str, Any]) -> str:
    if "error" in event:
        raise DemoError(f"the server failed in the middle of the answer: {event['error']}")
    return "".join(choice["delta"].get("content") or "" for choice in event["choices"])


def _served_model(url: str) -> str:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as response:
        return str(json.load(response)["data"][0]["id"])


def _printed(pieces: Iterator[str]) -> Iterator[str]:
    for piece in pieces:
        print(piece, end="", flush=True)
        yield piece
    print()


def _wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            raise DemoError(f"the server stopped with exit code {server.returncode}:\n{log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.1)
    raise DemoError(f"the server was not ready after {START_SECONDS} s; its log is {log}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
