"""Shows what the compiler found and made, as tables for people.

A report is JSON: whatever the passes have to say. Lists of objects become tables, objects become two columns, so that a
pass can add to the report without a change here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

from distaff.compiler.artifact import Manifest
from distaff.compiler.lowering.build import Progress


def show_report(console: Console, report: Mapping[str, Any]) -> None:
    """Prints each section of ``report``: findings, validation, passes."""
    facts = {name: value for name, value in report.items() if not isinstance(value, (Mapping, list))}
    if facts:
        show_facts(console, "model", facts)
    for name, value in report.items():
        if isinstance(value, list):
            show_rows(console, name, _counted(value))
        elif isinstance(value, Mapping):
            show_facts(console, name, value)


@contextmanager
def live_status(console: Console) -> Iterator[Progress]:
    """A line that shows how far the compiler is, from its first word on: before that the loader has its own bar."""
    status = console.status("")

    def tell(what: str, done: int, total: int) -> None:
        status.update(f"{what} {done}/{total}")
        status.start()

    try:
        yield tell
    finally:
        status.stop()


def show_facts(console: Console, title: str, facts: Mapping[str, Any]) -> None:
    """Prints names and values in two columns."""
    table = _table(title)
    table.add_column()
    table.add_column()
    for name, value in facts.items():
        table.add_row(_words(name), _text(name, value))
    table.show_header = False
    console.print(table)


def show_rows(console: Console, title: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Prints objects as rows; a column for every name that any of them has."""
    rows = list(rows)
    table = _table(f"{title} ({len(rows)})")
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        numeric = all(isinstance(row.get(name, 0), (int, float)) for row in rows)
        table.add_column(
            _words(name), justify="right" if numeric else "left", overflow="fold", no_wrap=name in ("name", "times")
        )
    for row in rows:
        table.add_row(*(_text(name, row.get(name)) for name in names))
    console.print(table)


def show_kernels(console: Console, platform: str, *, passed_over: bool) -> None:
    """Prints which kernel serves which operation on ``platform``, and with ``passed_over`` why others do not."""
    from distaff.kernels import native, survey

    calls: dict[tuple[str, str, str], list[str]] = {}
    for choice in survey(platform):
        others = "; ".join(f"{v.implementation.name}: {v.reason}" for v in choice.verdicts if not v.chosen)
        calls.setdefault((choice.operation, choice.served_by or "nothing", others), []).append(choice.call)
    rows = [
        {"name": operation, "served_by": name, "for": ", ".join(found)}
        | ({"passed_over": others} if passed_over else {})
        for (operation, name, others), found in calls.items()
    ]
    show_rows(console, f"kernels on {platform}", rows)
    if platform == "cpu":
        found = ", ".join(native.features()) or "not built: this installation was made without a C++ compiler"
        console.print(f"native kernels: {found}")


def show_summary(console: Console, report: Mapping[str, Any]) -> None:
    """Prints `findings` and, where formats were measured, what they cost."""
    console.print(*findings(report), sep="\n", markup=False)
    if "quality_on_text" in report:
        show_rows(console, "weights", report["weights"])
        show_facts(console, "quality_on_text", report["quality_on_text"])


def findings(report: Mapping[str, Any]) -> list[str]:
    """A line for each kind of attention and what serves it, and for each validation."""
    attentions = Counter(
        ", ".join(
            filter(None, (a["served_by"], f"mask {a['mask']}", a["reason"] and f"{a['reason']} ({a['location']})"))
        )
        for a in report["attentions"]
    )
    lines = [f"attention: {count} served by {what}" for what, count in attentions.items()]
    for name, what in (("validation", "derived"), ("validation_of_packed_weights", "with packed weights")):
        if result := report.get(name):
            lines.append(f"{what}: at most {result['relative_error']:.2g} of the largest logit off the plain model")
    return lines


def artifact_facts(manifest: Manifest) -> dict[str, str]:
    """Sizes and limits of an artifact, ready to show."""
    return {
        "model": f"{manifest.model} {manifest.architecture}".strip(),
        "weights": f"{size(manifest.weight_bytes)}, mostly {manifest.dtype}",
        "KV cache": f"{size(manifest.bytes_per_token)} a token in {len(manifest.caches)} buffers",
        "KV pool": f"{manifest.num_pages} pages of {manifest.page_size} tokens, "
        f"{size(manifest.num_pages * manifest.bytes_per_page)}",
        "limits": f"{manifest.max_model_len} tokens a request, {manifest.max_batch} requests and "
        f"{manifest.max_step_tokens} tokens a step",
        "platform": manifest.platform,
    }


def size(count: int) -> str:
    """``count`` bytes for people."""
    return f"{count / 2**20:,.1f} MiB" if count >= 1 << 20 else f"{count / 2**10:,.1f} KiB"


def _counted(rows: list[Any]) -> list[Mapping[str, Any]]:
    """Equal rows once with their number: a model of thirty equal layers finds thirty equal attentions."""
    counts: dict[str, int] = {}
    first: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        shown = row if isinstance(row, Mapping) else {"": row}
        key = repr(sorted(shown.items(), key=lambda item: item[0]))
        counts[key] = counts.get(key, 0) + 1
        first.setdefault(key, shown)
    if len(first) == len(rows):
        return list(first.values())
    return [{"times": counts[key], **row} for key, row in first.items()]


def _table(title: str) -> Table:
    return Table(title=_words(title), title_justify="left", title_style="bold", box=None, pad_edge=False)


def _words(name: str) -> str:
    return name.replace("_", " ").removesuffix(" bytes")


def _text(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int) and "bytes" in name:
        return size(value)
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)
