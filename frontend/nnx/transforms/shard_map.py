"""``shard_map`` of functions of objects."""

from __future__ import annotations

import functools
from collections.abc import Callable, Set
from typing import Any

import jax
from jax.sharding import PartitionSpec

from distaff.frontend.nnx.boundary import take
from distaff.frontend.nnx.graphdef import graph_mode
from distaff.frontend.nnx.transforms.compilation import check_not_bound, pure_prefix, updates_mode
from distaff.frontend.nnx.transforms.prefixes import by_object, check_prefix

_MISSING: Any = object()


def shard_map(
    f: Any = _MISSING,
    *,
    mesh: Any,
    in_specs: Any,
    out_specs: Any,
    axis_names: Set[Any] = frozenset(),
    check_vma: bool = True,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """``jax.shard_map`` for functions of objects: each device has objects that hold its shards.

    What the function assigns to variables is assigned to those given when it has returned, laid out as they were.

    Args:
        f: the function, of positional arguments; left out, a decorator is returned.
        mesh: as of ``jax.shard_map``, like all that is not named here.
        in_specs: as of ``jax.shard_map``; for an object one for all its variables, or ``StateSharding`` with one for
            each filter.
        out_specs: likewise, for the result.
        axis_names: as of ``jax.shard_map``.
        check_vma: as of ``jax.shard_map``.
        graph: follow shared references and cycles (default: ``nnx.set_graph_mode``).
        graph_updates: pass changes of structure on (default: ``nnx.set_graph_updates``; never in tree mode).

    Raises:
        ValueError: ``f`` is a method of an object; at a call, a variable stands at two places with two of them.
    """
    if f is _MISSING:
        return functools.partial(
            shard_map,
            mesh=mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=axis_names,
            check_vma=check_vma,
            graph=graph,
            graph_updates=graph_updates,
        )
    check_not_bound(f, "shard_map")
    fun: Callable[..., Any] = f
    follow = graph_mode(graph)
    structure_updates = updates_mode(follow, graph_updates)
    check_prefix(in_specs, "in_specs", "shard_map", structure_updates)
    check_prefix(out_specs, "out_specs", "shard_map", structure_updates)
    of_in, of_out = by_object(in_specs), by_object(out_specs)
    pure_in, pure_out = pure_prefix(of_in, PartitionSpec()), pure_prefix(of_out, PartitionSpec())

    @functools.wraps(fun)
    def mapped(*args: Any) -> Any:
        specs = tuple(of_in) if type(of_in) in (tuple, list) else (of_in,) * len(args)
        outside = take(args, follow, specs)
        static: Any = None

        def of_shards(*trees: Any) -> Any:
            nonlocal static
            inside = outside.signature.enter(trees)
            out = fun(*inside.trees)
            updates, out, static = inside.leave(out, structure_updates=structure_updates, whole=True, out_prefix=of_out)
            return tuple(updates), out

        run = jax.shard_map(
            of_shards,
            mesh=mesh,
            in_specs=pure_in,
            out_specs=(pure_in, pure_out),
            axis_names=axis_names,
            check_vma=check_vma,
        )
        updates, out = run(*outside.trees)
        return static.value.finish(outside, updates, out)

    return mapped
