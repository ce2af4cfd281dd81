"""Lifted ``vmap``, ``scan`` and ``remat_scan``: variables with one more axis, and random keys split along it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

from distaff.frontend.core import axes_scan, meta
from distaff.frontend.core.filters import CollectionFilter
from distaff.frontend.core.lift.pack import Groups, pack
from distaff.frontend.core.lift.recompute import remat

A = TypeVar("A")


@dataclasses.dataclass(frozen=True)
class In(Generic[A]):
    """As an axis of a collection: the transform takes the collection in, and does not hand it out."""

    axis: A


@dataclasses.dataclass(frozen=True)
class Out(Generic[A]):
    """As an axis of a collection: the transform hands the collection out, and does not take it in."""

    axis: A


InOutAxis: TypeAlias = int | In[int | None] | Out[int | None] | None
InOutScanAxis: TypeAlias = int | In[int] | Out[int]
Axes: TypeAlias = tuple[int | None, ...]
Filters: TypeAlias = tuple[CollectionFilter, ...]


def _split_in_out(axes: Mapping[Any, Any]) -> tuple[Filters, Axes, Filters, Axes]:
    """The filters and axes on the way in, and those on the way out."""
    plain = {key: axis.axis if isinstance(axis, In | Out) else axis for key, axis in axes.items()}
    ins = tuple(key for key, axis in axes.items() if not isinstance(axis, Out))
    outs = tuple(key for key, axis in axes.items() if not isinstance(axis, In))
    return ins, tuple(plain[key] for key in ins), outs, tuple(plain[key] for key in outs)


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def map_keys(fn: Callable[[Any], Any], groups: Any) -> Any:
    """Map ``fn`` over the random keys in a tree."""
    return jax.tree.map(fn, groups, is_leaf=_is_key)


def _split_keys(rng_groups: Groups, splits: Sequence[bool], size: int) -> Groups:
    """The groups to be split as ``size`` keys along a new first axis."""
    return tuple(
        map_keys(lambda key: jax.random.split(jax.random.clone(key), size), group) if split else group
        for group, split in zip(rng_groups, splits, strict=True)
    )


def _without_axes(groups: Groups, axes: Axes, params: Mapping[Any, Any]) -> Groups:
    """The variables as they are inside: their metadata boxes lose the axis."""
    pairs = zip(groups, axes, strict=True)
    return tuple(group if axis is None else meta.remove_axis(group, axis, dict(params)) for group, axis in pairs)


def _with_axes(groups: Groups, axes: Axes, params: Mapping[Any, Any]) -> Groups:
    """The inverse of ``_without_axes``."""
    pairs = zip(groups, axes, strict=True)
    return tuple(group if axis is None else meta.add_axis(group, axis, dict(params)) for group, axis in pairs)


def _common_size(axes: Any, trees: Any, given: int | None, transform: str, argument: str) -> int:
    """The size that the mapped axes of all trees have.

    Raises:
        ValueError: they differ, or there are none and ``given`` is None.
    """

    def size(axis: Any, tree: Any) -> int | tuple[()]:
        leaves = [] if axis is None or axis is axes_scan.broadcast else jax.tree.leaves(tree)
        return leaves[0].shape[axis] if leaves else ()

    sizes = set(jax.tree.leaves(jax.tree.map(size, axes, trees, is_leaf=lambda axis: axis is None)))
    if len(sizes) > 1:
        raise ValueError(
            f"Inconsistent {'batch axis sizes' if transform == 'vmap' else 'scan lengths'}: {sorted(sizes)}."
        )
    if given is None and not sizes:
        raise ValueError(
            f"{transform} cannot tell the size of its axis, as no input is mapped over; {argument} should be specified "
            "manually."
        )
    return next(iter(sizes)) if given is None else given


def vmap(
    fn: Callable[..., Any],
    variable_axes: Mapping[Any, InOutAxis],
    split_rngs: Mapping[Any, bool],
    in_axes: Any = 0,
    out_axes: Any = 0,
    axis_size: int | None = None,
    axis_name: str | None = None,
    spmd_axis_name: str | None = None,
    metadata_params: Mapping[Any, Any] | None = None,
) -> Callable[..., Any]:
    """Lifted ``jax.vmap`` of ``fn(scope, *args)``.

    Args:
        variable_axes: for each collection (filter) the axis along which each row has variables of its own, None for
            variables that all rows share; ``In(axis)`` and ``Out(axis)`` for one direction only. Other collections are
            not seen inside.
        split_rngs: for each random stream (filter) whether rows draw different keys. Others are not seen inside.
        in_axes, out_axes, axis_size, axis_name, spmd_axis_name: as for ``jax.vmap``.
        metadata_params: passed to the variables' metadata boxes, as ``{nn.PARTITION_NAME: "layers"}``.

    Raises:
        ValueError: the size of the axis is not known, or inputs disagree on it.
        PartitioningUnspecifiedError: a ``Partitioned`` variable gets an axis that ``metadata_params`` does not name.
    """
    params = metadata_params or {}
    in_filters, in_variable_axes, out_filters, out_variable_axes = _split_in_out(variable_axes)
    splits = tuple(split_rngs.values())

    def run(
        scope_fn: Callable[..., Any], repack_fn: Callable[..., Any], variables: Groups, rngs: Groups, *args: Any
    ) -> Any:
        variables = _without_axes(variables, in_variable_axes, params)
        axes, trees = (in_variable_axes, in_axes), (variables, args)
        size = _common_size(axes, trees, axis_size, "vmap", "axis_size")

        def row(variables: Groups, rngs: Groups, args: tuple[Any, ...]) -> Any:
            scope = scope_fn(variables, rngs)
            output = fn(scope, *args)
            return output, repack_fn(scope)

        mapped = jax.vmap(
            row,
            in_axes=(in_variable_axes, tuple(0 if split else None for split in splits), in_axes),
            out_axes=(out_axes, out_variable_axes),
            axis_size=axis_size,
            axis_name=axis_name,
            spmd_axis_name=spmd_axis_name,
        )
        rngs = _split_keys(rngs, splits, size)
        if spmd_axis_name is not None and _is_sharded(in_axes, args, spmd_axis_name):
            rngs = _shard_keys(rngs, splits, spmd_axis_name)
        output, groups = mapped(variables, rngs, args)
        return output, _with_axes(groups, out_variable_axes, params)

    return pack(run, in_filters, out_filters, tuple(split_rngs), name="vmap")


def _is_sharded(in_axes: Any, args: Any, mesh_axis: str) -> bool:
    """Whether the mapped axis of an argument is laid over ``mesh_axis``, on a mesh of explicit axes."""

    def over(axis: int | None, tree: Any) -> bool:
        return axis is not None and any(
            jax.typeof(leaf).sharding.spec[axis] == mesh_axis for leaf in jax.tree.leaves(tree)
        )

    return any(jax.tree.leaves(jax.tree.map(over, in_axes, args, is_leaf=lambda axis: axis is None)))


def _shard_keys(rng_groups: Groups, splits: Sequence[bool], mesh_axis: str) -> Groups:
    return tuple(
        map_keys(lambda keys: jax.sharding.reshard(keys, jax.P(mesh_axis)), group) if split else group
        for group, split in zip(rng_groups, splits, strict=True)
    )


def scan(
    fn: Callable[..., Any],
    variable_axes: Mapping[Any, InOutScanAxis] | None = None,
    variable_broadcast: CollectionFilter = False,
    variable_carry: CollectionFilter = False,
    split_rngs: Mapping[Any, bool] | None = None,
    in_axes: Any = 0,
    out_axes: Any = 0,
    length: int | None = None,
    reverse: bool = False,
    unroll: int = 1,
    _split_transpose: bool = False,
    data_transform: Callable[..., Any] | None = None,
    metadata_params: Mapping[Any, Any] | None = None,
    check_constancy_invariants: bool = True,
) -> Callable[..., Any]:
    """Lifted ``jax.lax.scan`` of ``fn(scope, carry, *xs) -> (carry, ys)``.

    Args:
        variable_axes: the collections (filters) of which each iteration has its own row, along this axis.
        variable_broadcast: the collections that all iterations share. They may be made inside, from nothing that
            differs between iterations.
        variable_carry: the collections that each iteration gets from the one before.
        split_rngs: for each random stream (filter) whether iterations draw different keys.
        in_axes, out_axes: the axes of ``xs`` and ``ys`` to scan over (prefix trees); ``broadcast`` for what all
            iterations share.
        length, reverse, unroll: as for ``jax.lax.scan``.
        data_transform: maps the groups of variables and keys at the start of each iteration.
        metadata_params: passed to the variables' metadata boxes.
        check_constancy_invariants: find out that shared values are the same in all iterations, with one more trace of
            ``fn``. Needed to make shared variables inside and to return shared outputs.

    Raises:
        ValueError: the length is not known, inputs disagree on it, or a shared value differs between iterations.
    """
    params = metadata_params or {}
    split_rngs = split_rngs or {}
    in_filters, in_variable_axes, out_filters, out_variable_axes = _split_in_out(variable_axes or {})
    if not all(isinstance(axis, int) for axis in (*in_variable_axes, *out_variable_axes)):
        raise ValueError(f"The axes that scan adds to variables are integers, got {variable_axes}.")
    splits = tuple(split_rngs.values())
    rng_axes = tuple(0 if split else axes_scan.broadcast for split in splits)

    def run(
        scope_fn: Callable[..., Any],
        repack_fn: Callable[..., Any],
        variables: Groups,
        rngs: Groups,
        init: Any,
        *args: Any,
    ) -> Any:
        size = _common_size(in_axes, args, length, "scan", "length")

        def iteration(
            shared: Any, carry: tuple[Any, Any], scanned: Groups, rngs: Groups, args: tuple[Any, ...]
        ) -> tuple[Any, ...]:
            carried, state = carry
            variables = (shared, carried, *scanned)
            if data_transform is not None:
                variables, rngs = data_transform(variables, rngs)
            scope = scope_fn(variables, rngs)
            state, output = fn(scope, state, *args)
            shared_out, carried, *scanned_out = repack_fn(scope)
            # Immutable shared variables are not handed out, but the loop needs them.
            shared_out = tuple({**before, **after} for before, after in zip(shared, shared_out, strict=True))
            return shared_out, (carried, state), (output, tuple(scanned_out))

        loop = axes_scan.scan(
            iteration,
            in_axes=(in_variable_axes, rng_axes, in_axes),
            out_axes=(out_axes, out_variable_axes),
            length=length,
            reverse=reverse,
            unroll=unroll,
            _split_transpose=_split_transpose,
            check_constancy_invariants=check_constancy_invariants,
        )
        shared, carried, *scanned = variables
        scanned_in = _without_axes(tuple(scanned), in_variable_axes, params)
        shared, (carried, state), (output, scanned_out) = loop(
            shared, (carried, init), scanned_in, _split_keys(rngs, splits, size), args
        )
        return (state, output), (shared, carried, *_with_axes(scanned_out, out_variable_axes, params))

    return pack(
        run,
        (variable_broadcast, variable_carry, *in_filters),
        (variable_broadcast, variable_carry, *out_filters),
        tuple(split_rngs),
        name="scan",
    )


def remat_scan(
    body_fn: Callable[..., Any],
    lengths: Sequence[int],
    policy: Callable[..., bool] | None = None,
    variable_broadcast: CollectionFilter = False,
    variable_carry: CollectionFilter = False,
    variable_axes: Mapping[Any, InOutScanAxis] | None = None,
    split_rngs: Mapping[Any, bool] | None = None,
) -> Callable[..., Any]:
    """Nested loops of ``body_fn(scope, carry) -> carry``, each recomputed when differentiated.

    With ``len(lengths) == d`` and ``n`` iterations in all, gradients take memory proportional to ``n ** (1 / d)``.
    Variables get one axis a loop. By default all collections are scanned along axis 0 and all streams split; other
    arguments are as for ``scan``.
    """
    options: dict[str, Any] = dict(
        variable_broadcast=variable_broadcast,
        variable_carry=variable_carry,
        variable_axes={True: 0} if variable_axes is None else variable_axes,
        split_rngs={True: True} if split_rngs is None else split_rngs,
    )
    outer, *inner = lengths

    def body(scope: Any, carry: Any) -> tuple[Any, tuple[()]]:
        step = remat_scan(body_fn, inner, policy, **options) if inner else body_fn
        return step(scope, carry), ()

    if inner:
        body = remat(body, policy=policy, prevent_cse=False)
    return lambda scope, carry: scan(body, length=outer, **options)(scope, carry)[0]
