"""bench-offline: the same workloads without a server, through `distaff.runtime.LLM`; also start-up time and memory."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from distaff.tools.bench_report import BenchReport
from distaff.tools.workload import WorkItem
from distaff.tools.workload_options import requested_items, workload_options

if TYPE_CHECKING:
    from distaff.runtime.llm import LLM
    from distaff.runtime.outputs import RequestOutput

_HELP = """Measures MODEL, an artifact folder, in this process.

The start-up time reaches from before JAX is imported to the first token.

\b
Examples:
  python -m distaff.tools.bench_offline ./smollm2
  python -m distaff.tools.bench_offline ./smollm2 --workload fixed --input-len 1 512 --output-len 1 128 --json out.json
"""


def start(model: str, item: WorkItem, settings: dict[str, Any]) -> tuple[LLM, float, float]:
    """The model with one token generated, the seconds to load it, and the seconds to the first token."""
    began = time.perf_counter()
    from distaff.runtime.llm import LLM
    from distaff.runtime.sampling_params import SamplingParams

    llm = LLM(model, **settings)
    loaded = time.perf_counter()
    # A prompt too short to leave a prefix in the cache.
    llm.generate([item.prompt[:8]], SamplingParams(max_tokens=1, temperature=0.0), use_tqdm=False)
    return llm, loaded - began, time.perf_counter() - began


def run(llm: LLM, items: list[WorkItem], progress: bool) -> tuple[list[RequestOutput], float]:
    """The outputs of all requests, given to the engine at once, and the seconds that they took."""
    from distaff.runtime.sampling_params import SamplingParams

    params = [SamplingParams(max_tokens=item.output_tokens, temperature=0.0, ignore_eos=True) for item in items]
    began = time.perf_counter()
    outputs = llm.generate([item.prompt for item in items], params, use_tqdm=progress)
    return outputs, time.perf_counter() - began


def peak_memory() -> int:
    """Bytes of main memory that this process has held at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes


def report(outputs: list[RequestOutput], duration: float, facts: dict[str, Any]) -> BenchReport:
    """Sums up a run; ``facts`` come first."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)
    stats = [stats for output in outputs for stats in output.metrics or ()]
    facts = facts | {
        "requests": len(outputs),
        "duration [s]": duration,
        "prompt tokens": prompt,
        "cached prompt tokens": sum(output.num_cached_tokens for output in outputs),
        "output tokens": generated,
        "output tokens/s": generated / duration,
        "total tokens/s": (prompt + generated) / duration,
        "peak memory [MiB]": peak_memory() / 2**20,
    }
    seconds = {
        "TTFT": [s.time_to_first_token for s in stats if s.time_to_first_token is not None],
        "TPOT": [s.mean_inter_token_latency for s in stats if s.mean_inter_token_latency is not None],
        "E2E": [s.e2e_seconds for s in stats],
    }
    return BenchReport("offline", facts, seconds)


@click.command(help=_HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("model", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--max-num-seqs", type=click.IntRange(min=1), help="Most requests in one step.")
@click.option("--max-num-batched-tokens", type=click.IntRange(min=1), help="Most tokens in one step.")
@click.option("--num-gpu-blocks-override", type=click.IntRange(min=2), help="Pages of the KV cache.")
@click.option("--enable-prefix-caching/--no-enable-prefix-caching", default=True, show_default=True)
@workload_options
def main(
    model: Path,
    max_num_seqs: int | None,
    max_num_batched_tokens: int | None,
    num_gpu_blocks_override: int | None,
    enable_prefix_caching: bool,
    **flags: Any,
) -> None:
    """Entry point of the command line."""
    from distaff.compiler.artifact import ArtifactError
    from distaff.compiler.errors import CompileError
    from distaff.frontend.loading import CheckpointError
    from distaff.frontend.models import ConfigError
    from distaff.runtime.errors import EngineConfigError, PromptError

    items = requested_items(flags)
    settings = {
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "num_gpu_blocks_override": num_gpu_blocks_override,
        "enable_prefix_caching": enable_prefix_caching,
    }
    try:
        llm, load_seconds, first_token_seconds = start(str(model), items[0], settings)
        outputs, duration = run(llm, items, sys.stderr.isatty())
    except (ArtifactError, CheckpointError, CompileError, ConfigError, EngineConfigError, PromptError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    facts = {"model": str(model), "load [s]": load_seconds, "start to first token [s]": first_token_seconds}
    report(outputs, duration, facts).deliver(Console(), flags["json_path"], flags["plot_path"])


if __name__ == "__main__":
    main()
