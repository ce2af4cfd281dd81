"""bench-peers without peers: its requests, its bookkeeping, and a run with toy drivers in place of the engines."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from distaff.tools import bench_peers, peer_engines
from distaff.tools.bench_peers import ModelForms, compare, main, make_job, watch
from distaff.tools.peer_engines import ENGINES, PEERS, Interpreter, Peer, PeerError, last_line
from distaff.tools.peer_report import Row, agreement, markdown, write_json, write_plot
from distaff.tools.roofline import Sizes, Work, work

TOY = """
import time
class Engine:
    def __init__(self, model, options):
        self.options = options
        if options.get("fail"):
            raise ValueError("no such model: " + model)
        time.sleep(options.get("sleep", 0))
    def generate(self, prompts, counts):
        time.sleep(0.02 * max(counts))
        return [[p[0] + self.options["add"]] * (c - self.options.get("lost", 0)) for p, c in zip(prompts, counts)]
"""


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """Makes peers whose driver is `TOY`, run by this interpreter."""
    (tmp_path / "toy.py").write_text(TOY)
    harness = peer_engines.DRIVERS / "harness.py"
    (tmp_path / "harness.py").write_text(harness.read_text())
    monkeypatch.setattr(bench_peers, "DRIVERS", tmp_path)
    monkeypatch.setattr(bench_peers, "await_quiet", lambda: None)
    monkeypatch.setattr(bench_peers, "memory_bandwidth", lambda: 2.0**30)
    monkeypatch.setattr(bench_peers, "_BUSY_SHARE", 2.0)  # tests run beside others

    def make(engine="toy", **options):
        return Peer(
            engine=engine,
            driver="toy",
            dtype="float32",
            weights="artifact:float32",
            distribution="click",
            options=options,
        )

    return make


class Forms(ModelForms):
    """Makes nothing: toys read no model."""

    def path(self, peer, python):
        return self._work

    def work(self, peer, path, job):
        return Work(step_bytes=2**20, operations=5e9)


def run(peers, job, tmp_path, timeout=60.0):
    return compare(peers, job, Forms(None, tmp_path), tmp_path, tmp_path, timeout)


def test_requests_are_seeded_and_scaled():
    job, _ = make_job(64, 0, 1.0, 49152)
    assert make_job(64, 0, 1.0, 49152)[0] == job != make_job(64, 1, 1.0, 49152)[0]
    assert len(job["prompts"]) == len(job["counts"]) == 64
    assert all(20 <= len(prompt) <= 600 for prompt in job["prompts"]) and max(map(len, job["prompts"])) > 500
    assert all(16 <= count <= 256 for count in job["counts"]) and max(job["counts"]) > 200
    assert [len(prompt) for prompt in job["single_prompts"]] == [8, 32, 32, 32] and job["single_count"] == 128
    assert len({prompt[0] for prompt in job["single_prompts"]}) == 4  # a prefix cache must not help
    assert [len(prompt) for prompt in job["long_prompts"]] == [512] * 4
    warm, shared = job["shared_prompts"]
    assert (
        len(shared) == 32 and len({tuple(prompt[:400]) for prompt in shared}) == 1 and warm[0][:400] != shared[0][:400]
    )
    small, _ = make_job(4, 0, 0.1, 49152)
    assert max(map(len, small["prompts"])) <= 60 and max(small["counts"]) <= 26 and small["single_count"] == 13


def test_peers_are_well_formed():
    assert ENGINES == ("distaff", "distaff-1GiB", "distaff-xla", "transformers", "vllm", "llama_cpp")
    assert len({peer.name for peer in PEERS}) == len(PEERS)
    for peer in PEERS:
        assert (peer_engines.DRIVERS / f"{peer.driver}.py").is_file()
        json.dumps(dict(peer.options))


def test_an_openmp_in_the_environment_is_preloaded(tmp_path):
    vllm = next(peer for peer in PEERS if peer.engine == "vllm")
    assert "LD_PRELOAD" not in vllm.environment(tmp_path)
    library = tmp_path / "lib" / "sub" / "libiomp5.so"
    library.parent.mkdir(parents=True)
    library.touch()
    assert vllm.environment(tmp_path)["LD_PRELOAD"] == str(library.resolve())


def test_a_run_measures_and_compares(toys, tmp_path):
    job, _ = make_job(4, 0, 0.1, 1000)
    rows = run([toys("distaff", add=1, sleep=0.3), toys("same", add=1), toys("other", add=2)], job, tmp_path)
    assert [(row.engine, row.agreement, row.note) for row in rows] == [
        ("distaff", 1.0, ""),
        ("same", 1.0, ""),
        ("other", 0.0, ""),
    ]
    tokens, prompt = sum(job["counts"]), sum(map(len, job["prompts"]))
    for row in rows:
        assert row.total_per_s / row.output_per_s == pytest.approx((tokens + prompt) / tokens)
        assert row.output_per_s < tokens / (0.02 * max(job["counts"]))
        assert 5 < row.decode_per_s < 100  # the toy takes 20 ms a token
        assert row.step_mib == 1 and row.memory_gb_per_s == pytest.approx(2**30 / 1e9)
        assert row.memory_share == pytest.approx(row.decode_per_s / 1024)
        assert row.gops == pytest.approx(5 * row.output_per_s / tokens)
        assert 1 < row.peak_mib < 1000
        assert 0.02 < row.long_prompt_s < 1 and 0.06 < row.shared_prefix_s < 5 and row.spread == 0
    assert 0.3 < rows[0].startup_s < 30


def test_engines_take_turns_and_rows_are_medians(toys, tmp_path, monkeypatch):
    seconds = iter([1.0, 2.0, 3.0, 2.0, 8.0, 2.0])
    memory = iter([1e9, 1e9, 2e9, 2e9, 4e9, 4e9])
    order = []

    def execute(peer, python, job, work, timeout):
        order.append(peer.engine)
        decode_per_s = 1e9 / 2**20 if peer.engine == "a" else None
        measured = {"first_token_at": 5.0, "startup_began": 4.0, "decode_per_s": decode_per_s, "long_prompt_s": 1.0}
        measured |= {"shared_prefix_s": 1.0, "peak_bytes": 0, "others": 0.5, "outputs": [[1]], "seconds": next(seconds)}
        return measured

    monkeypatch.setattr(bench_peers, "execute", execute)
    monkeypatch.setattr(bench_peers, "memory_bandwidth", lambda: next(memory))
    monkeypatch.setattr(bench_peers, "_BUSY_SHARE", 0.1)
    job = {"prompts": [[1]], "counts": [6]}
    rows = compare([toys("a"), toys("b")], job, Forms(None, tmp_path), tmp_path, tmp_path, 1.0, rounds=3)
    assert order == ["a", "b"] * 3
    assert [(row.output_per_s, row.spread, row.memory_gb_per_s, row.memory_share) for row in rows] == [
        (2.0, pytest.approx(7 / 3), 2, pytest.approx(0.5)),
        (3.0, 0, 2, None),
    ]
    assert all("others took 50%" in row.note for row in rows)


def test_a_failure_is_a_row_and_the_rest_goes_on(toys, tmp_path):
    job, _ = make_job(2, 0, 0.1, 1000)
    missing = dataclasses.replace(toys("missing", add=1), distribution="no-such-distribution")
    peers = [toys("broken", add=1, fail=True), toys("short", add=1, lost=1), missing, toys("fine", add=1)]
    broken, short, absent, fine = run(peers, job, tmp_path)
    assert "ValueError: no such model" in broken.note and broken.output_per_s is None
    assert "RuntimeError: wanted [1] tokens, got [0]" in short.note
    assert "no-such-distribution is not installed" in absent.note
    assert fine.output_per_s > 0 and fine.agreement is None and not fine.note


def test_an_engine_that_hangs_is_ended(toys, tmp_path):
    job, _ = make_job(2, 0, 0.1, 1000)
    began = time.monotonic()
    (row,) = run([toys(add=1, sleep=60)], job, tmp_path, timeout=1.0)
    assert "did not end within 1 s" in row.note and time.monotonic() - began < 20


def test_memory_of_children_counts():
    child = "import time; held = bytearray(150 << 20); time.sleep(1.5)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], start_new_session=True)
    peak, others = watch(process, 60)
    assert 150 << 20 < peak < 400 << 20 and 0 <= others <= 1


def test_a_missing_environment_is_made_in_order(tmp_path, monkeypatch):
    commands = []

    def record(command, **kwargs):
        commands.append((list(map(str, command)), kwargs["env"].get("CMAKE_ARGS")))
        return subprocess.CompletedProcess(command, len(commands) == 3, "", "noise\nERROR: no matching version\n\n")

    monkeypatch.setattr(peer_engines.subprocess, "run", record)
    llama = next(peer for peer in PEERS if peer.engine == "llama_cpp")
    peer = dataclasses.replace(llama, requirements=("first==1", "second==2", "third==3"))
    with pytest.raises(PeerError, match=r"second==2: ERROR: no matching version$"):
        peer_engines.interpreter(peer, tmp_path)
    assert [command[-1] for command, _ in commands] == [str(tmp_path / "llama_cpp"), "first==1", "second==2"]
    assert commands[1][1] == "-DGGML_NATIVE=ON"


def test_what_is_in_development_is_installed_again(tmp_path, monkeypatch):
    xla = next(peer for peer in PEERS if peer.engine == "distaff-xla")
    commands = []
    monkeypatch.setattr(peer_engines, "_version", lambda python, distribution: "1")
    monkeypatch.setattr(peer_engines, "_run", lambda command, peer: commands.append(list(map(str, command))))
    peer_engines.interpreter(xla, tmp_path)
    ((*command, requirement),) = commands
    assert "--force-reinstall" in command and (Path(requirement.partition("[")[0]) / "pyproject.toml").is_file()
    peer_engines.interpreter(next(peer for peer in PEERS if peer.engine == "vllm"), tmp_path)
    assert len(commands) == 1


def test_artifacts_are_made_by_the_engines_own_interpreter_for_its_cache(tmp_path, monkeypatch):
    ran = []

    def record(command, **kwargs):
        ran.append(command)
        return subprocess.CompletedProcess(command, 0, "noise\n/artifacts/x\n", "")

    monkeypatch.setattr(bench_peers.subprocess, "run", record)
    wanted = {
        "distaff-gguf": ({"quantize": "gguf", "kv_cache_dtype": "auto"}, 256 << 20),
        "distaff-int8-kv-int8": ({"quantize": "int8", "kv_cache_dtype": "int8"}, 256 << 20),
        "distaff-1GiB-int8-kv-int8": ({"quantize": "int8", "kv_cache_dtype": "int8"}, 1 << 30),
    }
    for name, (options, pool) in wanted.items():
        peer = next(peer for peer in PEERS if peer.name == name)
        assert ModelForms(None, tmp_path).path(peer, Path("/env/python")) == Path("/artifacts/x")
        python, script, job = ran.pop()
        assert (python, Path(script).name) == ("/env/python", "compile_artifact.py")
        assert json.loads(job) == {
            "model": "smollm2-135m",
            "options": {"max_model_len": 1024, **options},
            "kv_cache_bytes": pool,
        }


def test_work_counts_products():
    """A model of one layer, counted by hand."""
    config = SimpleNamespace(
        num_layers=1, hidden_size=4, num_heads=2, num_kv_heads=1, head_dim=3, intermediate_size=5, vocab_size=7
    )
    job = {"single_prompts": [[1] * 10], "single_count": 4, "prompts": [[1, 2], [3]], "counts": [2, 1]}
    found = work(config, Sizes(weights=1000, cache_per_token=10), job)
    assert found.step_bytes == 1000 + 10 * 12
    matrices = 4 * 6 + 2 * 4 * 3 + 6 * 4 + 3 * 4 * 5  # queries, keys and values, output, MLP
    tokens, outputs = 3 + 1, 3
    pairs = (1 + 2 + 3) + 1
    assert found.operations == 2 * matrices * tokens + 2 * 4 * 7 * outputs + 2 * 2 * 6 * pairs


def test_the_current_environment_serves_peers_without_requirements(tmp_path):
    found = peer_engines.interpreter(PEERS[0], tmp_path)
    assert found == Interpreter(Path(sys.executable), found.version, {}) and found.version


def test_agreement_and_last_lines():
    assert agreement([[1, 2], [3], [4]], [[1, 2], [3], [5]]) == pytest.approx(2 / 3)
    assert last_line("a\nreason\n \n") == "reason" and last_line("") == "no output"


def test_reports(tmp_path):
    good = Row(
        "distaff", "float32", "1", 1.25, 1234.5, 2000.0, 50.0, 0.4, 3.0, 700.0, 280.0, 0.9, 42.5, 300.0, 0.5, 0.02
    )
    failed = Row("vllm", "float32", note="failed: a | b")
    lines = markdown([good, failed]).splitlines()
    cells = "1.25 | 1,234.5 | 2,000.0 | 50.0 | 280.0 | 90% | 42.5 | 300.0 | 0.40 | 3.00 | 700.0 | 50% | 2% |  |"
    assert lines[2] == "| distaff | 1 | float32 | " + cells
    assert lines[3].count("–") == 13 and r"a \| b" in lines[3]
    write_json(tmp_path / "r.json", [good, failed], {"requests": 3})
    assert json.loads((tmp_path / "r.json").read_text())["rows"][1]["note"] == "failed: a | b"
    pytest.importorskip("matplotlib")
    write_plot(tmp_path / "r.svg", [good, failed])
    picture = (tmp_path / "r.svg").read_text()
    assert "distaff" in picture and "vllm" not in picture


def test_the_command_line(tmp_path, monkeypatch):
    asked = []

    def record(peers, job, forms, environments, work, timeout, rounds):
        asked.extend(peer.name for peer in peers)
        return [Row("distaff", "float32", "1", 1.0, 2.0, 3.0, 4.0, 5.0, 1.0, 2.0)]

    monkeypatch.setattr(bench_peers, "compare", record)
    arguments = [
        "--engines",
        "vllm,distaff-int8",
        "--num-prompts",
        "2",
        "--envs",
        tmp_path,
        "--output",
        tmp_path / "t.md",
    ]
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert asked == ["distaff-int8", "vllm-float32", "vllm-bfloat16"]
    assert "| distaff | 1 | float32 |" in (tmp_path / "t.md").read_text()
    assert len((tmp_path / "work" / "workload.jsonl").read_text().splitlines()) == 2
    result = CliRunner().invoke(main, ["--engines", "distaff,nothing"])
    assert result.exit_code == 2 and "nothing; known are distaff" in result.output
