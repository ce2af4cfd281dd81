"""``scan``, ``while_loop`` and ``fori_loop`` over functions of objects."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from distaff.frontend.core import axes_scan
from distaff.frontend.nnx.boundary import Inside, Static
from distaff.frontend.nnx.graphdef import graph_mode
from distaff.frontend.nnx.prefix_mapping import PrefixMapping
from distaff.frontend.nnx.transforms.carry import (
    Carry,
    arrays_now,
    check_same_objects,
    check_same_structure,
    check_same_types,
)
from distaff.frontend.nnx.transforms.compilation import check_not_bound, updates_mode
from distaff.frontend.nnx.transforms.crossing import Entry, Exit
from distaff.frontend.nnx.transforms.mapping import check_sizes, group, namer, per_argument, positional, remove_names
from distaff.frontend.nnx.transforms.prefixes import check_prefix, values_of
from distaff.frontend.nnx.variables import Variable

T = TypeVar("T")
_MISSING: Any = object()


def _is_carry(axis: Any) -> bool:
    return axis is Carry


def _entries(axes: Any) -> tuple[Any, ...]:
    return axes if isinstance(axes, tuple) else (axes,)


def _find_carry(axes: Any, name: str) -> int | None:
    """Which of the arguments (or results) is the carry.

    Raises:
        ValueError: there are several, or one within an argument.
    """
    entries = _entries(axes)
    found = [i for i, axis in enumerate(entries) if axis is Carry]
    if len(found) > 1:
        raise ValueError(f"Found multiple Carry definitions in {name} of nnx.scan, at {found}; carry a tuple instead.")
    for i, axis in enumerate(entries):
        inner = jax.tree.leaves(axis, is_leaf=lambda x: isinstance(x, PrefixMapping))
        if axis is not Carry and any(x is Carry for x in inner):
            raise ValueError(
                f"Carry must stand at the top level of {name} of nnx.scan (or in a StateAxes), it cannot be "
                "nested, as in "
                f"entry {i}: {axis}."
            )
    return found[0] if found else None


def _check_axes(in_axes: Any, out_axes: Any) -> None:
    if (_find_carry(in_axes, "in_axes") is None) != (_find_carry(out_axes, "out_axes") is None):
        raise ValueError(
            "If one of in_axes or out_axes has Carry, the other must also have Carry; nnx.scan got "
            f"in_axes={in_axes}, out_axes={out_axes}."
        )
    if None in values_of(out_axes):
        entry = next((x for x in _entries(out_axes) if None in values_of(x)), None)
        raise ValueError(
            f"Cannot broadcast output state. Got {entry} in out_axes={out_axes} of nnx.scan: give it an axis, or carry "
            "it."
        )


class _Step:
    """One iteration of ``scan``: arrays in, arrays out.

    Attributes:
        entry: the arguments; their arrays with the axis Carry are carried, those with None the same in all iterations.
        exit: what came out when it was traced last.
        sources: for each array that came out, if it is carried, which of the carried arrays it is.
    """

    exit: Exit
    sources: list[int | None]

    def __init__(
        self, fn: Callable[..., Any], entry: Entry, in_axes: Any, out_axes: Any, metadata: Mapping[str, Any]
    ) -> None:
        self._fn = fn
        self.entry = entry
        self._out_axes = out_axes
        self._metadata = metadata
        self._carry_in = _find_carry(in_axes, "in_axes")
        self._carry_out = _find_carry(out_axes, "out_axes")
        axes = (*entry.cell_values, *values_of(in_axes), *values_of(out_axes))
        self.names = tuple(dict.fromkeys(axis for axis in axes if isinstance(axis, int)))

    def _run(self, leaves: Sequence[Any]) -> tuple[Inside, Any, list[Any]]:
        """Run the function; the objects, the result without the carry, and the arguments with the new carry."""
        inside = self.entry.enter(leaves)
        if self._metadata:
            remove_names(inside, self.entry.cell_values, self._metadata)
        *args, kwargs = trees = inside.trees
        out = self._fn(*args, **kwargs)
        if self._carry_in is None:
            return inside, out, trees
        carry, out = self._split_carry(out)
        check_same_objects("scan", trees[self._carry_in], carry, self.entry.updates)
        return inside, out, [*trees[: self._carry_in], carry, *trees[self._carry_in + 1 :]]

    def _split_carry(self, out: Any) -> tuple[Any, Any]:
        """The carry of a result, and the result with () in its place."""
        if self._carry_out is None or self._out_axes is Carry:
            return out, ()
        if not isinstance(out, tuple) or len(out) != len(self._out_axes):
            raise ValueError(
                f"nnx.scan: the function must return a tuple of {len(self._out_axes)}, as "
                f"out_axes={self._out_axes} says; "
                f"it returned a {type(out).__name__}{f' of {len(out)}' if isinstance(out, tuple) else ''}."
            )
        return out[self._carry_out], (*out[: self._carry_out], (), *out[self._carry_out + 1 :])

    def changed(self, leaves: Sequence[Any]) -> list[int]:
        """Which cells with the axis None the function assigns."""
        inside, _, _ = self._run(leaves)
        axes = self.entry.cell_values
        return [i for i in inside.assigned() if axes[i] is None and isinstance(inside.cells[i], Variable)]

    def __call__(self, shared: Sequence[Any], carried: Sequence[Any], rows: Sequence[Any]) -> Any:
        entry = self.entry
        remaining = {True: iter(carried), False: iter(rows), None: iter(shared)}
        leaves = [next(remaining[None if axis is None else axis is Carry]) for axis in entry.values]
        inside, out, after = self._run(leaves)
        made, exit = entry.leave(inside, out, self._out_axes, prepare=namer(self._metadata))
        check_same_structure(entry, inside, _is_carry)
        now = arrays_now(entry, inside, after, _is_carry)
        carry = [x for x, axis in zip(now, entry.values, strict=True) if axis is Carry]
        labels = [label for label, axis in zip(entry.leaf_labels, entry.values, strict=True) if axis is Carry]
        check_same_types(entry, carried, carry, labels)
        position = {id(x): i for i, x in enumerate(carry)}
        self.exit = exit
        self.sources = [position[id(x)] if axis is Carry else None for x, axis in zip(made, exit.values, strict=True)]
        mapped = [(x, axis) for x, axis in zip(made, exit.values, strict=True) if isinstance(axis, int)]
        return (), carry, group([x for x, _ in mapped], [axis for _, axis in mapped], self.names)

    def finish(self, static: Static, carry: Sequence[Any], groups: Sequence[Sequence[Any]]) -> Any:
        """Assign what came out of the last iteration; the result, with the objects of the carry in their place.

        Args:
            static: exit and sources, as they were when this was traced.
            carry, groups: the arrays.
        """
        exit, sources = static.value
        rows = {name: iter(found) for name, found in zip(self.names, groups, strict=True)}
        arrays = [
            carry[source] if source is not None else None if axis is None else next(rows[axis])
            for source, axis in zip(sources, exit.values, strict=True)
        ]
        out = self.entry.finish(exit, arrays)
        if self._carry_in is None:
            return out
        last = iter(carry)
        leaves = [
            next(last) if axis is Carry else x for x, axis in zip(self.entry.leaves, self.entry.values, strict=True)
        ]
        value = self.entry.assign(leaves, ())[self._carry_in]
        if self._out_axes is Carry:
            return value
        return tuple(value if i == self._carry_out else x for i, x in enumerate(out))


class _Loop:
    """What a scan depends on but for arrays; hashable, so that equal loops are traced once."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self._key = entry.signature, entry.treedef, tuple(entry.values), tuple(entry.cell_values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Loop) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def scan(
    f: Any = _MISSING,
    *,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    _split_transpose: bool = False,
    in_axes: Any = (Carry, 0),
    out_axes: Any = (Carry, 0),
    transform_metadata: Mapping[str, Any] | None = None,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """``jax.lax.scan`` for functions of objects: layers with an axis, or objects carried along.

    >>> @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    ... def forward(x, layer):
    ...     return layer(x)

    Args:
        f: the function; left out, a decorator is returned.
        length: as for ``jax.lax.scan``.
        reverse: as for ``jax.lax.scan``.
        unroll: as for ``jax.lax.scan``.
        in_axes: for each argument an axis to scan over, ``nnx.Carry`` for the one that is carried, None for what is the
            same in all iterations; trees of axes, ``StateAxes`` (with graph updates; ``Carry`` may stand in it) and
            what
            ``nnx.prefix`` returned.
        out_axes: likewise for the result; not None. If a tuple has ``Carry``, the function returns a tuple.
        transform_metadata: ``{nnx.PARTITION_NAME: name}``: the name of the axis among those of variables.
        graph: as for ``nnx.jit``.
        graph_updates: as for ``nnx.jit``. With them, what is assigned to variables with None is forgotten at the end of
            each iteration; without, it is carried.

    Raises:
        ValueError: axes do not fit, sizes differ, or the objects in the carry are replaced.
        TypeError: the carry changes its structure, shapes or dtypes.
    """
    if f is _MISSING:
        options = {key: value for key, value in locals().items() if key != "f"}
        return functools.partial(scan, **options)
    check_not_bound(f, "scan")
    _check_axes(in_axes, out_axes)
    follow = graph_mode(graph)
    updates, metadata = updates_mode(follow, graph_updates), dict(transform_metadata or {})
    check_prefix(in_axes, "in_axes", "scan", updates)
    check_prefix(out_axes, "out_axes", "scan", updates)

    def run(loop: _Loop, shared: Sequence[Any], carry: Sequence[Any], rows: Sequence[Any]) -> Any:
        step = _Step(f, loop.entry, in_axes, out_axes, metadata)
        scan_arrays = axes_scan.scan(
            lambda _, carry, rows: step(shared, carry, rows),
            ([axis for axis in loop.entry.values if isinstance(axis, int)],),
            step.names,
            length=length,
            reverse=reverse,
            unroll=unroll,
            _split_transpose=_split_transpose,
            check_constancy_invariants=False,
        )
        _, carry, groups = scan_arrays((), carry, rows)
        return Static((step.exit, step.sources)), carry, groups

    compiled: Any = jax.jit(run, static_argnums=0, inline=True)

    @functools.wraps(f)
    def scanned(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = positional(f, in_axes, args, kwargs)
        if in_axes is Carry and len(args) != 1:
            raise ValueError(
                "When in_axes=Carry, the function must take exactly one argument, which nnx.scan carries; got "
                f"{len(args)}. Pass in_axes=(nnx.Carry, ...) with an entry for each."
            )
        axes = (*per_argument(in_axes, len(args), "in_axes", "scan"), 0)
        entry = Entry("scan", (*args, kwargs), follow, updates, axes)
        check_sizes(entry, length)
        step = _Step(f, entry, in_axes, out_axes, metadata)
        if not any(isinstance(axis, int) for axis in entry.values) and length is None:
            raise ValueError("nnx.scan got no values to scan over and `length` not provided.")
        if not updates and None in entry.cell_values:
            _carry_what_changes(step)
        parts: dict[Any, list[Any]] = {True: [], False: [], None: []}
        for x, axis in zip(entry.leaves, entry.values, strict=True):
            parts[None if axis is None else axis is Carry].append(x)
        return step.finish(*compiled(_Loop(entry.without_arrays()), parts[None], parts[True], parts[False]))

    return scanned


def _carry_what_changes(step: _Step) -> None:
    """Have variables with the axis None that the function assigns carried."""
    entry = step.entry

    def row(x: Any, axis: Any) -> Any:
        if not isinstance(axis, int):
            return x
        return jax.lax.index_in_dim(x, 0, axis, keepdims=False)

    found: list[int] = []

    def look(leaves: Sequence[Any]) -> None:
        found[:] = step.changed([row(x, axis) for x, axis in zip(leaves, entry.values, strict=True)])

    jax.eval_shape(look, entry.leaves)
    entry.set_cell_values({i: Carry for i in found})


def while_loop(
    cond_fun: Callable[[T], Any],
    body_fun: Callable[[T], T],
    init_val: T,
    *,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> T:
    """``jax.lax.while_loop`` over a value with objects in it, which must keep their structure.

    Args:
        cond_fun: whether to go on with a value; what it assigns is forgotten.
        body_fun: the next value; it returns the very objects that it was given, changed.
        init_val: the first value.
        graph: as for ``nnx.jit``.
        graph_updates: as for ``nnx.jit``.

    Returns:
        The last value, with the objects of ``init_val``.

    Raises:
        ValueError: ``body_fun`` returns other objects.
        TypeError: it changes the structure, shapes or dtypes of the value.
    """
    follow = graph_mode(graph)
    entry = Entry("while_loop", (init_val,), follow, updates_mode(follow, graph_updates))
    body = _Body(entry, body_fun)
    last = jax.lax.while_loop(lambda leaves: jnp.asarray(cond_fun(*entry.enter(leaves).trees)), body, entry.leaves)
    (result,) = entry.assign(last, body.written)
    return result  # type: ignore[no-any-return]


class _Body:
    """A function of an index (or none) and a value, as one of arrays.

    Attributes:
        written: the cells that it was seen to assign.
    """

    def __init__(self, entry: Entry, fn: Callable[..., Any]) -> None:
        self._entry = entry
        self._fn = fn
        self.written: set[int] = set()

    def __call__(self, *index_and_leaves: Any) -> list[Any]:
        entry = self._entry
        *index, leaves = index_and_leaves
        inside = entry.enter(leaves)
        (value,) = inside.trees
        returned = self._fn(*index, value)
        check_same_objects(entry.transform, value, returned, entry.updates)
        check_same_structure(entry, inside)
        after = arrays_now(entry, inside, [returned])
        check_same_types(entry, leaves, after, entry.leaf_labels)
        self.written.update(inside.assigned())
        return after


def fori_loop(
    lower: Any,
    upper: Any,
    body_fun: Callable[[Any, T], T],
    init_val: T,
    *,
    unroll: int | bool | None = None,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> T:
    """``jax.lax.fori_loop`` over a value with objects in it, which must keep their structure.

    Args:
        lower: the first index.
        upper: one more than the last.
        body_fun: index and value to the next value.
        init_val: the first value.
        unroll: as for ``jax.lax.fori_loop``.
        graph: as for ``nnx.jit``.
        graph_updates: as for ``nnx.jit``.

    Returns:
        The last value, with the objects of ``init_val``.

    Raises:
        ValueError, TypeError: as for ``nnx.while_loop``.
    """
    follow = graph_mode(graph)
    entry = Entry("fori_loop", (init_val,), follow, updates_mode(follow, graph_updates))
    body = _Body(entry, body_fun)
    last = jax.lax.fori_loop(lower, upper, body, entry.leaves, unroll=unroll)
    (result,) = entry.assign(last, body.written)
    return result  # type: ignore[no-any-return]
