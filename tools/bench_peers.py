"""bench-peers: the same requests and weights on distaff and on other engines, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import psutil
from rich.console import Console

from distaff.tools.peer_engines import (
    DRIVERS,
    ENGINES,
    PEERS,
    Interpreter,
    Peer,
    PeerError,
    interpreter,
    last_line,
)
from distaff.tools.peer_report import Row, agreement, markdown, show, write_json, write_plot
from distaff.tools.workload import WorkloadSpec, save_workload

_BUSY_PERCENT = 10.0  # of all cores; more work of others than this changes results
_QUIET_SECONDS = 2.0
_POLL_SECONDS = 0.25
_FIRST_PROMPT_LEN = 8
_VOCAB_SIZE = 49152  # of SmolLM2
_HELP = """Compares engines on SmolLM2-135M on this machine's cores.

Environments of other engines are made under --envs when they are missing. An engine that cannot be installed or fails
gets a row with the reason. The start-up time reaches from the start of the process to the first token.

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
    job = {
        "single_prompts": [first[:_FIRST_PROMPT_LEN], *others],
        "single_count": scaled(128),
        "prompts": [item.prompt for item in items],
        "counts": [item.output_tokens for item in items],
    }
    return job, spec


def machine_note() -> str:
    """ "" on a quiet machine, else how busy others keep it."""
    busy = psutil.cpu_percent(_QUIET_SECONDS)
    return "" if busy <= _BUSY_PERCENT else f"noisy: {busy:.0f} % of the cores were busy before it began"


def watch(process: subprocess.Popen[bytes], timeout: float) -> int:
    """Waits for the end; most bytes that the process and its descendants held together. Raises `TimeoutError`."""
    end = time.monotonic() + timeout
    root, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        if time.monotonic() > end:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise TimeoutError(f"did not end within {timeout:.0f} s")
        peak = max(peak, _held(root))
        time.sleep(_POLL_SECONDS)
    return peak


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
            start_new_session=True,  # so that a time-out ends its helpers too
        )
        try:
            peak = watch(process, timeout)
        except TimeoutError as error:
            raise PeerError(f"{error}; see {log}") from None
    if process.returncode:
        raise PeerError(f"{last_line(log.read_text(errors='replace'))} (see {log})")
    measured: dict[str, Any] = json.loads(result.read_text())
    return measured | {"startup_began": began, "peak_bytes": peak}


def row_of(
    peer: Peer, version: str, note: str, job: Mapping[str, Any], measured: Mapping[str, Any], reference: Any
) -> Row:
    """Turns what was measured into rates; ``reference`` are distaff's outputs, or None."""
    generated, prompt = sum(job["counts"]), sum(map(len, job["prompts"]))
    return Row(
        engine=peer.engine,
        dtype=peer.dtype,
        version=version,
        startup_s=measured["first_token_at"] - measured["startup_began"],
        output_per_s=generated / measured["seconds"],
        total_per_s=(generated + prompt) / measured["seconds"],
        decode_per_s=measured["decode_per_s"],
        peak_mib=measured["peak_bytes"] / 2**20,
        agreement=None if reference is None else agreement(measured["outputs"], reference),
        note=note,
    )


class ModelForms:
    """The model in the forms that engines read, each made when it is first wanted; all of the same GGUF file."""

    def __init__(self, artifact: Path | None, work: Path) -> None:
        self._artifact = artifact
        self._work = work

    def path(self, weights: str) -> Path:
        """The place of a form of `Peer.weights`; raises `PeerError`, or what the loader and the compiler raise."""
        from distaff.frontend.loading.demo_model import DEMO_MODEL, find_demo_model
        from distaff.tools.compile_on_demand import artifact_for

        if weights == "artifact":
            return self._artifact or artifact_for(DEMO_MODEL, dtype="float32")
        source = find_demo_model()
        if weights == "gguf":
            return source
        folder = self._work / f"{DEMO_MODEL}-float32"
        if not folder.is_dir():
            command = [sys.executable, str(DRIVERS / "export_gguf.py"), str(source), str(folder)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise PeerError(f"converting {source.name}: {last_line(result.stderr)}")
        return folder


def compare(
    peers: Sequence[Peer], job: Mapping[str, Any], forms: ModelForms, environments: Path, work: Path, timeout: float
) -> list[Row]:
    """Runs the engines one after another; distaff's outputs are the reference if it is among them."""
    rows, reference = [], None
    for peer in peers:
        version = ""
        click.echo(f"{peer.name} ...", err=True)
        try:
            python = interpreter(peer, environments)
            version = python.version
            own_job = {**job, "model": str(forms.path(peer.weights))}
            note = machine_note()
            if note:
                click.echo(f"warning: {note}", err=True)
            measured = execute(peer, python, own_job, work, timeout)
        except Exception as error:  # whatever stops one engine must not stop the others
            rows.append(Row(peer.engine, peer.dtype, version, note=f"failed: {error}"))
            continue
        if peer.engine == "distaff":
            reference = measured["outputs"]
        rows.append(row_of(peer, version, note, job, measured, reference))
    return rows


def _chosen(_context: click.Context, _option: click.Parameter, value: str) -> list[Peer]:
    names = [name.strip() for name in value.split(",")]
    unknown = set(names) - set(ENGINES)
    if unknown:
        raise click.BadParameter(f"{', '.join(sorted(unknown))}; known are {', '.join(ENGINES)}")
    return [peer for peer in PEERS if peer.engine in names]


_FILE = click.Path(path_type=Path, dir_okay=False)
_FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command(help=_HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--engines", "peers", default=",".join(ENGINES), show_default=True, callback=_chosen)
@click.option("--artifact", type=_FOLDER, help="distaff's float32 artifact of the model; else it is compiled.")
@click.option("--num-prompts", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--scale", type=click.FloatRange(0.0, 1.0, min_open=True), default=1.0, help="Shortens all requests.")
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
    rows = compare(peers, job, ModelForms(artifact, work), envs, work, timeout)
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
