"""Derivatives and control flow of functions of a module: ``nn.vjp``, ``nn.grad``, ``nn.cond``, ``nn.while_loop``, …."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from distaff.frontend.core import lift
from distaff.frontend.core.filters import CollectionFilter
from distaff.frontend.linen.class_transform import wrap_method
from distaff.frontend.linen.lifting import lift_direct, lifted
from distaff.frontend.linen.module import Module

C = TypeVar("C")


def custom_vjp(
    fn: Callable[..., Any],
    forward_fn: Callable[..., Any],
    backward_fn: Callable[..., Any],
    grad_vars: CollectionFilter = "params",
    nondiff_argnums: int | Sequence[int] = (),
) -> Callable[..., Any]:
    """``fn(module, *args)`` with a gradient of your own.

    >>> def forward(module, x):
    ...     return nn.vjp(lambda module, x: module(x), module, x)  # the output; the backward function as residuals
    >>> def backward(vjp_fn, cotangent):
    ...     params, *inputs = vjp_fn(cotangent)
    ...     return jax.tree.map(jnp.sign, params), *inputs
    >>> y = nn.custom_vjp(lambda module, x: module(x), forward, backward)(nn.Dense(4), x)

    Args:
        forward_fn: takes what ``fn`` takes, returns ``(output, residuals)``.
        backward_fn: ``(*nondiff_args, residuals, cotangent)`` to the cotangents of the variables and of each argument.
        grad_vars: the collections that have cotangents.
        nondiff_argnums: arguments, counted with the module as 0, that have none.
    """

    def transform(fn: Callable[..., Any], forward_fn: Callable[..., Any]) -> Callable[..., Any]:
        return lift.custom_vjp(fn, forward_fn, backward_fn, grad_vars, nondiff_argnums)

    return lifted(transform, (wrap_method(fn), wrap_method(forward_fn)), one_scope=True)


def vjp(
    fn: Callable[..., Any],
    mdl: Module,
    *primals: Any,
    has_aux: bool = False,
    reduce_axes: Any = (),
    vjp_variables: CollectionFilter = "params",
    variables: CollectionFilter = True,
    rngs: CollectionFilter = True,
    multi_scope: bool = False,
) -> tuple[Any, ...]:
    """``jax.vjp`` of ``fn(module, *primals)``, by the module's variables and the primals.

    Args:
        has_aux: ``fn`` returns ``(output, auxiliary data)``.
        vjp_variables: the collections to differentiate by.
        variables, rngs: the other collections, and the random streams, that are seen inside.
        multi_scope: allow modules in fields or arguments that are not below ``mdl``; the cotangents of variables are
            then a list, with those of ``mdl`` last.

    Returns:
        ``(output, backward)`` or ``(output, backward, aux)``; ``backward(cotangent)`` gives the cotangents of the
        variables, ``{"params": {...}}``, and of each primal.
    """
    return lift_direct(  # type: ignore[no-any-return]
        lift.vjp,
        (fn,),
        mdl,
        *primals,
        one_scope=not multi_scope,
        has_aux=has_aux,
        reduce_axes=reduce_axes,
        vjp_variables=vjp_variables,
        variables=variables,
        rngs=rngs,
    )


def value_and_grad(
    fn: Callable[..., Any],
    mdl: Module,
    *primals: Any,
    has_aux: bool = False,
    reduce_axes: Any = (),
    variables: CollectionFilter = True,
    rngs: CollectionFilter = True,
) -> tuple[Any, Any]:
    """``jax.value_and_grad`` of the scalar ``fn(module, *primals)`` by all primals, and not by variables.

    Returns:
        ``(output, gradients)``, or ``((output, aux), gradients)`` if ``has_aux`` and ``fn`` returns both.

    Raises:
        ValueError: the output is not a scalar.
    """
    output, *aux, gradients = lift_direct(
        lift.value_and_grad,
        (fn,),
        mdl,
        *primals,
        has_aux=has_aux,
        reduce_axes=reduce_axes,
        variables=variables,
        rngs=rngs,
    )
    if output.shape != ():
        raise ValueError(f"Gradients are of functions with a scalar output; this one has the shape {output.shape}.")
    return (output, *aux) if has_aux else output, gradients


def grad(
    fn: Callable[..., Any],
    mdl: Module,
    *primals: Any,
    has_aux: bool = False,
    reduce_axes: Any = (),
    variables: CollectionFilter = True,
    rngs: CollectionFilter = True,
) -> Any:
    """``jax.grad`` of the scalar ``fn(module, *primals)`` by all primals; as ``value_and_grad``.

    Returns:
        The gradients, or ``(gradients, aux)`` if ``has_aux``.
    """
    value, gradients = value_and_grad(
        fn, mdl, *primals, has_aux=has_aux, reduce_axes=reduce_axes, variables=variables, rngs=rngs
    )
    return (gradients, value[1]) if has_aux else gradients


def jvp(
    fn: Callable[..., Any],
    mdl: Module,
    primals: Sequence[Any],
    tangents: Sequence[Any],
    variable_tangents: Mapping[str, Any],
    variables: CollectionFilter = True,
    rngs: CollectionFilter = True,
) -> tuple[Any, Any]:
    """``jax.jvp`` of ``fn(module, *primals)``: the output and its tangent.

    Args:
        variable_tangents: the tangents of variables by collection; those of collections left out are zero.
        variables, rngs: the other collections, and the random streams, that are seen inside.
    """
    return lift_direct(  # type: ignore[no-any-return]
        lift.jvp,
        (fn,),
        mdl,
        primals,
        tangents,
        variable_tangents,
        one_scope=True,
        variables=variables,
        rngs=rngs,
    )


def while_loop(
    cond_fn: Callable[[Any, C], Any],
    body_fn: Callable[[Any, C], C],
    mdl: Module,
    init: C,
    carry_variables: CollectionFilter = False,
    broadcast_variables: CollectionFilter = True,
    split_rngs: Mapping[Any, bool] | None = None,
) -> C:
    """``jax.lax.while_loop`` with ``cond_fn(module, state)`` and ``body_fn(module, state) -> state``.

    Args:
        carry_variables: the collections that iterations may change; variables must be made before the loop.
        broadcast_variables: the collections that are only read.
        split_rngs: for each random stream whether iterations draw different keys.
    """

    def while_loop(cond_fn: Callable[[Any, C], Any], body_fn: Callable[[Any, C], C], scope: Any, init: C) -> C:
        return lift.while_loop(cond_fn, body_fn, scope, init, carry_variables, broadcast_variables, split_rngs)

    return lift_direct(while_loop, (cond_fn, body_fn), mdl, init)  # type: ignore[no-any-return]


def cond(
    pred: Any,
    true_fun: Callable[..., C],
    false_fun: Callable[..., C],
    mdl: Module,
    *operands: Any,
    variables: CollectionFilter = True,
    rngs: CollectionFilter = True,
) -> C:
    """``jax.lax.cond``: ``true_fun(module, *operands)`` or ``false_fun(module, *operands)``.

    Both must make and change the same variables; make them before, or run both while initializing.
    """

    def cond(if_true: Callable[..., C], if_false: Callable[..., C], scope: Any, *operands: Any) -> C:
        return lift.cond(pred, if_true, if_false, scope, *operands, variables=variables, rngs=rngs)

    return lift_direct(cond, (true_fun, false_fun), mdl, *operands)  # type: ignore[no-any-return]


def switch(
    index: Any,
    branches: Sequence[Callable[..., C]],
    mdl: Module,
    *operands: Any,
    variables: CollectionFilter = True,
    rngs: CollectionFilter = True,
) -> C:
    """``jax.lax.switch``: ``branches[index](module, *operands)``.

    All must make and change the same variables; make them before, or run all while initializing.
    """

    def switch(*branches_and_operands: Any) -> C:
        of_scopes, (scope, *operands) = branches_and_operands[: len(branches)], branches_and_operands[len(branches) :]
        return lift.switch(index, of_scopes, scope, *operands, variables=variables, rngs=rngs)  # type: ignore[no-any-return]

    return lift_direct(switch, tuple(branches), mdl, *operands)  # type: ignore[no-any-return]
