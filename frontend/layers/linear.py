"""Products of an input and a kernel, and the table of an embedding."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distaff.frontend.layers.dtypes import Array
from distaff.frontend.layers.fields import DotGeneral


def project(
    inputs: Array,
    kernel: Array,
    bias: Array | None,
    axis: tuple[int, ...],
    batch_dims: tuple[int, ...],
    dot_general: DotGeneral,
    **options: Any,
) -> Array:
    """Contract ``axis`` of the input with the kernel, apart for each index of ``batch_dims``, and add the bias.

    Args:
        inputs: [batch_dims..., others and axis...].
        kernel: [batch_dims..., axis..., features...].
        bias: [batch_dims..., features...].
        axis: axes counted from the front, in order.
        batch_dims: the leading axes with a kernel of their own for each index: (0, 1, ...).
        dot_general: as ``jax.lax.dot_general``.
        options: keyword arguments for it.

    Returns:
        [batch_dims..., others..., features...].
    """
    first = len(batch_dims)
    contracted = tuple(range(first, first + len(axis)))
    out = dot_general(inputs, kernel, ((axis, contracted), (batch_dims, batch_dims)), **options)
    if bias is None:
        return out
    others = (1,) * (inputs.ndim - first - len(axis))
    # lax.reshape, as jnp.reshape takes longer than the addition.
    return out + jax.lax.reshape(bias, (*bias.shape[:first], *others, *bias.shape[first:]))


def check_equation(equation: str) -> str:
    """An equation for ``einsum`` without its blanks; ValueError unless it has the form "…,…->…"."""
    equation = equation.replace(" ", "")
    if "->" not in equation:
        raise ValueError(f'`einsum_str` equation must be explicit and include "->". It is {equation!r}.')
    if equation.count(",") != 1:
        raise ValueError(
            "`einsum_str` equation must have exactly two operands and therefore, exactly one comma character, "
            f"instead of {equation.count(',')}. It is {equation!r}."
        )
    return equation


def kernel_axes_of_result(equation: str, ndim: int, kernel_shape: Sequence[int]) -> list[int | None]:
    """For each axis of the result its size if it is an axis of the kernel, otherwise None.

    Args:
        equation: as ``check_equation`` returns it.
        ndim: number of axes of the first operand.
        kernel_shape: shape of the second.
    """
    operands, result = equation.split("->")
    inputs, kernel = operands.split(",")
    of_inputs, of_kernel = ndim - len(inputs.replace("...", "")), len(kernel_shape) - len(kernel.replace("...", ""))
    most = max(of_inputs, of_kernel)  # axes that an ellipsis stands for

    def axes(term: str, count: int) -> list[str | int]:
        """The axes of a term: names, and for an ellipsis numbers that align on the right."""
        before, _, after = term.partition("...")
        return [*before, *range(most - count, most), *after]

    sizes = dict(zip(axes(kernel, of_kernel), kernel_shape, strict=True))
    return [sizes.get(axis) for axis in axes(result, most if "..." in result else 0)]


def look_up(table: Array, indices: Array, out_sharding: Any = None) -> Array:
    """The rows of ``table`` [rows, features] at integers of any shape: [..., features]; NaN where out of range.

    Args:
        table: the vectors.
        indices: integers, ValueError if not.
        out_sharding: sharding of the result, on a mesh with explicit axes.
    """
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(f"Input type must be an integer or unsigned integer. Embed got {indices.dtype}.")
    if table.shape[0] == 1:  # no valid index but 0, and nothing to look up
        return jnp.broadcast_to(table[0], (*indices.shape, table.shape[1]))
    if out_sharding is None:
        return jnp.take(table, indices, axis=0)
    # ``take`` itself has no such argument.
    take = jax.sharding.auto_axes(functools.partial(jnp.take, axis=0), out_sharding=out_sharding)
    return take(table, indices)  # type: ignore[no-any-return]
