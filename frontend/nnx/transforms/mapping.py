"""``vmap`` and ``pmap`` of functions of objects, and what they do to the names of the axes of variables."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from distaff.frontend.jax_compat import is_mapped
from distaff.frontend.nnx import spmd
from distaff.frontend.nnx.extract import Inside, Static
from distaff.frontend.nnx.graphdef import graph_mode
from distaff.frontend.nnx.transforms.compilation import check_not_bound, graph_updates_mode
from distaff.frontend.nnx.transforms.crossing import Entry, Exit
from distaff.frontend.nnx.transforms.prefixes import values_of
from distaff.frontend.nnx.variables import PARTITION_NAME, Variable

F = TypeVar("F", bound=Callable[..., Any])
Axis = int | None
_MISSING: Any = object()


def group(leaves: Sequence[Any], axes: Sequence[Any], names: Sequence[Any]) -> tuple[list[Any], ...]:
    """The arrays by axis: a list for each of ``names``."""
    groups: dict[Any, list[Any]] = {name: [] for name in names}
    for leaf, axis in zip(leaves, axes, strict=True):
        groups[axis].append(leaf)
    return tuple(groups.values())


def ungroup(groups: Sequence[Sequence[Any]], axes: Sequence[Any], names: Sequence[Any]) -> list[Any]:
    """The inverse of ``group``."""
    remaining = {name: iter(found) for name, found in zip(names, groups, strict=True)}
    return [next(remaining[axis]) for axis in axes]


def per_argument(axes: Any, args: Sequence[Any], name: str, transform: str) -> tuple[Any, ...]:
    """The axes of each positional argument.

    Raises:
        ValueError: there is another number of them.
    """
    if not isinstance(axes, tuple | list):
        return (axes,) * len(args)
    if len(axes) != len(args):
        raise ValueError(
            f"{name} of nnx.{transform} has {len(axes)} entries for {len(args)} positional arguments; give one for each, "
            "or one int (or None) for all."
        )
    return tuple(axes)


def remove_names(entry: Entry, inside: Inside, metadata: Mapping[str, Any]) -> None:
    """Take the mapped axis out of the names of the arguments' variables."""
    for cell, axis in zip(inside.cells, entry.cell_values, strict=True):
        if isinstance(cell, Variable) and isinstance(axis, int):
            spmd.remove_axis(cell, axis, metadata)


class _Mapped:
    """A function under ``vmap`` or ``pmap``: arrays by axis in, arrays by axis out."""

    def __init__(
        self, fn: Callable[..., Any], entry: Entry, out_axes: Any, metadata: Mapping[str, Any], statics: tuple[Any, ...]
    ) -> None:
        self._fn = fn
        self._entry = entry
        self._out_axes = out_axes
        self._metadata = metadata
        self.names = tuple(dict.fromkeys([*entry.cell_values, *values_of(out_axes)]))

    def __call__(self, leaves: Sequence[Any]) -> Any:
        entry = self._entry
        inside = entry.enter(leaves)
        if self._metadata:
            remove_names(entry, inside, self._metadata)
        *args, kwargs = inside.trees
        out = self._fn(*args, **kwargs)
        if self._metadata:
            spmd.add_names(entry, inside, out, self._out_axes, self._metadata)
        made, exit = entry.leave(inside, out, self._out_axes)
        self._check_shared(made, exit)
        return Static(exit), group(made, exit.values, self.names)

    def _check_shared(self, leaves: Sequence[Any], exit: Exit) -> None:
        for leaf, axis, label, is_result in zip(leaves, exit.values, exit.labels, exit.is_result, strict=True):
            if axis is None and is_mapped(leaf):
                which = label or "an output"
                fix = (
                    "give it an axis in out_axes"
                    if is_result
                    else "give it an axis in in_axes (and a value for each row), or don't assign what depends on a row"
                )
                raise ValueError(
                    f"nnx.{self._entry.transform}: {which} has the axis None, so all rows share one value, but it was "
                    f"given one that differs from row to row (of shape {jax.numpy.shape(leaf)} in each): {fix}."
                )
