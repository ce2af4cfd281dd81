"""Lifted ``vjp``, ``jvp``, ``value_and_grad`` and ``custom_vjp``: derivatives by variables and by arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distaff.frontend.core.filters import CollectionFilter
from distaff.frontend.core.lift.pack import Groups, pack


def _refuse_reduce_axes(reduce_axes: Any) -> None:
    if reduce_axes:
        raise NotImplementedError("reduce_axes is gone from JAX; take means or sums in the function itself.")


def _with_aux(fn: Callable[..., Any], has_aux: bool, *args: Any) -> tuple[Any, Any]:
    """The output of ``fn`` and its auxiliary data, ``()`` if it has none."""
    output = fn(*args)
    return output if has_aux else (output, ())


def vjp(
    fn: Callable[..., Any],
    scope: Any,
    *primals: Any,
    has_aux: bool = False,
    reduce_axes: Any = (),
    vjp_variables: CollectionFilter = "params",
    variables: CollectionFilter = True,
    rngs: CollectionFilter = True,
) -> tuple[Any, ...]:
    """Lifted ``jax.vjp`` of ``fn(scope, *primals)``.

    Args:
        has_aux: ``fn`` returns ``(output, auxiliary data)``.
        vjp_variables: the collections to differentiate by.
        variables: other collections that are seen inside.
        rngs: the random streams that are seen inside.

    Returns:
        ``(output, backward)`` or ``(output, backward, aux)``; ``backward(cotangent)`` gives the cotangents of the
        variables, as the tree of scopes with a dict of collections for each, and of each primal.
    """
    _refuse_reduce_axes(reduce_axes)
    tree = jax.tree.structure(scope)

    def run(
        scope_fn: Callable[..., Any], repack_fn: Callable[..., Any], groups: Groups, rngs: Groups, *primals: Any
    ) -> Any:
        by, others = groups

        def pure(by: Any, *primals: Any) -> Any:
            scope = scope_fn((by, others), rngs)
            output, aux = _with_aux(fn, has_aux, scope, *primals)
            return output, (aux, repack_fn(scope))

        output, backward, (aux, changed) = jax.vjp(pure, by, *primals, has_aux=True)
        backward = jax.tree_util.Partial(functools.partial(_backward, tree), backward)
        return (output, backward, aux) if has_aux else (output, backward), changed

    result = pack(run, (vjp_variables, variables), (variables,), (rngs,), name="vjp")(scope, *primals)
    return result  # type: ignore[no-any-return]


def _backward(tree: Any, backward: Callable[..., Any], cotangent: Any) -> tuple[Any, ...]:
    of_variables, *of_primals = backward(cotangent)
    return tree.unflatten(of_variables), *of_primals


def value_and_grad(
    fn: Callable[..., Any],
    scope: Any,
    *primals: Any,
    has_aux: bool = False,
    reduce_axes: Any = (),
    variables: CollectionFilter = True,
    rngs: CollectionFilter = True,
) -> tuple[Any, ...]:
    """Lifted ``jax.value_and_grad`` of ``fn(scope, *primals)`` by all primals, and not by variables.

    Returns:
        ``(output, gradients)`` or, with ``has_aux``, ``(output, aux, gradients)``; a gradient for each primal.
    """
    _refuse_reduce_axes(reduce_axes)

    def run(
        scope_fn: Callable[..., Any], repack_fn: Callable[..., Any], groups: Groups, rngs: Groups, *primals: Any
    ) -> Any:
        def pure(*primals: Any) -> Any:
            scope = scope_fn(groups, rngs)
            output, aux = _with_aux(fn, has_aux, scope, *primals)
            return output, (aux, repack_fn(scope))

        output, backward, (aux, changed) = jax.vjp(pure, *primals, has_aux=True)
        gradients = backward(jnp.ones_like(output))
        return (output, aux, gradients) if has_aux else (output, gradients), changed

    result = pack(run, (variables,), (variables,), (rngs,), name="value_and_grad")(scope, *primals)
    return result  # type: ignore[no-any-return]


def jvp(
    fn: Callable[..., Any],
    scope: Any,
    primals: Sequence[Any],
    tangents: Sequence[Any],
    variable_tangents: Any,
    variables: CollectionFilter = True,
    rngs: CollectionFilter = True,
) -> tuple[Any, Any]:
    """Lifted ``jax.jvp`` of ``fn(scope, *primals)``.

    Args:
        variable_tangents: for each scope a dict of collections of tangents; collections that are left out are constant.
        variables, rngs: the other collections, and the random streams, that are seen inside.

    Returns:
        The output and its tangent.
    """
    # A collection without variables counts as left out: JAX takes {"params": {}} for another tree than {}.
    tree: Any = jax.tree.structure(scope)
    by_scope: list[Mapping[str, Any]] = tree.flatten_up_to(variable_tangents)
    moved = tuple({col: values for col, values in of_scope.items() if values} for of_scope in by_scope)

    def run(
        scope_fn: Callable[..., Any], repack_fn: Callable[..., Any], groups: Groups, rngs: Groups, *primals: Any
    ) -> Any:
        by, others = groups

        def pure(by: Any, primals: Any) -> Any:
            scope = scope_fn((by, others), rngs)
            output = fn(scope, *primals)
            return output, repack_fn(scope)

        (output, changed), (tangent, _) = jax.jvp(pure, (by, primals), (moved, tuple(tangents)))
        return (output, tangent), changed

    result = pack(run, (tuple(moved[0]), variables), (variables,), (rngs,), name="jvp")(scope, *primals)
    return result  # type: ignore[no-any-return]


def custom_vjp(
    fn: Callable[..., Any],
    forward_fn: Callable[..., Any],
    backward_fn: Callable[..., Any],
    grad_vars: CollectionFilter = "params",
    nondiff_argnums: int | Sequence[int] = (),
) -> Callable[..., Any]:
    """Lifted ``jax.custom_vjp`` of ``fn(scope, *args)``.

    Args:
        forward_fn: takes what ``fn`` takes and returns ``(output, residuals)``; the ``backward`` function that
            ``lift.vjp`` returns may be the residuals.
        backward_fn: ``(*nondiff_args, residuals, cotangent)`` to the cotangents of the variables, as those of
            ``lift.vjp``, and of each argument. It gets no scope.
        grad_vars: the collections that have cotangents.
        nondiff_argnums: arguments, counted with the scope as 0, that have none.
    """
    static = (nondiff_argnums,) if isinstance(nondiff_argnums, int) else tuple(nondiff_argnums)

    def run(
        scope_fn: Callable[..., Any], repack_fn: Callable[..., Any], groups: Groups, rngs: Groups, *args: Any
    ) -> Any:
        by, others = groups
        tree = None

        def pure(by: Any, *args: Any) -> Any:
            scope = scope_fn((by, others), rngs)
            output = fn(scope, *args)
            return output, repack_fn(scope)

        def forward(by: Any, *args: Any) -> Any:
            nonlocal tree
            scope = scope_fn((by, others), rngs)
            tree = jax.tree.structure(scope)
            output, residuals = forward_fn(scope, *args)
            return (output, repack_fn(scope)), residuals

        def backward(*args: Any) -> tuple[Any, ...]:
            *nondiff_args, residuals, (cotangent, _) = args
            of_variables, *of_args = backward_fn(*nondiff_args, residuals, cotangent)
            assert tree is not None
            return tuple(tree.flatten_up_to(of_variables)), *of_args

        with_rule = jax.custom_vjp(pure, nondiff_argnums=static)
        with_rule.defvjp(forward, backward)
        return with_rule(by, *args)

    return pack(run, (grad_vars, True), (grad_vars, True), (True,), name="custom_vjp")
