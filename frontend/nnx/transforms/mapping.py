"""``vmap`` and ``pmap`` of functions of objects, and what they do to the names of variables' axes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distaff.frontend.jax_compat import is_mapped, mapped_axis
from distaff.frontend.nnx import spmd
from distaff.frontend.nnx.boundary import Inside, Static
from distaff.frontend.nnx.graphdef import graph_mode
from distaff.frontend.nnx.transforms.compilation import check_not_bound, updates_mode
from distaff.frontend.nnx.transforms.crossing import Entry, Exit
from distaff.frontend.nnx.transforms.prefixes import check_prefix, values_of
from distaff.frontend.nnx.variable_metadata import PARTITION_NAME
from distaff.frontend.nnx.variables import Variable

_MISSING: Any = object()


def group(leaves: Sequence[Any], axes: Sequence[Any], names: Sequence[Any]) -> tuple[list[Any], ...]:
    """The arrays (or what else belongs to these axes) by axis: a list for each of ``names``."""
    groups: dict[Any, list[Any]] = {name: [] for name in names}
    for leaf, axis in zip(leaves, axes, strict=True):
        groups[axis].append(leaf)
    return tuple(groups.values())


def ungroup(groups: Iterable[Iterable[Any]], axes: Sequence[Any], names: Sequence[Any]) -> list[Any]:
    """The inverse of ``group``."""
    remaining = {name: iter(found) for name, found in zip(names, groups, strict=True)}
    return [next(remaining[axis]) for axis in axes]


def per_argument(axes: Any, count: int, name: str, transform: str) -> tuple[Any, ...]:
    """The axes of each of ``count`` positional arguments.

    Raises:
        ValueError: there is another number of them.
    """
    if not isinstance(axes, tuple | list):
        return (axes,) * count
    if len(axes) != count:
        raise ValueError(
            f"{name} of nnx.{transform} has {len(axes)} entries for {count} positional arguments; give one for "
            "each, or "
            "one int (or None) for all."
        )
    return tuple(axes)


def positional(
    f: Callable[..., Any], axes: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, with those given by name in their places if there are axes for them."""
    if isinstance(axes, tuple | list) and len(axes) > len(args) and kwargs:
        bound = inspect.signature(f).bind(*args, **kwargs)
        return bound.args, bound.kwargs
    return args, kwargs


def remove_names(inside: Inside, axes: Sequence[Any], metadata: Mapping[str, Any]) -> None:
    """Take the mapped axes out of the names of the arguments' variables."""
    for cell, axis in zip(inside.cells, axes, strict=True):
        if isinstance(cell, Variable) and isinstance(axis, int):
            spmd.remove_axis(cell, axis, metadata)


def namer(metadata: Mapping[str, Any]) -> Callable[[Any, Any], None] | None:
    """What gives variables their names back as they leave, for ``Entry.leave``."""

    def add_name(cell: Any, axis: Any) -> None:
        if isinstance(cell, Variable) and isinstance(axis, int):
            spmd.add_axis(cell, axis, metadata)

    return add_name if metadata else None


def _check_shared(transform: str, leaves: Sequence[Any], exit: Exit) -> None:
    """Refuse values that differ from row to row where all rows share one."""
    for i, (leaf, axis, label) in enumerate(zip(leaves, exit.values, exit.labels, strict=True)):
        if axis is not None or not is_mapped(leaf):
            continue
        if i < exit.num_updates:
            fix = "give it an axis in in_axes and a value for each row, or assign nothing to it that depends on a row"
        else:
            fix = "give it an axis in out_axes"
        raise ValueError(
            f"Error at {transform}: {label or 'an output'} got axis spec None but output was batched on axis "
            f"{mapped_axis(leaf)}. None says that all rows share one value, but the function gave it one that differs "
            f"from row to row, of shape {jnp.shape(leaf)} in each; {fix}."
        )


def check_sizes(entry: Entry, axis_size: int | None = None) -> None:
    """Refuse arrays of different sizes along their axes."""
    first: tuple[int, str] | None = None if axis_size is None else (axis_size, "axis_size")
    for leaf, axis, label in zip(entry.leaves, entry.values, entry.leaf_labels, strict=True):
        if not isinstance(axis, int):
            continue
        shape = jnp.shape(leaf)
        what = f"{label or 'an argument'} of shape {shape}"
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"nnx.{entry.transform} maps over axis {axis} of {what}, which has no such axis.")
        if first is None:
            first = shape[axis], what
        elif shape[axis] != first[0]:
            raise ValueError(
                f"nnx.{entry.transform} got inconsistent sizes for array axes to be mapped: {first[0]} of "
                f"{first[1]}, but "
                f"{shape[axis]} of {what} along axis {axis}."
            )


