"""Trees of arrays as short texts with rich's markup, laid out as YAML."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

from distaff.frontend.typing import bytes_text


def array_text(x: Any) -> str:
    """The dtype and shape of an array, as in ``float32[2,3]``."""
    return f"[dim]{x.dtype}[/dim][{','.join(map(str, x.shape))}]"


def size_text(size: int, size_in_bytes: int) -> str:
    """A number of values and of bytes, as in ``50 (200 B)``; empty for none."""
    return f"{size:,} [dim]({bytes_text(size_in_bytes)})[/dim]" if size else ""


def tree_text(tree: Any) -> str:
    """A tree as YAML: a line a value, keys before their values, a dash before the items of sequences."""
    lines = _lines(_plain(tree))
    return "" if lines in (["{}"], ["[]"], ["None"]) else "\n".join(lines)


def _plain(x: Any) -> Any:
    """Containers as dicts and lists, other values as text."""
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return array_text(x)
    if isinstance(x, Mapping):
        return {str(key.value if isinstance(key, enum.Enum) else key): _plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(item) for item in x]
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return {f.name: _plain(getattr(x, f.name)) for f in dataclasses.fields(x)}
    return x if isinstance(x, str) else repr(x.value if isinstance(x, enum.Enum) else x)


def _lines(x: Any) -> list[str]:
    if isinstance(x, dict) and x:
        return [line for key, value in x.items() for line in _entry(key, value)]
    if isinstance(x, list) and x:
        return [mark + line for item in x for mark, line in zip(_marks(), _lines(item), strict=False)]
    return [x] if isinstance(x, str) else ["{}" if isinstance(x, dict) else "[]"]


def _entry(key: str, value: Any) -> list[str]:
    """The lines of a key and its value; the items of a sequence are not indented."""
    lines = _lines(value)
    if not isinstance(value, dict | list) or not value:
        return [f"{key}: {lines[0]}", *lines[1:]]
    return [f"{key}:", *(lines if isinstance(value, list) else [f"  {line}" for line in lines])]


def _marks() -> Any:
    """What stands before the lines of an item: a dash before the first."""
    yield "- "
    while True:
        yield "  "
