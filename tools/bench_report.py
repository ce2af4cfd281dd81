"""The results of a benchmark: throughput and latencies, as a table, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

PERCENTILES = (50, 90, 99)


@dataclasses.dataclass
class BenchReport:
    """What a run has measured.

    ``facts`` are single numbers and words by name; ``seconds`` are samples of latencies by name: "TTFT" (time to first
    token), "TPOT" (mean time per output token after the first, of a request), "ITL" (time between outputs), "E2E".
    """

    title: str
    facts: dict[str, Any]
    seconds: Mapping[str, Sequence[float]]

    def summary(self) -> dict[str, dict[str, float]]:
        """Mean and percentiles of each latency in milliseconds; latencies without samples are left out."""
        return {
            name: {"mean": float(np.mean(samples)) * 1e3}
            | {f"p{p}": float(np.percentile(samples, p)) * 1e3 for p in PERCENTILES}
            for name, samples in self.seconds.items()
            if len(samples)
        }

    def show(self, console: Console) -> None:
        """Prints two tables."""
        facts = Table(title=self.title, show_header=False)
        for name, value in self.facts.items():
            facts.add_row(name, f"{value:,.2f}" if isinstance(value, float) else str(value))
        console.print(facts)
        latencies = Table("ms", "mean", *(f"p{p}" for p in PERCENTILES))
        for column in latencies.columns[1:]:
            column.justify = "right"
        for name, values in self.summary().items():
            latencies.add_row(name, *(f"{value:,.2f}" for value in values.values()))
        console.print(latencies)

    def write_json(self, path: Path) -> None:
        """Facts, summaries and all samples."""
        samples = {name: list(values) for name, values in self.seconds.items()}
        report = {"title": self.title, **self.facts, "milliseconds": self.summary(), "seconds": samples}
        path.write_text(json.dumps(report, indent=1))

    def write_plot(self, path: Path) -> None:
        """One cumulative distribution for each latency."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        shown = [(name, np.sort(values)) for name, values in self.seconds.items() if len(values)]
        figure, panels = pyplot.subplots(1, len(shown), figsize=(3.5 * len(shown), 3), squeeze=False)
        for axes, (name, values) in zip(panels[0], shown, strict=True):
            axes.plot(values * 1e3, np.arange(1, len(values) + 1) / len(values))
            axes.set(xlabel=f"{name} [ms]", ylabel="share", ylim=(0, 1))
            axes.grid(alpha=0.3)
        figure.suptitle(self.title)
        figure.tight_layout()
        figure.savefig(path)
        pyplot.close(figure)

    def deliver(self, console: Console, json_path: Path | None, plot_path: Path | None) -> None:
        """Shows the report and writes what was asked for."""
        self.show(console)
        if json_path is not None:
            self.write_json(json_path)
        if plot_path is not None:
            self.write_plot(plot_path)
