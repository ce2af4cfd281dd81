"""What `distaff.tools.bench_peers` has measured, one row an engine: on the console, as JSON, markdown and a picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_COLUMNS = (
    ("engine", "engine"),
    ("version", "version"),
    ("dtype", "dtype"),
    ("startup_s", "start to first token [s]"),
    ("output_per_s", "output tokens/s"),
    ("total_per_s", "total tokens/s"),
    ("decode_per_s", "alone: decode tokens/s"),
    ("step_mib", "alone: MiB a step reads"),
    ("memory_share", "alone: of the memory's limit"),
    ("memory_gb_per_s", "memory just before: long reads [GB/s]"),
    ("gops", "all: Gop/s"),
    ("long_prompt_s", "512-token prompt to token [s]"),
    ("shared_prefix_s", "32 requests sharing 400 tokens [s]"),
    ("peak_mib", "peak memory [MiB]"),
    ("agreement", "same first tokens"),
    ("spread", "spread of rounds"),
    ("note", "note"),
)
_PANELS = ("output_per_s", "decode_per_s", "long_prompt_s", "shared_prefix_s", "startup_s", "peak_mib")


@dataclasses.dataclass
class Row:
    """The results of an engine; without them, ``note`` has the reason.

    ``step_mib`` is what a step must read, ``memory_share`` the decode rate over that at which the memory could give it,
    ``memory_gb_per_s`` what the memory gave for some seconds just before the engine ran, ``gops`` the operations of all
    requests over their time (see `distaff.tools.roofline`). ``agreement`` is the share of requests whose first tokens
    are those of distaff's float32; ``spread`` the range of the rounds' times for all requests over their median.
    """

    engine: str
    dtype: str
    version: str = ""
    startup_s: float | None = None
    output_per_s: float | None = None
    total_per_s: float | None = None
    decode_per_s: float | None = None
    long_prompt_s: float | None = None
    shared_prefix_s: float | None = None
    peak_mib: float | None = None
    step_mib: float | None = None
    memory_share: float | None = None
    memory_gb_per_s: float | None = None
    gops: float | None = None
    agreement: float | None = None
    spread: float | None = None
    note: str = ""

    def cells(self) -> list[str]:
        """One text for each column."""
        return [_text(name, getattr(self, name)) for name, _ in _COLUMNS]


def agreement(outputs: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> float:
    """The share of equal outputs."""
    return sum(list(a) == list(b) for a, b in zip(outputs, reference, strict=True)) / len(reference)


def show(console: Console, rows: Sequence[Row]) -> None:
    """Prints a table with a column for each engine, and the notes below it."""
    titles = [escape(title) for _, title in _COLUMNS]
    header, *lines, _notes = zip(titles, *(row.cells() for row in rows), strict=True)
    table = Table(*header)
    for line in lines:
        table.add_row(*line)
    console.print(table)
    for row in rows:
        if row.note:
            console.print(f"{row.engine}, {row.dtype}: {row.note}", markup=False)


def markdown(rows: Sequence[Row]) -> str:
    """The table for a document."""
    lines = [[title for _, title in _COLUMNS], ["---"] * len(_COLUMNS), *(row.cells() for row in rows)]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def write_json(path: Path, rows: Sequence[Row], workload: dict[str, object]) -> None:
    """The workload's sizes and all rows."""
    path.write_text(json.dumps({"workload": workload, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1))


def write_plot(path: Path, rows: Sequence[Row]) -> None:
    """A panel of bars for each of the main numbers; engines that failed are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row.output_per_s is not None][::-1]  # bars are drawn from below
    labels = [f"{row.engine}\n{row.dtype}" for row in shown]
    figure, panels = pyplot.subplots(1, len(_PANELS), figsize=(3.2 * len(_PANELS), 1 + 0.5 * len(shown)), sharey=True)
    for axes, name in zip(panels, _PANELS, strict=True):
        bars = axes.barh(labels, [getattr(row, name) or 0.0 for row in shown])
        axes.bar_label(bars, fmt="{:,.2f}" if name.endswith("prefix_s") or "prompt" in name else "{:,.0f}", padding=2)
        axes.margins(x=0.25)
        axes.set_xlabel(dict(_COLUMNS)[name])
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _text(name: str, value: float | str | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if name in ("agreement", "spread", "memory_share"):
        return f"{value:.0%}"
    return f"{value:.2f}" if name.endswith("_s") and not name.endswith("per_s") else f"{value:,.1f}"
