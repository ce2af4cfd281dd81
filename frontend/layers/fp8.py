"""Matrix products in 8-bit floats, with delayed scaling (https://arxiv.org/abs/2209.05433).

An operand is divided by its scale and rounded to 8 bits. The scale follows from the history of its largest magnitudes
(``amax``) in earlier steps; inputs and kernels use the format e4m3, output gradients the wider e5m2. The
"gradients" that ``jax.grad`` gives for scales and histories are their new values, and a training step must store those
in place of an optimiser's update.

A variable that is used several times in one step gets several such gradients. Converted to ``fm32`` before, it gets
the largest of them instead of their sum.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from distaff.frontend.jax_compat import MaxGradDtype
from distaff.frontend.layers.dtypes import Array, Dtype

# float32 whose gradients are joined by their maximum.
fm32 = MaxGradDtype(np.dtype(np.float32))
fp32_max_grad = fm32

# ((lhs contracted, rhs contracted), (lhs batch, rhs batch))
DimensionNumbers: TypeAlias = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]

_FORMATS = (jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float8_e4m3fnuz, jnp.float8_e5m2fnuz)


# Rounding and scales.


def get_fp8_max(fp8_dtype: Dtype, out_dtype: Dtype) -> Any:
    """The largest number of an 8-bit format; ValueError if it is not one of those used here."""
    if fp8_dtype not in _FORMATS:
        raise ValueError(f"Expected one of {[np.dtype(dtype).name for dtype in _FORMATS]}, got {fp8_dtype}.")
    return jnp.finfo(fp8_dtype).max.astype(out_dtype)  # type: ignore[no-untyped-call]


def quantize(x: Array, q_dtype: Dtype, scale: Array, compute_dtype: Dtype) -> Array:
    """``x / scale``, computed in ``compute_dtype``, clipped and rounded to ``q_dtype``."""
    largest = get_fp8_max(q_dtype, compute_dtype)
    scaled = x / jnp.broadcast_to(scale.astype(compute_dtype), x.shape)
    return jnp.clip(scaled, -largest, largest).astype(q_dtype)


def dequantize(x: Array, dq_dtype: Dtype, scale: Array) -> Array:
    """``x * scale`` in ``dq_dtype``."""
    return x.astype(dq_dtype) * jnp.broadcast_to(scale.astype(dq_dtype), x.shape)


def qdq(x: Array, q_dtype: Dtype, scale: Array, compute_dtype: Dtype) -> Array:
    """``x`` as it is after rounding to ``q_dtype``, in its own dtype."""
    return dequantize(quantize(x, q_dtype, scale, compute_dtype), x.dtype, scale)


def compute_scale(amax: Array, scale: Array, fp8_max: Any, margin: float = 0) -> Array:
    """The scale that brings ``amax`` to ``fp8_max / 2**margin``; the old one if ``amax`` is zero or not finite."""
    reciprocal = (fp8_max / amax) / (2**margin)
    return 1.0 / jnp.where((amax > 0.0) & jnp.isfinite(amax), reciprocal, 1.0 / scale)


def compute_amax_history(x: Array, amax_history: Array) -> Array:
    """The history [length] with the largest magnitude of ``x`` in front and the oldest one dropped."""
    amax = jnp.max(jnp.abs(x)).astype(amax_history.dtype)
    return jnp.roll(amax_history, shift=-1, axis=0).at[0].set(amax)


def update_fp8_meta(x: Array, q_dtype: Dtype, scale: Array, amax_history: Array) -> tuple[Array, Array]:
    """The scale for this step, from the history, and the history with ``x``; both of the dtype of those given."""
    is_max_grad = scale.dtype == fm32 and amax_history.dtype == fm32
    scale, amax_history = _as_float(scale), _as_float(amax_history)
    scale = compute_scale(jnp.max(amax_history, axis=0), scale, get_fp8_max(q_dtype, jnp.float32))
    amax_history = compute_amax_history(x, amax_history)
    if is_max_grad:
        return lax.convert_element_type(scale, fm32), lax.convert_element_type(amax_history, fm32)
    return scale, amax_history


def quantize_dequantize_update(
    x: Array, q_dtype: Dtype, scale: Array, amax_history: Array, compute_dtype: Dtype
) -> tuple[Array, Array, Array]:
    """``x`` rounded as by ``qdq`` with the scale for this step, that scale, and the history with ``x``."""
    scale, amax_history = update_fp8_meta(x, q_dtype, scale, amax_history)
    return qdq(x, q_dtype, _as_float(scale), compute_dtype), scale, amax_history


def _as_float(value: Array) -> Array:
    return lax.convert_element_type(value, jnp.float32) if value.dtype == fm32 else value


# Roundings as functions with gradients: that for scale and history is their new value.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_qdq(compute_dtype: Dtype, q_dtype: Dtype, inp: Array, scale: Array, amax_history: Array) -> Array:
    """``inp``, rounded in the forward pass; its gradient passes through."""
    return quantize_dequantize_update(inp, q_dtype, scale, amax_history, compute_dtype)[0]


def _in_qdq_fwd(compute_dtype: Dtype, q_dtype: Dtype, inp: Array, scale: Array, amax_history: Array) -> Any:
    rounded, *new = quantize_dequantize_update(inp, q_dtype, scale, amax_history, compute_dtype)
    return rounded, new


in_qdq.defvjp(_in_qdq_fwd, lambda compute_dtype, q_dtype, new, g: (g, *new))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def out_qdq(compute_dtype: Dtype, q_dtype: Dtype, out: Array, scale: Array, amax_history: Array) -> Array:
    """``out``; its gradient is rounded in the backward pass."""
    return out


out_qdq.defvjp(
    lambda compute_dtype, q_dtype, out, *meta: (out, meta),
    lambda compute_dtype, q_dtype, meta, g: quantize_dequantize_update(g, q_dtype, meta[0], meta[1], compute_dtype),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_q(compute_dtype: Dtype, q_dtype: Dtype, inp: Array, scale: Array, amax_history: Array) -> tuple[Array, Array]:
    """``inp`` in 8 bits and its scale; no gradient for ``inp``, which ``quantized_dot`` gives."""
    scale, _ = update_fp8_meta(inp, q_dtype, scale, amax_history)
    return quantize(inp, q_dtype, _as_float(scale), compute_dtype), scale


def _in_q_fwd(compute_dtype: Dtype, q_dtype: Dtype, inp: Array, scale: Array, amax_history: Array) -> Any:
    scale, amax_history = update_fp8_meta(inp, q_dtype, scale, amax_history)
    return (quantize(inp, q_dtype, _as_float(scale), compute_dtype), scale), (scale, amax_history)


in_q.defvjp(_in_q_fwd, lambda compute_dtype, q_dtype, new, g: (None, *new))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def out_dq(dq_type: Dtype, lhs_scale: Array, rhs_scale: Array, out: Array) -> Array:
    """The product of two rounded operands times their scales; its gradient passes through."""
    return dequantize(out, dq_type, _as_float(lhs_scale) * _as_float(rhs_scale))


out_dq.defvjp(lambda dq_type, *args: (out_dq(dq_type, *args), None), lambda dq_type, _, g: (None, None, g))


# Products.


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def quantized_dot(
    lhs: Array,
    q_lhs: Array,
    lhs_scale: Array,
    rhs: Array,
    q_rhs: Array,
    rhs_scale: Array,
    out_grad_scale: Array,
    out_grad_amax_history: Array,
    dimension_numbers: DimensionNumbers,
    preferred_element_type: Dtype | None = None,
) -> Array:
    """``q_lhs · q_rhs``, without the scales; gradients for ``lhs`` and ``rhs`` are products of 8-bit operands too.

    Args:
        lhs, rhs: the operands before rounding, which are given gradients.
        q_lhs, lhs_scale, q_rhs, rhs_scale: as ``in_q`` returns them.
        out_grad_scale, out_grad_amax_history: of the output's gradient.
        dimension_numbers, preferred_element_type: as for ``jax.lax.dot_general``.
    """
    return lax.dot_general(
        q_lhs,
        q_rhs,
        dimension_numbers,
        preferred_element_type=preferred_element_type,
        precision=lax.Precision.DEFAULT,
    )


def _quantized_dot_fwd(*args: Any) -> Any:
    *operands, dimension_numbers, preferred_element_type = args
    return quantized_dot(*operands, dimension_numbers, preferred_element_type), operands


def _quantized_dot_bwd(dimension_numbers: DimensionNumbers, dtype: Dtype, operands: Any, g: Array) -> Any:
    _, q_lhs, lhs_scale, _, q_rhs, rhs_scale, g_scale, g_amax_history = operands
    g_scale, g_amax_history = update_fp8_meta(g, jnp.float8_e5m2, g_scale, g_amax_history)
    q_g = quantize(g, jnp.float8_e5m2, _as_float(g_scale), dtype)
    lhs_labels, rhs_labels, out_labels = _labels(q_lhs.ndim, q_rhs.ndim, dimension_numbers)
    for_lhs = _product(q_g, out_labels, q_rhs, rhs_labels, lhs_labels, dtype)
    for_rhs = _product(q_g, out_labels, q_lhs, lhs_labels, rhs_labels, dtype)
    return (
        dequantize(for_lhs, dtype, _as_float(rhs_scale) * _as_float(g_scale)),
        None,
        None,
        dequantize(for_rhs, dtype, _as_float(lhs_scale) * _as_float(g_scale)),
        None,
        None,
        g_scale,
        g_amax_history,
    )


quantized_dot.defvjp(_quantized_dot_fwd, _quantized_dot_bwd)


def _labels(lhs_ndim: int, rhs_ndim: int, dimension_numbers: DimensionNumbers) -> tuple[list[int], ...]:
    """A number for each axis of both operands of a product and of its result; axes that belong together share one."""
    (lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch) = dimension_numbers
    lhs = list(range(lhs_ndim))
    shared = dict(zip((*rhs_contracted, *rhs_batch), (*lhs_contracted, *lhs_batch), strict=True))
    rhs = [shared.get(axis, lhs_ndim + axis) for axis in range(rhs_ndim)]
    rest = [label for label in lhs if label not in shared.values()] + [label for label in rhs if label >= lhs_ndim]
    return lhs, rhs, [*lhs_batch, *rest]


def _product(x: Array, x_labels: list[int], y: Array, y_labels: list[int], out: list[int], dtype: Dtype) -> Array:
    """The product of arrays of different 8-bit dtypes, with axes in the order of ``out``; sums over other labels."""
    both = [label for label in x_labels if label in y_labels]
    batch, contracted = [label for label in both if label in out], [label for label in both if label not in out]
    of_x, of_y = x_labels.index, y_labels.index
    dimension_numbers = (
        ([of_x(label) for label in contracted], [of_y(label) for label in contracted]),
        ([of_x(label) for label in batch], [of_y(label) for label in batch]),
    )
    product = lax.dot_general(x, y, dimension_numbers, precision=lax.Precision.HIGHEST, preferred_element_type=dtype)
    made = batch + [label for label in (*x_labels, *y_labels) if label not in both]
    return lax.transpose(product, [made.index(label) for label in out])


def fp8_scaled_dot_general(
    lhs: Array,
    rhs: Array,
    dimension_numbers: DimensionNumbers,
    precision: Any = None,
    preferred_element_type: Dtype | None = None,
    *,
    lhs_scale: Array,
    rhs_scale: Array,
    grad_scale: Array,
    lhs_amax_history: Array,
    rhs_amax_history: Array,
    grad_amax_history: Array,
    quantize_compute_type: Dtype = jnp.float32,
) -> Array:
    """``jax.lax.dot_general`` of operands in 8 bits; ``precision`` is ignored, with a warning.

    Args:
        preferred_element_type: dtype of the result.
        lhs_scale, rhs_scale, grad_scale: float32 or ``fm32`` [1].
        lhs_amax_history, rhs_amax_history, grad_amax_history: float32 or ``fm32`` [length].
        quantize_compute_type: dtype to divide by the scales in.
    """
    if precision is not None:
        warnings.warn("fp8_scaled_dot_general chooses the precision itself and ignores yours.", stacklevel=2)
    dtype, of_inputs = preferred_element_type, jnp.float8_e4m3fn
    q_lhs, lhs_scale = in_q(quantize_compute_type, of_inputs, lhs, lhs_scale, lhs_amax_history)
    q_rhs, rhs_scale = in_q(quantize_compute_type, of_inputs, rhs, rhs_scale, rhs_amax_history)
    operands = (lhs, q_lhs, lhs_scale, rhs, q_rhs, rhs_scale, grad_scale, grad_amax_history)
    return out_dq(dtype, lhs_scale, rhs_scale, quantized_dot(*operands, dimension_numbers, dtype))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def dot_general_with_precision(
    lhs: Array,
    rhs: Array,
    dimension_numbers: DimensionNumbers,
    precision: Any = None,
    preferred_element_type: Dtype | None = None,
) -> Array:
    """``jax.lax.dot_general`` with the default precision forwards and the highest backwards, whatever is asked for."""
    if precision is not None or preferred_element_type is not None:
        warnings.warn(
            "dot_general_with_precision chooses precision and preferred_element_type itself and ignores yours.",
            stacklevel=2,
        )
    return lax.dot_general(lhs, rhs, dimension_numbers, precision=lax.Precision.DEFAULT)


@dot_general_with_precision.defjvp
def _dot_general_with_precision_jvp(
    dimension_numbers: DimensionNumbers, precision: Any, preferred_element_type: Any, primals: Any, tangents: Any
) -> tuple[Array, Array]:
    (lhs, rhs), (lhs_dot, rhs_dot) = primals, tangents
    product = functools.partial(lax.dot_general, dimension_numbers=dimension_numbers)
    tangent = product(lhs_dot, rhs, precision=lax.Precision.HIGHEST)
    tangent += product(lhs, rhs_dot, precision=lax.Precision.HIGHEST)
    return product(lhs, rhs, precision=lax.Precision.DEFAULT), tangent
