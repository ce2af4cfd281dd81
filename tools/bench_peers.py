"""bench-peers: the same requests and weights on distaff and on other engines, each in a process of its own."""

from __future__ import annotations

import functools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import psutil
from rich.console import Console

from distaff.tools.peer_engines import (
    DRIVERS,
    ENGINES,
    MAX_MODEL_LEN,
    PEERS,
    REFERENCE,
    Interpreter,
    Peer,
    PeerError,
    interpreter,
    last_line,
)
from distaff.tools.peer_report import Row, agreement, markdown, show, write_json, write_plot
from distaff.tools.roofline import Sizes, Work, memory_bandwidth, work
from distaff.tools.workload import WorkloadSpec, save_workload

if TYPE_CHECKING:
    from distaff.frontend.models import ModelConfig

_BUSY_SHARE = 0.05  # of all cores; more work of others than this changes results
_QUIET_SECONDS = 2.0
_PATIENCE_SECONDS = 120.0  # to wait for a quiet machine
_POLL_SECONDS = 0.25
_FIRST_PROMPT_LEN = 8
_VOCAB_SIZE = 49152  # of SmolLM2
_HELP = """Compares engines on SmolLM2-135M on this machine's cores.

Environments of other engines are made under --envs when they are missing. An engine that cannot be installed or fails
gets a row with the reason. The start-up time reaches from the start of the process to the first token. The script waits
for a quiet machine before every run, then reads memory for some seconds to know its rate at the time, lets the engines
take turns (--rounds), and says how noisy a row was.

\b
Example:
  python -m distaff.tools.bench_peers --output peers.md --json peers.json --plot peers.svg
"""


def make_job(num_prompts: int, seed: int, scale: float, vocab_size: int) -> tuple[dict[str, Any], WorkloadSpec]:
    """The requests that every engine gets, as the harness wants them; ``scale`` multiplies all lengths."""

    def scaled(count: int) -> int:
        return max(2, round(count * scale))

    spec = WorkloadSpec(
        num_prompts=num_prompts,
        seed=seed,
        input_len=(scaled(20), scaled(600)),
        output_len=(scaled(16), scaled(256)),
        vocab_size=vocab_size,
    )
    single = WorkloadSpec(kind="fixed", num_prompts=4, seed=seed + 1, input_len=(1, scaled(32)), vocab_size=vocab_size)
    first, *others = [item.prompt for item in single.make()]
    items = spec.make()
    long = WorkloadSpec(kind="fixed", num_prompts=4, seed=seed + 2, input_len=(1, scaled(512)), vocab_size=vocab_size)
    shared = [
        WorkloadSpec(
            kind="shared-prefix", num_prompts=min(32, num_prompts), seed=seed + 3 + i, prefix_len=scaled(400),
            input_len=(scaled(20), scaled(60)), vocab_size=vocab_size,
        )
        for i in range(2)
    ]  # fmt: skip
    job = {
        "single_prompts": [first[:_FIRST_PROMPT_LEN], *others],
        "single_count": scaled(128),
        "long_prompts": [item.prompt for item in long.make()],
        "shared_prompts": [[item.prompt for item in each.make()] for each in shared],
        "shared_count": scaled(32),
        "prompts": [item.prompt for item in items],
        "counts": [item.output_tokens for item in items],
    }
    return job, spec


def await_quiet(patience: float = _PATIENCE_SECONDS) -> None:
    """Returns when others leave the cores alone, or after ``patience`` seconds with a warning."""
    end = time.monotonic() + patience
    while (busy := psutil.cpu_percent(_QUIET_SECONDS) / 100) > _BUSY_SHARE:
        if time.monotonic() > end:
            click.echo(f"warning: others keep {busy:.0%} of the cores busy", err=True)
            return


def watch(process: subprocess.Popen[bytes], timeout: float) -> tuple[int, float]:
    """Waits for the end. Raises `TimeoutError`.

    Returns the most bytes that the process and its descendants held together, and the share of the machine's
    processor time that others took meanwhile.
    """
    began, busy_before, own_before = time.monotonic(), _busy_seconds(), _children_seconds()
    end = began + timeout
    root, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        if time.monotonic() > end:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise TimeoutError(f"did not end within {timeout:.0f} s")
        peak = max(peak, _held(root))
        time.sleep(_POLL_SECONDS)
    others = (_busy_seconds() - busy_before) - (_children_seconds() - own_before)
    return peak, max(0.0, others) / ((time.monotonic() - began) * (psutil.cpu_count() or 1))


