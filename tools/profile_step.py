"""profile-step: where the time of a serving step goes, kernel by kernel."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Mapping

import click
from rich.console import Console
from rich.table import Table

from distaff.kernels import native
from distaff.runtime.config import EngineConfig
from distaff.runtime.engine import Engine
from distaff.runtime.sampling_params import SamplingParams

_WARM_UP_STEPS = 8
_HELP = """Profiles decode steps of ARTIFACT: batches of requests that each get one token, after prompts of --context
tokens.

Times of native kernels are their own counters'; "engine" is the whole step as the server sees it, and what no kernel
accounts for is XLA's own code, dispatch and the host's work.

\b
Example:
  python -m distaff.tools.profile_step smol --batch 1 --batch 32
"""


@dataclasses.dataclass(frozen=True)
class StepProfile:
    """Means over the steps of one batch size: seconds of a step, and (calls, seconds) of each kernel in it."""

    batch: int
    seconds: float
    kernels: Mapping[str, tuple[float, float]]

    @property
    def share_in_kernels(self) -> float:
        """The part of a step's time that native kernels took."""
        return sum(seconds for _, seconds in self.kernels.values()) / self.seconds


def profile(engine: Engine, batch: int, context: int, steps: int, seed: int = 0) -> StepProfile:
    """Runs ``batch`` requests and measures ``steps`` steps in which each of them gets one token."""
    rng = random.Random(seed)
    vocab = engine.manifest.vocab_size
    params = SamplingParams(max_tokens=_WARM_UP_STEPS + steps + 8, temperature=0.0, ignore_eos=True, detokenize=False)
    for i in range(batch):
        engine.add_request(f"profile-{i}", [rng.randrange(vocab) for _ in range(context)], params)
    decoding = 0
    while decoding < _WARM_UP_STEPS:
        engine.step()
        decoding += engine.stats.prompt_tokens == 0
    before, began = native.timings(), time.perf_counter()
    for _ in range(steps):
        engine.step()
    seconds, after = time.perf_counter() - began, native.timings()
    engine.abort([f"profile-{i}" for i in range(batch)])
    spent = {name: (after[name][0] - calls, after[name][1] - total) for name, (calls, total) in before.items()}
    kernels = {name: (calls / steps, total / steps) for name, (calls, total) in spent.items() if calls}
    return StepProfile(batch, seconds / steps, kernels)


def show(console: Console, profiles: list[StepProfile]) -> None:
    """A table with a row for each kernel and batch size."""
    table = Table("batch", "kernel", "calls a step", "ms a step", "share", title="decode steps", title_justify="left")
    for one in profiles:
        rows = sorted(one.kernels.items(), key=lambda item: -item[1][1])
        for name, (calls, seconds) in rows:
            table.add_row(str(one.batch), name, f"{calls:.0f}", f"{1e3 * seconds:.3f}", f"{seconds / one.seconds:.1%}")
        table.add_row(str(one.batch), "all kernels", "", "", f"{one.share_in_kernels:.1%}")
        table.add_row(str(one.batch), "engine", "", f"{1e3 * one.seconds:.3f}", "100.0%", end_section=True)
    console.print(table)


@click.command(help=_HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("artifact", type=click.Path(exists=True, file_okay=False))
@click.option("--batch", "batches", type=click.IntRange(min=1), multiple=True, default=(1, 32), show_default=True)
@click.option("--context", type=click.IntRange(min=1), default=256, show_default=True, help="Prompt tokens.")
@click.option("--steps", type=click.IntRange(min=1), default=50, show_default=True)
def main(artifact: str, batches: tuple[int, ...], context: int, steps: int) -> None:
    """Entry point of the command line."""
    engine = Engine(artifact, EngineConfig(enable_prefix_caching=False))
    show(Console(), [profile(engine, batch, context, steps) for batch in batches])
    engine.shutdown()


if __name__ == "__main__":
    main()
