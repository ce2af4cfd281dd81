"""The flags of both benchmarks that say what to run and where the results go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from distaff.tools.workload import KINDS, WorkItem, WorkloadSpec, load_workload, save_workload

F = TypeVar("F", bound=Callable[..., Any])

_POSITIVE = click.IntRange(min=1)
_RANGE = (_POSITIVE, _POSITIVE)
_FILE = click.Path(path_type=Path, dir_okay=False)

_OPTIONS = (
    click.option("--workload", type=click.Choice(KINDS), default="mixed", show_default=True, help="Kind of requests."),
    click.option("--num-prompts", type=_POSITIVE, default=64, show_default=True, help="Requests in all."),
    click.option("--seed", type=int, default=0, show_default=True, help="The same seed makes the same requests."),
    click.option("--input-len", type=_RANGE, default=(20, 600), show_default=True, help="Prompt lengths, from and to."),
    click.option("--output-len", type=_RANGE, default=(16, 256), show_default=True, help="Output lengths."),
    click.option("--prefix-len", type=_POSITIVE, default=256, show_default=True, help="What shared-prefix shares."),
    click.option("--vocab-size", type=_POSITIVE, help="Random token ids below this in place of words."),
    click.option("--dataset-path", type=_FILE, help="JSON lines of requests in place of the flags above."),
    click.option("--save-dataset", type=_FILE, help="Write the requests there too."),
    click.option("--json", "json_path", type=_FILE, help="Write the results there."),
    click.option("--plot", "plot_path", type=_FILE, help="Write a picture (.png, .svg, .pdf) of the latencies there."),
)


def workload_options(command: F) -> F:
    """Adds the flags to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def requested_items(flags: Mapping[str, Any]) -> list[WorkItem]:
    """The requests that the flags describe; raises `click.UsageError`."""
    try:
        if flags["dataset_path"] is not None:
            items = load_workload(flags["dataset_path"])
        else:
            items = WorkloadSpec(
                kind=flags["workload"],
                num_prompts=flags["num_prompts"],
                seed=flags["seed"],
                input_len=flags["input_len"],
                output_len=flags["output_len"],
                prefix_len=flags["prefix_len"],
                vocab_size=flags["vocab_size"],
            ).make()
        if flags["save_dataset"] is not None:
            save_workload(flags["save_dataset"], items)
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from error
    return items