def _busy_seconds() -> float:
    """Processor time that the whole machine has spent on something, ever."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def _children_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _held(root: psutil.Process) -> int:
    total = 0
    try:
        for process in [root, *root.children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        pass  # it ended meanwhile; the next look counts the others
    return total


def execute(peer: Peer, python: Interpreter, job: Mapping[str, Any], work: Path, timeout: float) -> dict[str, Any]:
    """Runs the harness; its results with ``startup_began`` (as `time.time`) and ``peak_bytes``. Raises `PeerError`."""
    path, result, log = (work / f"{peer.name}.{kind}" for kind in ("job.json", "result.json", "log"))
    result.unlink(missing_ok=True)
    path.write_text(json.dumps({**job, "driver": peer.driver, "options": dict(peer.options), "result": str(result)}))
    command = [str(python.python), str(DRIVERS / "harness.py"), str(path)]
    with log.open("w") as output:
        began = time.time()
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(python.environment),
            cwd=work,  # not where a folder may have the name of a package that an engine looks for
            start_new_session=True,  # so that a time-out ends its helpers too
        )
        try:
            peak, others = watch(process, timeout)
        except TimeoutError as error:
            raise PeerError(f"{error}; see {log}") from None
    if process.returncode:
        raise PeerError(f"{last_line(log.read_text(errors='replace'))} (see {log})")
    measured: dict[str, Any] = json.loads(result.read_text())
    return measured | {"startup_began": began, "peak_bytes": peak, "others": others}


def row_of(
    peer: Peer,
    version: str,
    job: Mapping[str, Any],
    rounds: Sequence[Mapping[str, Any]],
    reference: Any,
    work: Work | None = None,
) -> Row:
    """The medians over the rounds of one engine, as rates; ``reference`` are distaff's float32 outputs, or None.

    ``work`` is what its weights ask for.
    """
    generated, prompt = sum(job["counts"]), sum(map(len, job["prompts"]))

    def middle(value: Callable[[Mapping[str, Any]], float | None]) -> float | None:
        values = [v for v in map(value, rounds) if v is not None]
        return statistics.median(values) if values else None

    seconds = [measured["seconds"] for measured in rounds]

    def memory_share(measured: Mapping[str, Any]) -> float | None:
        rate, memory_rate = measured["decode_per_s"], measured["memory_rate"]
        return rate * work.step_bytes / memory_rate if rate and work and memory_rate else None

    busiest = max(measured["others"] for measured in rounds)
    return Row(
        engine=peer.engine,
        dtype=peer.dtype,
        version=version,
        startup_s=middle(lambda m: m["first_token_at"] - m["startup_began"]),
        output_per_s=middle(lambda m: generated / m["seconds"]),
        total_per_s=middle(lambda m: (generated + prompt) / m["seconds"]),
        decode_per_s=middle(lambda m: m["decode_per_s"]),
        step_mib=work.step_bytes / 2**20 if work else None,
        memory_gb_per_s=middle(lambda m: m["memory_rate"] and m["memory_rate"] / 1e9),
        memory_share=middle(memory_share),
        gops=work.operations / 1e9 / statistics.median(seconds) if work else None,
        long_prompt_s=middle(lambda m: m["long_prompt_s"]),
        shared_prefix_s=middle(lambda m: m["shared_prefix_s"]),
        peak_mib=middle(lambda m: m["peak_bytes"] / 2**20),
        agreement=None if reference is None else agreement(rounds[0]["outputs"], reference),
        spread=(max(seconds) - min(seconds)) / statistics.median(seconds),
        note="" if busiest <= _BUSY_SHARE else f"noisy: others took {busiest:.0%} of the processor time",
    )


class ModelForms:
    """The model in the forms that engines read, each made when it is first wanted; all of the same GGUF file."""

    def __init__(self, artifact: Path | None, work: Path) -> None:
        self._artifact = artifact
        self._work = work
        self._config: ModelConfig | None = None

    def path(self, peer: Peer, python: Path) -> Path:
        """The place of the form that ``peer`` reads, made by ``python``, its own interpreter, or a script of ours.

        distaff's programs are compiled for the KV cache of the run. Raises `PeerError`, or what the loader raises.
        """
        from distaff.frontend.loading.demo_model import DEMO_MODEL, find_demo_model

        kind, _, form = peer.weights.partition(":")
        if kind == "artifact":
            given = self._artifact if peer.name == REFERENCE else None
            option = "dtype" if "float" in form else "quantize"
            job = {
                "model": str(given or DEMO_MODEL),
                "options": {"max_model_len": MAX_MODEL_LEN, option: form, "kv_cache_dtype": peer.kv_cache_dtype},
                "kv_cache_bytes": peer.options["kv_cache_memory_bytes"],
            }
            return Path(last_line(self._script(python, "compile_artifact.py", json.dumps(job))))
        source = find_demo_model()
        if peer.weights == "gguf":
            return source
        if kind == "gguf":
            target, script = self._work / f"{DEMO_MODEL}-{form}.gguf", "requantize.py"
        else:
            target, script, python = self._work / f"{DEMO_MODEL}-float32", "export_gguf.py", Path(sys.executable)
        if not target.exists():
            self._script(python, script, str(source), str(target), form)
        return target

    def work(self, peer: Peer, path: Path, job: Mapping[str, Any]) -> Work:
        """What a run of ``job`` asks of the model in the form at ``path``."""
        from distaff.frontend.loading.demo_model import find_demo_model
        from distaff.frontend.loading.gguf_file import open_gguf

        if self._config is None:
            self._config = open_gguf(find_demo_model(), "float32").config
        return work(self._config, Sizes.of(path, peer.dtype, self._config), job)

    def _script(self, python: Path, name: str, *arguments: str) -> str:
        """What the script prints."""
        result = subprocess.run([str(python), str(DRIVERS / name), *arguments], capture_output=True, text=True)
        if result.returncode:
            raise PeerError(f"{name}: {last_line(result.stderr)}")
        return result.stdout


def compare(
    peers: Sequence[Peer],
    job: Mapping[str, Any],
    forms: ModelForms,
    environments: Path,
    work: Path,
    timeout: float,
    rounds: int = 1,
) -> list[Row]:
    """Runs the engines in turn, ``rounds`` times; the outputs of distaff in float32 are the reference, if it runs."""
    ready: dict[str, tuple[Interpreter, dict[str, Any]]] = {}
    failures: dict[str, str] = {}
    measured: dict[str, list[dict[str, Any]]] = {peer.name: [] for peer in peers}
    asked: dict[str, Work | None] = {}

    def attempt(peer: Peer, action: Callable[[], None]) -> None:
        if peer.name not in failures:
            try:
                action()
            except Exception as error:  # whatever stops one engine must not stop the others
                failures[peer.name] = f"failed: {error}"

    def prepare(peer: Peer) -> None:
        python = interpreter(peer, environments)
        path = forms.path(peer, python.python)
        asked[peer.name] = forms.work(peer, path, job)
        ready[peer.name] = (python, {**job, "model": str(path)})

    def run(peer: Peer) -> None:
        await_quiet()
        memory_rate = memory_bandwidth()  # it changes from minute to minute
        measured[peer.name].append(execute(peer, *ready[peer.name], work, timeout) | {"memory_rate": memory_rate})

    for peer in peers:
        click.echo(f"preparing {peer.name}", err=True)
        attempt(peer, functools.partial(prepare, peer))
    for number in range(rounds):
        for peer in peers:
            click.echo(f"round {number + 1} of {rounds}: {peer.name}", err=True)
            attempt(peer, functools.partial(run, peer))
    reference = next((measured[p.name][0]["outputs"] for p in peers if p.name == REFERENCE and measured[p.name]), None)
    rows = []
    for peer in peers:
        version = ready[peer.name][0].version if peer.name in ready else ""
        if peer.name in failures:
            rows.append(Row(peer.engine, peer.dtype, version, note=failures[peer.name]))
        else:
            rows.append(row_of(peer, version, job, measured[peer.name], reference, asked[peer.name]))
    return rows


def _chosen(_context: click.Context, _option: click.Parameter, value: str) -> list[Peer]:
    names = [name.strip() for name in value.split(",")]
    known = [*ENGINES, *(peer.name for peer in PEERS)]
    unknown = set(names) - set(known)
    if unknown:
        raise click.BadParameter(f"{', '.join(sorted(unknown))}; known are {', '.join(known)}")
    return [peer for peer in PEERS if peer.engine in names or peer.name in names]


_FILE = click.Path(path_type=Path, dir_okay=False)
_FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command(help=_HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--engines", "peers", default=",".join(ENGINES), show_default=True, callback=_chosen)
@click.option("--artifact", type=_FOLDER, help="distaff's float32 artifact of the model; else it is compiled.")
@click.option("--num-prompts", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--scale", type=click.FloatRange(0.0, 1.0, min_open=True), default=1.0, help="Shortens all requests.")
@click.option("--rounds", type=click.IntRange(min=1), default=1, show_default=True, help="Turns of every engine.")
@click.option("--envs", type=_FOLDER, default=Path(".cache/peers"), show_default=True)
@click.option("--timeout", type=float, default=3600.0, show_default=True, help="Seconds for an engine.")
@click.option("--output", "markdown_path", type=_FILE, help="Write the table as markdown there.")
@click.option("--json", "json_path", type=_FILE, help="Write the results there.")
@click.option("--plot", "plot_path", type=_FILE, help="Write a picture (.png, .svg, .pdf) there.")
def main(
    peers: list[Peer],
    artifact: Path | None,
    num_prompts: int,
    seed: int,
    scale: float,
    rounds: int,
    envs: Path,
    timeout: float,
    markdown_path: Path | None,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Entry point of the command line; exit code 1 if no engine ran."""
    work = envs.resolve() / "work"
    work.mkdir(parents=True, exist_ok=True)
    job, spec = make_job(num_prompts, seed, scale, _VOCAB_SIZE)
    save_workload(work / "workload.jsonl", spec.make())
    rows = compare(peers, job, ModelForms(artifact.resolve() if artifact else None, work), envs, work, timeout, rounds)
    show(Console(), rows)
    if markdown_path is not None:
        markdown_path.write_text(markdown(rows))
    if json_path is not None:
        sizes = {"requests": num_prompts, "prompt_tokens": sum(map(len, job["prompts"])), "seed": seed}
        write_json(json_path, rows, sizes | {"output_tokens": sum(job["counts"])})
    if plot_path is not None:
        write_plot(plot_path, rows)
    sys.exit(all(row.output_per_s is None for row in rows))


if __name__ == "__main__":
    main()
