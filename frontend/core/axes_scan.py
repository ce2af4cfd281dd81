"""``jax.lax.scan`` with a chosen axis for each input and output, and values that all iterations share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distaff.frontend import jax_compat


class _Broadcast:
    """The type of ``broadcast``."""

    def __repr__(self) -> str:
        return "broadcast"


# As an axis: not scanned over; each iteration gets all of it.
broadcast = _Broadcast()


def _map_scanned(fn: Callable[[Any, int], Any], axes: Any, tree: Any) -> Any:
    """``fn(leaf, axis)`` for the leaves with an axis; the broadcast parts of the tree become ``()``."""

    def part(axis: Any, subtree: Any) -> Any:
        return () if axis is broadcast else jax.tree.map(lambda leaf: fn(leaf, axis), subtree)

    return jax.tree.map(part, axes, tree)


def _choose(axes: Any, broadcasted: Any, scanned: Any) -> Any:
    """For each axis the part of ``broadcasted`` or of ``scanned``."""
    return jax.tree.map(
        lambda axis, all_of_it, row: all_of_it if axis is broadcast else row, axes, broadcasted, scanned
    )


def scan(
    fn: Callable[..., Any],
    in_axes: Any,
    out_axes: Any,
    length: int | None = None,
    reverse: bool = False,
    unroll: int = 1,
    _split_transpose: bool = False,
    check_constancy_invariants: bool = True,
) -> Callable[..., Any]:
    """Turn ``fn(broadcast_in, carry, *args) -> (broadcast_out, carry, ys)`` into a loop with the same signature.

    Args:
        in_axes, out_axes: for the arguments and for ``ys`` (prefix trees) the axis to scan over, or ``broadcast``.
        length, reverse, unroll: as for ``jax.lax.scan``.
        check_constancy_invariants: trace ``fn`` once before the loop, to compute ``broadcast_out`` (which the
            iterations get as ``broadcast_in``) and the ``broadcast`` outputs. Without it there are neither.

    Raises:
        ValueError: a broadcast output depends on the carry or on a scanned input.
    """
    if not check_constancy_invariants and broadcast in jax.tree.leaves(out_axes):
        raise ValueError(
            "Broadcast outputs need the check that they do not change from iteration to iteration; out_axes is "
            f"{out_axes}, but check_constancy_invariants is False."
        )

    def loop(broadcast_in: Any, init: Any, *args: Any) -> Any:
        def body(carry: Any, rows: Any) -> Any:
            broadcast_out, carry, ys = fn(broadcast_in, carry, *_choose(in_axes, args, rows))
            return carry, _map_scanned(lambda y, _: y, out_axes, ys), broadcast_out, ys

        xs = _map_scanned(lambda x, axis: jnp.moveaxis(x, axis, 0) if axis else x, in_axes, args)
        if check_constancy_invariants:
            broadcast_in, constants = _loop_constants(body, out_axes, init, xs)
        carry, ys = jax.lax.scan(
            lambda carry, rows: body(carry, rows)[:2],
            init,
            xs,
            length=length,
            reverse=reverse,
            unroll=unroll,
            _split_transpose=_split_transpose,
        )
        ys = _map_scanned(lambda y, axis: jnp.moveaxis(y, 0, axis) if axis else y, out_axes, ys)
        return broadcast_in, carry, _choose(out_axes, constants, ys) if check_constancy_invariants else ys

    return loop


def _loop_constants(body: Callable[..., Any], out_axes: Any, init: Any, xs: Any) -> tuple[Any, Any]:
    """The broadcast variables and outputs of one iteration, computed without a value of its carry and rows."""

    def constants(carry: Any, rows: Any) -> Any:
        _, _, broadcast_out, ys = body(carry, rows)
        return broadcast_out, jax.tree.map(lambda axis, y: y if axis is broadcast else (), out_axes, ys)

    found = jax_compat.evaluate_known(constants, jax.tree.map(jax.typeof, init), jax.tree.map(jax_compat.row_type, xs))
    for path, leaf in jax.tree_util.tree_leaves_with_path(found[0]):
        if isinstance(leaf, jax_compat.Unknown):
            raise ValueError(
                f"The broadcast variable {jax.tree_util.keystr(path[1:])} depends on the carry or on a scanned input "
                "of the scan, so it cannot be shared by all iterations. Make it a carry (variable_carry) or a "
                "scanned variable (variable_axes), or compute it from something else."
            )
    if any(isinstance(leaf, jax_compat.Unknown) for leaf in jax.tree.leaves(found[1])):
        raise ValueError(
            "An output with out_axes=broadcast depends on the carry or on a scanned input of the scan, so it differs "
            "from iteration to iteration. Give it an axis, or return it in the carry."
        )
    return found  # type: ignore[no-any-return]
