import json
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from click.testing import CliRunner

from distaff.tools import demo


def event(content):
    return {"choices": [{"delta": {"content": content}}]}


@contextmanager
def server(events, status=200):
    """A chat server that streams ``events``; gives its URL and the requests that it got."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._answer(200, json.dumps({"data": [{"id": "toy"}]}))

        def do_POST(self):
            requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            lines = [f"data: {json.dumps(e)}\n\n" for e in events] + ["data: [DONE]\n\n"]
            self._answer(status, "".join(lines))

        def _answer(self, code, text):
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", requests
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def test_ask_joins_the_stream():
    first = {"choices": [{"delta": {"role": "assistant", "content": None}}]}
    with server([first, event("Pa"), event("ris"), {"choices": []}]) as (url, requests):
        assert "".join(demo.ask(url, "Capital?")) == "Paris"
    assert requests[0]["model"] == "toy"
    assert requests[0]["messages"] == [{"role": "user", "content": "Capital?"}]
    assert requests[0]["stream"] is True


def test_ask_reports_refusals_and_failures_in_the_middle():
    with server([], status=400) as (url, _), pytest.raises(demo.DemoError, match="refused the question"):
        list(demo.ask(url, "?"))
    with server([event("a"), {"error": {"message": "boom"}}]) as (url, _), pytest.raises(demo.DemoError, match="boom"):
        list(demo.ask(url, "?"))


def test_a_server_that_stops_at_once_is_reported_with_its_log(tmp_path):
    (tmp_path / "empty").mkdir()
    with (
        pytest.raises(demo.DemoError, match=r"exit code 1:[\s\S]*empty"),
        demo.serving(tmp_path / "empty", tmp_path / "log"),
    ):
        pytest.fail("there is nothing to serve")


def test_serving_stops_the_process(tmp_path, monkeypatch):
    (tmp_path / "health").write_text("ok")
    popen = subprocess.Popen

    def popen_file_server(command, **options):
        port = command[command.index("--port") + 1]
        return popen([sys.executable, "-m", "http.server", port, "-b", "127.0.0.1", "-d", str(tmp_path)], **options)

    monkeypatch.setattr(demo.subprocess, "Popen", popen_file_server)
    with demo.serving(tmp_path, tmp_path / "log") as url:
        host, port = url.removeprefix("http://").split(":")
        socket.create_connection((host, int(port))).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))


@pytest.mark.parametrize(("pieces", "code"), [(["Par", "is"], 0), (["  "], 1)])
def test_the_exit_code_is_0_only_for_an_answer(tmp_path, monkeypatch, pieces, code):
    @contextmanager
    def serving(artifact, log):
        yield "http://nowhere"

    monkeypatch.setattr(demo, "artifact_for", lambda model, progress: tmp_path / "a")
    monkeypatch.setattr(demo, "build_executables", lambda artifact: [])
    monkeypatch.setattr(demo, "serving", serving)
    monkeypatch.setattr(demo, "ask", lambda url, question: iter(pieces))
    monkeypatch.setenv("DISTAFF_CACHE", "restored after the test")
    result = CliRunner().invoke(demo.main, ["--cache", str(tmp_path)])
    assert result.exit_code == code
    assert ("Paris" in result.output) == (code == 0)