class _Rows:
    """A function of objects as one of arrays by axis, as ``jax.vmap`` maps it.

    ``also`` are cells whose values come out, changed or not.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        entry: Entry,
        in_axes: Any,
        out_axes: Any,
        metadata: Mapping[str, Any],
        also: frozenset[int] = frozenset(),
    ) -> None:
        self._fn = fn
        self._entry = entry
        self._out_axes = out_axes
        self._metadata = metadata
        self._also = also
        self.names = tuple(dict.fromkeys([*entry.cell_values, *values_of(in_axes), *values_of(out_axes)]))

    def __call__(self, leaves: Sequence[Any]) -> tuple[Any, Any]:
        entry = self._entry
        inside = entry.enter(leaves)
        if self._metadata:
            remove_names(inside, entry.cell_values, self._metadata)
        *args, kwargs = inside.trees
        out = self._fn(*args, **kwargs)
        made, exit = entry.leave(inside, out, self._out_axes, also=self._also, prepare=namer(self._metadata))
        _check_shared(entry.transform, made, exit)
        return Static(exit), group(made, exit.values, self.names)


def vmap(
    f: Any = _MISSING,
    *,
    in_axes: Any = 0,
    out_axes: Any = 0,
    axis_name: Hashable | None = None,
    axis_size: int | None = None,
    spmd_axis_name: Any = None,
    transform_metadata: Mapping[str, Any] | None = None,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """``jax.vmap`` for functions of objects: variables of an object with an axis have a value for each row.

    >>> @nnx.vmap(in_axes=(nnx.StateAxes({nnx.Param: 0, ...: None}), 0))
    ... def forward(models, x):
    ...     return models(x)

    Args:
        f: the function; left out, a decorator is returned.
        in_axes: for each argument an axis or None, a tree of these, or for an object a ``StateAxes`` (with graph
            updates)
            or what ``nnx.prefix`` returned. A variable with None has one value for all rows; what depends on a row
            can't
            be assigned to it.
        out_axes: likewise, for the result.
        axis_name: as for ``jax.vmap``.
        axis_size: as for ``jax.vmap``.
        spmd_axis_name: as for ``jax.vmap``.
        transform_metadata: ``{nnx.PARTITION_NAME: name}``: the name of the axis among those of variables.
        graph: as for ``nnx.jit``.
        graph_updates: as for ``nnx.jit``.

    Raises:
        ValueError: at a call: axes fit no argument, sizes differ, a variable at two places has different axes, or a
            variable or output with None would differ from row to row.
    """
    if f is _MISSING:
        options = {key: value for key, value in locals().items() if key != "f"}
        return functools.partial(vmap, **options)
    check_not_bound(f, "vmap")
    follow = graph_mode(graph)
    updates, metadata = updates_mode(follow, graph_updates), dict(transform_metadata or {})
    check_prefix(in_axes, "in_axes", "vmap", updates)
    check_prefix(out_axes, "out_axes", "vmap", updates)

    @functools.wraps(f)
    def mapped(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = positional(f, in_axes, args, kwargs)
        axes = (*per_argument(in_axes, len(args), "in_axes", "vmap"), 0)
        entry = Entry("vmap", (*args, kwargs), follow, updates, axes)
        check_sizes(entry, axis_size)
        rows = _Rows(f, entry, in_axes, out_axes, metadata)
        static, groups = jax.vmap(
            rows,
            in_axes=(entry.values,),
            out_axes=(None, rows.names),
            axis_name=axis_name,
            axis_size=axis_size,
            spmd_axis_name=spmd_axis_name,
        )(entry.leaves)
        return entry.finish(static.value, ungroup(groups, static.value.values, rows.names))

    return mapped


def pmap(
    f: Any = _MISSING,
    *,
    axis_name: Hashable | None = None,
    in_axes: Any = 0,
    out_axes: Any = 0,
    static_broadcasted_argnums: int | Iterable[int] = (),
    devices: Sequence[jax.Device] | None = None,
    backend: str | None = None,
    axis_size: int | None = None,
    donate_argnums: int | Iterable[int] = (),
    transform_metadata: Mapping[str, Any] | None = None,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """``jax.pmap`` for functions of objects: as ``nnx.vmap``, with each row on a device of its own.

    Args:
        f: the function; left out, a decorator is returned.
        axis_name: as for ``jax.pmap``.
        in_axes: as for ``nnx.vmap``.
        out_axes: as for ``nnx.vmap``.
        static_broadcasted_argnums: arguments that are constants, hashable.
        devices: as for ``jax.pmap``.
        backend: as for ``jax.pmap``.
        axis_size: as for ``jax.pmap``.
        donate_argnums: as for ``jax.pmap``; an object's variables hold the results' arrays afterwards.
        transform_metadata: as for ``nnx.vmap``.
        graph: as for ``nnx.jit``.
        graph_updates: as for ``nnx.jit``.

    Raises:
        ValueError: as for ``nnx.vmap``.
    """
    if f is _MISSING:
        options = {key: value for key, value in locals().items() if key != "f"}
        return functools.partial(pmap, **options)
    check_not_bound(f, "pmap")
    donated = frozenset((donate_argnums,) if isinstance(donate_argnums, int) else donate_argnums)
    follow = graph_mode(graph)
    updates, metadata = updates_mode(follow, graph_updates), dict(transform_metadata or {})
    check_prefix(in_axes, "in_axes", "pmap", updates)
    check_prefix(out_axes, "out_axes", "pmap", updates)
    given = static_broadcasted_argnums
    statics = frozenset((given,) if isinstance(given, int) else given)
    compiled: dict[Any, tuple[_Rows, Any]] = {}

    @functools.wraps(f)
    def mapped(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = positional(f, in_axes, args, kwargs)
        fixed = {i: args[i] for i in sorted(statics) if i < len(args)}
        dynamic = [arg for i, arg in enumerate(args) if i not in fixed]
        axes: Any = in_axes
        if isinstance(axes, tuple | list) and len(axes) == len(args):
            axes = tuple(axis for i, axis in enumerate(axes) if i not in fixed)
        axes = (*per_argument(axes, len(dynamic), "in_axes", "pmap"), 0)
        entry = Entry("pmap", (*dynamic, kwargs), follow, updates, axes)
        check_sizes(entry, axis_size)
        numbers = [i for i in range(len(args)) if i not in fixed]
        is_donated, also = entry.of_trees({k for k, i in enumerate(numbers) if i in donated})
        key = (entry.signature, entry.treedef, tuple(entry.values), tuple(fixed.items()))
        if key not in compiled:

            def with_fixed(*given: Any, **kwargs: Any) -> Any:
                remaining = iter(given)
                return f(*(fixed[i] if i in fixed else next(remaining) for i in range(len(args))), **kwargs)

            rows = _Rows(with_fixed, entry.without_arrays(), in_axes, out_axes, metadata, also)
            compiled[key] = (
                rows,
                jax.pmap(
                    lambda *parts: rows(ungroup(parts, is_donated, (True, False))),
                    axis_name=axis_name,
                    in_axes=group(entry.values, is_donated, (True, False)),
                    out_axes=(None, rows.names),
                    devices=devices,
                    backend=backend,
                    axis_size=axis_size,
                    donate_argnums=(0,),
                ),
            )
        rows, run = compiled[key]
        static, groups = run(*group(entry.leaves, is_donated, (True, False)))
        return entry.finish(static.value, ungroup(groups, static.value.values, rows.names))

    return mapped


def transform_metadata(
    f: Any = _MISSING, *, in_axes: Any = 0, out_axes: Any = 0, partition: str | None, graph: bool | None = None
) -> Any:
    """Inside a mapping transform of JAX or in tree mode: take the mapped axis' name out of variables, and put it back.

    >>> @nnx.vmap(in_axes=0)
    ... @nnx.transform_metadata(in_axes=0, out_axes=0, partition="layers")
    ... def create(rngs): ...

    Args:
        f: the function that is mapped; left out, a decorator is returned.
        in_axes, out_axes: those of the transform.
        partition: the name of the axis.
        graph: as for ``nnx.jit``.
    """
    if f is _MISSING:
        return functools.partial(
            transform_metadata, in_axes=in_axes, out_axes=out_axes, partition=partition, graph=graph
        )
    metadata = {PARTITION_NAME: partition}
    follow = graph_mode(graph)

    @functools.wraps(f)
    def renamed(*args: Any) -> Any:
        axes = per_argument(in_axes, len(args), "in_axes", "transform_metadata")
        entry = Entry("transform_metadata", args, follow, True, axes)
        inside = entry.enter(entry.leaves)
        remove_names(inside, entry.cell_values, metadata)
        made, exit = entry.leave(inside, f(*inside.trees), out_axes, prepare=namer(metadata))
        return entry.finish(exit, made)

    return renamed
