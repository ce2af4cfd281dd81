"""How objects, variables and states print."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from distaff.frontend.nnx.pytrees import Pytree, sorted_attributes
from distaff.frontend.nnx.rngs import RngState
from distaff.frontend.nnx.state import FlatState, State
from distaff.frontend.nnx.traversal import iter_graph
from distaff.frontend.nnx.variables import Variable

_UNITS = ("B", "KB", "MB", "GB", "TB")


def represent(x: Any) -> str:
    """The text of an object, variable or state, over several lines."""
    return _text(x, "", set(), outermost=True)


def display(*args: Any) -> None:
    """Print objects, variables, states or other values."""
    for x in args:
        print(x)


def _text(x: Any, indent: str, shown: set[int], outermost: bool = False) -> str:
    inner = indent + "  "
    if isinstance(x, Variable):
        metadata = x.get_metadata(exclude_required=True)
        fields = [("value", x.get_raw_value()), *metadata.items()]
        return _block(
            f"{type(x).__name__}(",
            _size(x),
            [f"{k}={_text(v, inner, shown, outermost)}" for k, v in fields],
            indent,
            ")",
        )
    if isinstance(x, Pytree):
        name = type(x).__name__
        if id(x) in shown:
            return f"{name}(...)"
        shown.add(id(x))
        if hasattr(x, "_length"):
            items = [x.__dict__[attribute] for key, attribute in sorted_attributes(x) if isinstance(key, int)]
            return _block(f"{name}([", "", [_text(item, inner, shown) for item in items], indent, "])")
        public = {key: value for key, value in vars(x).items() if not key.startswith("_")}
        if isinstance(x, Mapping):
            return _block(f"{name}({{", "", _items(public, inner, shown), indent, "})")
        lines = [f"{key}={_text(value, inner, shown)}" for key, value in public.items()]
        return _block(f"{name}(", _sizes(x), lines, indent, ")")
    if isinstance(x, State):
        start, end = ("{", "}") if indent else (f"{type(x).__name__}({{", "})")
        return _block(start, "", _items(x, inner, shown), indent, end)
    if isinstance(x, FlatState):
        return _block("FlatState([", "", [f"({path}, {_text(v, inner, shown, True)})" for path, v in x], indent, "])")
    if isinstance(x, Mapping) and indent:
        return _block("{", "", _items(x, inner, shown), indent, "}")
    if isinstance(x, jax.Array | np.ndarray) and x.size > 1 and not outermost and not isinstance(x, jax.core.Tracer):
        return f"Array(shape={x.shape}, dtype={x.dtype})"
    return repr(x).replace("\n", "\n" + indent)


def _items(x: Any, inner: str, shown: set[int]) -> list[str]:
    return [f"{key!r}: {_text(value, inner, shown, True)}" for key, value in x.items()]


def _block(start: str, remark: str, lines: list[str], indent: str, end: str) -> str:
    if not lines:
        return start + end
    return f"{start}{remark}\n" + ",\n".join(f"{indent}  {line}" for line in lines) + f"\n{indent}{end}"


def _counted(x: Variable[Any]) -> tuple[int, int]:
    leaves = [leaf for leaf in jax.tree.leaves(x.get_raw_value()) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]
    sizes = [math.prod(leaf.shape) for leaf in leaves]
    return sum(sizes), sum(n * leaf.dtype.itemsize for n, leaf in zip(sizes, leaves, strict=True))


def _amount(count: int, size: float) -> str:
    for unit in _UNITS:
        if size < 1024 or unit == _UNITS[-1]:
            break
        size /= 1024
    return f"{count:,} ({size:.1f} {unit})" if unit != "B" else f"{count:,} ({size} B)"


def _size(x: Variable[Any]) -> str:
    count, size = _counted(x)
    return f" # {_amount(count, size)}" if count else ""


def _sizes(x: Any) -> str:
    totals: dict[str, tuple[int, int]] = {}
    for _, value in iter_graph(x, graph=True):
        if isinstance(value, Variable):
            name = "RngState" if isinstance(value, RngState) else type(value).__name__
            before, now = totals.get(name, (0, 0)), _counted(value)
            totals[name] = before[0] + now[0], before[1] + now[1]
    parts = [f"{name}: {_amount(*total)}" for name, total in totals.items() if total[0]]
    if len(parts) > 1:
        parts.append(f"Total: {_amount(*map(sum, zip(*totals.values(), strict=True)))}")
    return f" # {', '.join(parts)}" if parts else ""
