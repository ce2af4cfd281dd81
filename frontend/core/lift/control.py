"""Lifted ``while_loop``, ``cond`` and ``switch``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from distaff.frontend.core.filters import CollectionFilter
from distaff.frontend.core.lift.axes import map_keys
from distaff.frontend.core.lift.pack import Groups, pack

C = TypeVar("C")


def while_loop(
    cond_fn: Callable[[Any, C], Any],
    body_fn: Callable[[Any, C], C],
    scope: Any,
    init: C,
    carry_variables: CollectionFilter = False,
    broadcast_variables: CollectionFilter = True,
    split_rngs: Mapping[Any, bool] | None = None,
) -> C:
    """Lifted ``jax.lax.while_loop``: ``state = body_fn(scope, state)`` while ``cond_fn(scope, state)``.

    Args:
        carry_variables: the collections that iterations may change; not their structure, so variables must be made
            before the loop.
        broadcast_variables: the collections that are only read.
        split_rngs: for each random stream (filter) whether iterations draw different keys.
    """
    split_rngs = split_rngs or {}
    splits = tuple(split_rngs.values())

    def run(scope_fn: Callable[..., Any], repack_fn: Callable[..., Any], groups: Groups, rngs: Groups) -> Any:
        carried, shared = groups

        def keys_of(iteration: Any) -> Groups:
            return tuple(
                map_keys(lambda key: jax.random.fold_in(key, iteration), group) if split else group
                for group, split in zip(rngs, splits, strict=True)
            )

        def goes_on(loop: tuple[Any, ...]) -> Any:
            iteration, carried, state = loop
            return cond_fn(scope_fn((carried, shared), keys_of(-iteration), mutable_filter=False), state)

        def iterate(loop: tuple[Any, ...]) -> tuple[Any, ...]:
            iteration, carried, state = loop
            scope = scope_fn((carried, shared), keys_of(iteration))
            state = body_fn(scope, state)
            (carried,) = repack_fn(scope)
            return iteration + 1, carried, state

        _, carried, state = jax.lax.while_loop(goes_on, iterate, (0, carried, init))
        return state, (carried,)

    call = pack(run, (carry_variables, broadcast_variables), (carry_variables,), tuple(split_rngs), name="while_loop")
    return call(scope)  # type: ignore[no-any-return]


def cond(
    pred: Any,
    true_fun: Callable[..., C],
    false_fun: Callable[..., C],
    scope: Any,
    *operands: Any,
    variables: CollectionFilter = True,
    rngs: CollectionFilter = True,
) -> C:
    """Lifted ``jax.lax.cond``: ``true_fun(scope, *operands)`` or ``false_fun(scope, *operands)``.

    Both must make and change the same variables; make them before, or run both while initializing.
    """
    return _branch(jax.lax.cond, pred, (true_fun, false_fun), scope, operands, variables, rngs, "cond")  # type: ignore[no-any-return]


def switch(
    index: Any,
    branches: Sequence[Callable[..., C]],
    scope: Any,
    *operands: Any,
    variables: CollectionFilter = True,
    rngs: CollectionFilter = True,
) -> C:
    """Lifted ``jax.lax.switch``: ``branches[index](scope, *operands)``.

    All must make and change the same variables; make them before, or run all while initializing.
    """

    def select(index: Any, *branches_and_operands: Any) -> Any:
        count = len(branches)
        return jax.lax.switch(index, branches_and_operands[:count], *branches_and_operands[count:])

    return _branch(select, index, branches, scope, operands, variables, rngs, "switch")  # type: ignore[no-any-return]


def _branch(
    select: Callable[..., Any],
    index: Any,
    branches: Sequence[Callable[..., Any]],
    scope: Any,
    operands: tuple[Any, ...],
    variables: CollectionFilter,
    rngs: CollectionFilter,
    name: str,
) -> Any:
    """``select(index, *branches, *operands)`` with the branches as pure functions."""

    def run(scope_fn: Callable[..., Any], repack_fn: Callable[..., Any], groups: Groups, rngs: Groups) -> Any:
        def pure(branch: Callable[..., Any]) -> Callable[..., Any]:
            def call(*operands: Any) -> Any:
                scope = scope_fn(groups, rngs)
                output = branch(scope, *operands)
                return output, repack_fn(scope)

            return call

        return select(index, *map(pure, branches), *operands)

    return pack(run, (variables,), (variables,), (rngs,), name=name)(scope)
