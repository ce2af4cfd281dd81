"""Functions of objects without computing anything: shapes of results, and modules that are not allocated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from distaff.frontend.nnx.boundary import take
from distaff.frontend.nnx.graphdef import graph_mode
from distaff.frontend.nnx.transforms.compilation import check_not_bound, updates_mode


def eval_shape(
    f: Callable[..., Any], *args: Any, graph: bool | None = None, graph_updates: bool | None = None, **kwargs: Any
) -> Any:
    """The result of ``f`` with ``jax.ShapeDtypeStruct`` for arrays; nothing is computed or assigned.

    >>> model = nnx.eval_shape(lambda: Model(rngs=nnx.Rngs(0)))  # no array is made

    Raises:
        ValueError: ``f`` is a method of an object; without graph updates, a variable stands at two places or is
            returned that was given.
    """
    check_not_bound(f, "eval_shape")
    updates = updates_mode(graph_mode(graph), graph_updates)
    names, count = sorted(kwargs), len(args)
    outside = take([*args, *(kwargs[name] for name in names)], updates)
    signature = outside.signature

    def traced(trees: Any) -> Any:
        inside = signature.enter(trees)
        out = f(*inside.trees[:count], **dict(zip(names, inside.trees[count:], strict=True)))
        return inside.leave(out, structure_updates=updates, whole=False, complete=frozenset(range(len(trees))))

    updates, out, static = jax.eval_shape(traced, outside.trees)
    return static.value.finish(outside.of_copies(), updates, out)
