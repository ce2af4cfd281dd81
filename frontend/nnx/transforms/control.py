"""``cond``, ``switch``, ``checkify`` and ``make_jaxpr`` of functions of objects."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import checkify as jax_checkify

from distaff.frontend.nnx.graphdef import graph_mode
from distaff.frontend.nnx.transforms.compilation import Parameters, check_not_bound, updates_mode
from distaff.frontend.nnx.transforms.crossing import Entry, Exit

_MISSING: Any = object()


class _Branches:
    """Branches as functions of arrays that return the same arrays: all that any of them assigns, and the result."""

    def __init__(self, transform: str, entry: Entry, branches: Sequence[Callable[..., Any]]) -> None:
        self._transform = transform
        self._entry = entry
        self._branches = branches
        self._assigned: frozenset[int] = frozenset()
        self.exits: list[Exit] = []

    def run(self, branch: Callable[..., Any], leaves: Sequence[Any]) -> list[Any]:
        """One branch."""
        entry = self._entry
        inside = entry.enter(leaves)
        made, exit = entry.leave(inside, branch(*inside.trees), also=self._assigned)
        self.exits.append(exit)
        return made

    def find_assigned(self) -> None:
        """Find what any branch assigns, without computing it, and whether all agree in the structure of things."""
        for branch in self._branches:
            jax.eval_shape(functools.partial(self.run, branch), self._entry.leaves)
        first = self.exits[0].plan
        for branch, exit in zip(self._branches[1:], self.exits[1:], strict=True):
            plan = exit.plan
            if (plan.known is None) != (first.known is None) or (plan.specs != first.specs and plan.known is not None):
                raise TypeError(
                    f"nnx.{self._transform}: branches must change the structure of their operands alike, but "
                    f"{_name(self._branches[0])} and {_name(branch)} don't. Make variables and set attributes "
                    "before the "
                    "branches."
                )
            if (plan.layout, plan.out_specs) != (first.layout, first.out_specs):
                raise TypeError(
                    f"nnx.{self._transform}: branches must return results of the same structure, but "
                    f"{_name(self._branches[0])} and {_name(branch)} return different objects."
                )
        self._assigned = frozenset(cell for exit in self.exits for cell in exit.cells or ())
        self.exits.clear()


def _name(fn: Callable[..., Any]) -> str:
    code = getattr(fn, "__code__", None)
    where = f" at {code.co_filename}:{code.co_firstlineno}" if code is not None else ""
    return f"{getattr(fn, '__name__', type(fn).__name__)}{where}"


def cond(
    pred: Any,
    true_fun: Callable[..., Any],
    false_fun: Callable[..., Any],
    *operands: Any,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """``jax.lax.cond`` for functions of objects; what the branch that runs assigns is assigned.

    Args:
        pred: a bool.
        true_fun: runs if it is True.
        false_fun: runs otherwise; it returns a result of the same structure, shapes and dtypes.
        operands: the arguments of both.
        graph: as for ``nnx.jit``.
        graph_updates: as for ``nnx.jit``.

    Raises:
        TypeError: the branches return different structures, or change the structure of objects differently.
    """
    return _select("cond", pred, (true_fun, false_fun), operands, graph, graph_updates)


def switch(
    index: Any,
    branches: Sequence[Callable[..., Any]],
    *operands: Any,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """``jax.lax.switch`` for functions of objects; what the branch that runs assigns is assigned.

    Args:
        index: which branch, an integer; it is clamped.
        branches: the functions; their results have the same structure, shapes and dtypes.
        operands: the arguments of all.
        graph: as for ``nnx.jit``.
        graph_updates: as for ``nnx.jit``.

    Raises:
        TypeError: as for ``nnx.cond``.
        ValueError: there are no branches.
    """
    if not branches:
        raise ValueError("nnx.switch requires at least one branch.")
    return _select("switch", index, tuple(branches), operands, graph, graph_updates)


def _select(
    transform: str,
    index: Any,
    branches: tuple[Callable[..., Any], ...],
    operands: tuple[Any, ...],
    graph: bool | None,
    graph_updates: bool | None,
) -> Any:
    follow = graph_mode(graph)
    entry = Entry(transform, operands, follow, updates_mode(follow, graph_updates))
    pure = _Branches(transform, entry, branches)
    pure.find_assigned()
    of_arrays = [functools.wraps(branch)(functools.partial(pure.run, branch)) for branch in branches]
    if transform == "cond":
        made = jax.lax.cond(index, *of_arrays, entry.leaves)
    else:
        made = jax.lax.switch(index, of_arrays, entry.leaves)
    return entry.finish(pure.exits[-1], made)


def checkify(
    f: Callable[..., Any],
    errors: frozenset[Any] = jax_checkify.user_checks,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Callable[..., Any]:
    """``jax.experimental.checkify.checkify`` for functions of objects.

    Args:
        f: the function.
        errors: what to check.
        graph: as for ``nnx.jit``.
        graph_updates: as for ``nnx.jit``.

    Returns:
        A function with the arguments of ``f`` that returns ``(error, result)``.
    """
    check_not_bound(f, "checkify")
    follow = graph_mode(graph)
    updates = updates_mode(follow, graph_updates)

    @functools.wraps(f)
    def checked(*args: Any, **kwargs: Any) -> tuple[jax_checkify.Error, Any]:
        entry = Entry("checkify", (*args, kwargs), follow, updates)
        exits: list[Exit] = []

        def pure(leaves: Sequence[Any]) -> list[Any]:
            inside = entry.enter(leaves)
            *given, named = inside.trees
            made, exit = entry.leave(inside, f(*given, **named))
            exits.append(exit)
            return made

        error, made = jax_checkify.checkify(pure, errors=errors)(entry.leaves)
        return error, entry.finish(exits[-1], made)

    return checked


def make_jaxpr(
    f: Any = _MISSING,
    *,
    static_argnums: int | Sequence[int] = (),
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """``jax.make_jaxpr`` for functions of objects; the arguments stay as they are.

    Args:
        f: the function; left out, a decorator is returned.
        static_argnums: arguments that are constants.
        graph: as for ``nnx.jit``.
        graph_updates: must not be True.

    Returns:
        A function with the arguments of ``f`` that returns the jaxpr.
    """
    if f is _MISSING:
        return functools.partial(make_jaxpr, static_argnums=static_argnums, graph=graph, graph_updates=graph_updates)
    check_not_bound(f, "make_jaxpr")
    follow = graph_mode(graph)
    if follow and graph_updates:
        raise ValueError("nnx.make_jaxpr does not support graph_updates=True; leave it out.")
    statics = Parameters.resolve(f, (static_argnums,) if isinstance(static_argnums, int) else static_argnums, None)

    @functools.wraps(f)
    def traced(*args: Any, **kwargs: Any) -> Any:
        fixed = statics.among(len(args), [])
        entry = Entry("make_jaxpr", [arg for i, arg in enumerate(args) if i not in fixed] + [kwargs], follow, False)

        def pure(leaves: Sequence[Any]) -> list[Any]:
            inside = entry.enter(leaves)
            *given, named = inside.trees
            remaining = iter(given)
            out = f(*(arg if i in fixed else next(remaining) for i, arg in enumerate(args)), **named)
            made, exit = entry.leave(inside, out)
            return made[exit.num_updates :]

        return jax.make_jaxpr(pure)(entry.leaves)

    return traced
