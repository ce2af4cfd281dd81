"""Steps of recurrent cells from the sums at their gates, and sequences with padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp

from distaff.frontend.layers.dtypes import Array

Function: TypeAlias = Callable[..., Any]


def gru_step(
    of_input: Sequence[Array],
    of_carry: Sequence[Array],
    carry: Array,
    gate_fn: Function,
    activation_fn: Function,
) -> Array:
    """The carry of a gated recurrent unit after one step (https://arxiv.org/abs/1406.1078).

    Args:
        of_input, of_carry: what the layers of the input and of the carry give for reset, update and candidate.
        carry, gate_fn, activation_fn: the carry, and the functions of the gates and of the candidate.
    """
    r = gate_fn(of_input[0] + of_carry[0])
    z = gate_fn(of_input[1] + of_carry[1])
    n = activation_fn(of_input[2] + r * of_carry[2])
    return (1.0 - z) * n + z * carry  # type: ignore[no-any-return]


def lstm_step(
    i: Array, f: Array, g: Array, o: Array, c: Array, gate_fn: Function, activation_fn: Function
) -> tuple[Array, Array]:
    """``(c, h)`` after one step, from the sums at the input, forget, cell and output gates and the ``c`` before."""
    c = gate_fn(f) * c + gate_fn(i) * activation_fn(g)
    return c, gate_fn(o) * activation_fn(c)


def at_last(x: Array, seq_lengths: Array) -> Array:
    """The last element that counts of ``x`` [time, batch..., features...]: [batch..., features...]."""
    index = (seq_lengths - 1).reshape(1, *seq_lengths.shape, *(1,) * (x.ndim - 1 - seq_lengths.ndim))
    return jnp.take_along_axis(x, index, axis=0)[0]


def flip_sequences(inputs: Array, seq_lengths: Array | None, num_batch_dims: int, time_major: bool) -> Array:
    """Each sequence reversed along time, with padding still at the end: lengths [1, 3] take abc, abc to abc, cba.

    Args:
        inputs: [batch..., time, ...], or [time, batch..., ...] with ``time_major``.
        seq_lengths: [batch...]; None if there is no padding.
        num_batch_dims: number of batch axes.
        time_major: see above.
    """
    time_axis = 0 if time_major else num_batch_dims
    if seq_lengths is None:
        return jnp.flip(inputs, time_axis)
    length = inputs.shape[time_axis]
    backwards = jnp.arange(length)[::-1].reshape(
        [length if axis == time_axis else 1 for axis in range(num_batch_dims + 1)]
    )
    index = (backwards + jnp.expand_dims(seq_lengths, time_axis)) % length
    return jnp.take_along_axis(inputs, index.reshape(*index.shape, *(1,) * (inputs.ndim - index.ndim)), time_axis)


def concatenate(a: Array, b: Array) -> Array:
    """Both along the last axis."""
    return jnp.concatenate([a, b], axis=-1)
