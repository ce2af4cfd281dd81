"""profile-run: where the time of whole workloads goes, by the programs that their steps ran."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import click
import jax
from rich.console import Console
from rich.table import Table

from distaff.compiler.artifact import ProgramSpec
from distaff.kernels import native
from distaff.kernels.paged_attention import StepBatch
from distaff.kernels.sampling import SamplingRows
from distaff.runtime.config import EngineConfig
from distaff.runtime.engine import Engine
from distaff.runtime.model_runner import ModelRunner
from distaff.runtime.sampling_params import RequestOutputKind, SamplingParams
from distaff.tools.bench_peers import make_job

_HELP = """Profiles the workloads of bench_peers on ARTIFACT: all requests together, a 512-token prompt alone, one
request's decoding, and requests that share a prefix.

Every row sums up the steps that ran one program. "padding" is the part of its tokens that were none; times are
milliseconds of a step: of native kernels by their own counters, "XLA" the rest of the program's run, "host" what is
outside of it. Tokens that were computed again after preemption are counted below the table.

\b
Example:
  python -m distaff.tools.profile_run smol --workload all --workload prompt
"""


@dataclasses.dataclass(frozen=True)
class Step:
    """One engine step: its program, tokens in it, rows of one token, and seconds of the step, program and kernels."""

    program: ProgramSpec
    tokens: int
    decodes: int
    seconds: float
    program_seconds: float
    kernels: Counter[str]


class RecordingRunner(ModelRunner):
    """Notes what it ran last, and waits for it, so that the time of programs is known apart from sampling."""

    last: tuple[ProgramSpec, int, int, float] | None = None

    def execute(
        self, program: ProgramSpec, batch: StepBatch, rows: SamplingRows | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """See `ModelRunner.execute`."""
        began = time.perf_counter()
        logits, tokens = super().execute(program, batch, rows)
        logits.block_until_ready()
        self.last = program, int(batch.starts[-1]), int(batch.decodes), time.perf_counter() - began
        return logits, tokens


def run(
    engine: Engine, runner: RecordingRunner, prompts: Sequence[list[int]], counts: Sequence[int]
) -> tuple[list[Step], int]:
    """All steps of a run of greedy requests that come at once, and how many prompt tokens the prefix cache had."""
    final = RequestOutputKind.FINAL_ONLY
    for i, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, output_kind=final)
        engine.add_request(f"profile-{i}", prompt, params)
    steps: list[Step] = []
    cached = 0
    while engine.has_unfinished:
        runner.last = None
        before, began = _kernel_seconds(), time.perf_counter()
        outputs = engine.step()
        seconds, after = time.perf_counter() - began, _kernel_seconds()
        cached += sum(output.num_cached_tokens for output in outputs)
        if runner.last is not None:
            program, tokens, decodes, program_seconds = runner.last
            steps.append(Step(program, tokens, decodes, seconds, program_seconds, after - before))
    return steps, cached


def _kernel_seconds() -> Counter[str]:
    return Counter({name: seconds for name, (_, seconds) in native.timings().items()})


_WIDTH = 120
_COLUMNS = (
    "program",
    "steps",
    "prompt",
    "decode",
    "padding",
    "s",
    "ms",
    "matmul",
    "attention",
    "sampling",
    "XLA",
    "host",
)


def table(title: str, steps: Sequence[Step], cached: int, known: int) -> Table:
    """A row for each program and one for all; ``known`` are the tokens of the requests, ``cached`` of them found."""
    groups: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        groups[step.program.name].append(step)
    result = Table(*_COLUMNS, title=title, title_justify="left")
    for name, members in sorted(groups.items(), key=lambda item: item[1][0].program.tokens):
        result.add_row(*_cells(name, members))
    result.add_section()
    result.add_row(*_cells("all", steps))
    again = sum(step.tokens for step in steps) - (known - cached)
    result.caption = f"{known:,} tokens, {cached:,} of them found in the prefix cache, {again:,} computed again"
    return result


def _cells(name: str, steps: Sequence[Step]) -> list[str]:
    def total(value: Callable[[Step], float]) -> float:
        return sum(map(value, steps))

    seconds, program = total(lambda s: s.seconds), total(lambda s: s.program_seconds)
    kernels = sum((step.kernels for step in steps), Counter[str]())
    parts = [
        seconds,
        kernels["matmul"],
        kernels["paged_attention"],
        kernels["sampling"],
        program - sum(kernels.values()),
    ]
    parts.append(seconds - program)
    tokens, decodes = total(lambda s: s.tokens), total(lambda s: s.decodes)
    padding = 1 - tokens / total(lambda s: s.program.tokens)
    numbers = [f"{len(steps)}", f"{tokens - decodes:,.0f}", f"{decodes:,.0f}", f"{padding:.1%}", f"{seconds:.3f}"]
    return [name, *numbers, *(f"{1e3 * part / len(steps):.2f}" for part in parts)]


def workloads(vocab_size: int) -> dict[str, tuple[list[list[int]], list[int]]]:
    """Prompts and numbers of tokens to generate, by name."""
    job: dict[str, Any] = make_job(64, 0, 1.0, vocab_size)[0]
    shared = job["shared_prompts"][-1]
    return {
        "all": (job["prompts"], job["counts"]),
        "prompt": (job["long_prompts"][1:2], [1]),
        "alone": (job["single_prompts"][-1:], [job["single_count"]]),
        "shared": (shared, [job["shared_count"]] * len(shared)),
    }


@click.command(help=_HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("artifact", type=click.Path(exists=True, file_okay=False))
@click.option("--workload", "names", type=click.Choice(["all", "prompt", "alone", "shared"]), multiple=True)
@click.option("--pool", type=click.IntRange(min=1), default=256, show_default=True, help="MiB of the KV pool.")
@click.option("--max-num-batched-tokens", type=click.IntRange(min=1), help="Most tokens in one step.")
@click.option("--steps", "each", is_flag=True, help="Also a line for every step.")
def main(artifact: str, names: tuple[str, ...], pool: int, max_num_batched_tokens: int | None, each: bool) -> None:
    """Entry point of the command line."""
    runners: list[RecordingRunner] = []

    def make_runner(*arguments: Any, **settings: Any) -> RecordingRunner:
        runners.append(RecordingRunner(*arguments, **settings))
        return runners[0]

    config = EngineConfig(kv_cache_bytes=pool << 20, max_num_batched_tokens=max_num_batched_tokens)
    engine = Engine(artifact, config, make_runner=make_runner)
    console = Console(width=_WIDTH)
    chosen = workloads(engine.manifest.vocab_size)
    for name in names or tuple(chosen):
        prompts, counts = chosen[name]
        for _ in range(2):  # the first run warms up
            engine.reset_prefix_cache()
            steps, cached = run(engine, runners[0], prompts, counts)
        for step in steps if each else ():
            size = f"{step.tokens - step.decodes:4} prompt {step.decodes:3} decode"
            console.print(f"{step.program.name:14} {size} {1e3 * step.seconds:7.2f} ms")
        known = sum(map(len, prompts)) + sum(counts) - len(counts)
        console.print(table(name, steps, cached, known))
    engine.shutdown()


if __name__ == "__main__":
    main()
