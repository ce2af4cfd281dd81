"""Arithmetic on lower and upper bounds, one rule a primitive; a primitive without one has no known bounds.

Bounds are pairs of float64 arrays that broadcast. NaN in a result means that nothing is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from distaff.compiler.analysis.blocks import Bools, Floats
from distaff.compiler.ir import Node

Bounds = tuple[Floats, Floats]

BOUND = 1e6  # ordinary data (attention scores above all) are assumed to stay within +-BOUND
_LARGEST_WHOLE = 2.0**53


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether numbers of the dtype are real floating-point, those that NumPy does not know by itself included."""
    return bool(jnp.issubdtype(dtype, jnp.floating))


def is_integer(dtype: np.dtype[Any]) -> bool:
    """Whether the dtype is an integer one (booleans are not)."""
    return bool(jnp.issubdtype(dtype, jnp.integer))


def _truth(low: Bools, high: Bools) -> Bounds:
    return low.astype(np.float64), high.astype(np.float64)


def less(a: Bounds, b: Bounds) -> Bounds:
    """Bounds of ``a < b``: 0, 1 or between."""
    return _truth(a[1] < b[0], a[0] < b[1])


def less_equal(a: Bounds, b: Bounds) -> Bounds:
    """Bounds of ``a <= b``."""
    return _truth(a[1] <= b[0], a[0] <= b[1])


def greater(a: Bounds, b: Bounds) -> Bounds:
    """Bounds of ``a > b``."""
    return less(b, a)


def greater_equal(a: Bounds, b: Bounds) -> Bounds:
    """Bounds of ``a >= b``."""
    return less_equal(b, a)


def equal(a: Bounds, b: Bounds) -> Bounds:
    """Bounds of ``a == b``."""
    same = (a[0] == a[1]) & (b[0] == b[1]) & (a[0] == b[0])
    return _truth(same, (a[0] <= b[1]) & (b[0] <= a[1]))


def not_equal(a: Bounds, b: Bounds) -> Bounds:
    """Bounds of ``a != b``."""
    low, high = equal(a, b)
    return 1 - high, 1 - low


def _corners(f: Callable[[Any, Any], Any], a: Bounds, b: Bounds) -> Bounds:
    """Bounds of a function that is monotone in each argument."""
    values = [f(x, y) for x in a for y in b]
    return np.minimum.reduce(np.broadcast_arrays(*values)), np.maximum.reduce(np.broadcast_arrays(*values))


def product(a: Bounds, b: Bounds) -> Bounds:
    """Bounds of ``a * b``; zero times an unbounded value is unknown."""
    with np.errstate(invalid="ignore", over="ignore"):
        return _corners(np.multiply, a, b)


def _known(*bounds: Bounds) -> Bools:
    known: Bools = np.logical_and.reduce(np.broadcast_arrays(*(low == high for low, high in bounds)))
    return known


def _quotient(node: Node, a: Bounds, b: Bounds, divisor_is_data: bool) -> Bounds:
    """Integers truncate. Divisors that are data are assumed not to be zero; 0 divided by them stays 0."""
    through_zero = (b[0] <= 0) & (b[1] >= 0)
    safe = (np.where(through_zero, 1.0, b[0]), np.where(through_zero, 1.0, b[1]))
    low, high = _corners(np.divide, a, safe)
    if is_integer(node.outputs[0].type.dtype):
        low, high = np.trunc(low), np.trunc(high)
    zero = (a[0] == 0) & (a[1] == 0) & divisor_is_data
    return (
        np.where(through_zero, np.where(zero, 0.0, -np.inf), low),
        np.where(through_zero, np.where(zero, 0.0, np.inf), high),
    )


def _remainder(node: Node, a: Bounds, b: Bounds) -> Bounds:
    """The remainder of truncating division has the sign of ``a``; by zero it is unknown."""
    c = np.maximum(np.abs(b[0]), np.abs(b[1]))
    largest = c - 1 if is_integer(node.outputs[0].type.dtype) else c
    low = np.where(a[0] >= 0, 0.0, np.maximum(-largest, a[0]))
    high = np.where(a[1] <= 0, 0.0, np.minimum(largest, a[1]))
    first, last = np.fmod(a[0], c), np.fmod(a[1], c)
    one_period = (b[0] == b[1]) & (c > 0) & (a[1] - a[0] < c) & (first <= last) & ((a[0] >= 0) | (a[1] <= 0))
    by_zero = (b[0] <= 0) & (b[1] >= 0)
    return (
        np.where(by_zero, -np.inf, np.where(one_period, first, low)),
        np.where(by_zero, np.inf, np.where(one_period, last, high)),
    )


def _exponential(base: float) -> Callable[[Node, Bounds], Bounds]:
    def rule(node: Node, a: Bounds) -> Bounds:
        """What underflows to zero is exactly 0."""
        scale = np.log(base)
        least = _underflow(node) / scale
        low = np.where(a[0] < least, 0.0, np.exp(np.minimum(a[0] * scale, 700.0)))
        high = np.where(a[1] < least, 0.0, np.exp(np.minimum(a[1] * scale, 700.0)))
        return low, high

    return rule


def _underflow(node: Node) -> float:
    """Below this the exponential is zero in the result's dtype, denormals included."""
    return -746.0 if node.outputs[0].type.dtype == np.float64 else -104.0


def _logistic(node: Node, a: Bounds) -> Bounds:
    low, high = (1 / (1 + np.exp(np.clip(-x, -700, 700))) for x in a)
    least = _underflow(node)
    return np.where(a[0] < least, 0.0, low), np.where(a[1] < least, 0.0, high)


def _power(node: Node, a: Bounds, b: Bounds) -> Bounds:
    """Of a positive base only, as ``exp(b * log(a))``."""
    positive = a[0] > 0
    logs = np.log(np.where(positive, a[0], 1.0)), np.log(np.where(positive, a[1], 1.0))
    low, high = _exponential(np.e)(node, product(b, logs))
    return np.where(positive, low, -np.inf), np.where(positive, high, np.inf)


def _integer_pow(node: Node, a: Bounds) -> Bounds:
    y = node.params["y"]
    spans_zero = (a[0] < 0) & (a[1] > 0)
    if y < 0:
        spans_zero = (a[0] <= 0) & (a[1] >= 0)
    safe = np.where(spans_zero & (y < 0), 1.0, a[0]), np.where(spans_zero & (y < 0), 1.0, a[1])
    ends = safe[0] ** y, safe[1] ** y
    low, high = np.minimum(*ends), np.maximum(*ends)
    if y < 0:
        return np.where(spans_zero, -np.inf, low), np.where(spans_zero, np.inf, high)
    return (np.where(spans_zero, 0.0, low), high) if y % 2 == 0 else (low, high)


def _magnitude(node: Node, a: Bounds) -> Bounds:
    low = np.maximum(np.maximum(a[0], -a[1]), 0.0)
    return low, np.maximum(np.abs(a[0]), np.abs(a[1]))


def _square(node: Node, a: Bounds) -> Bounds:
    low, high = _magnitude(node, a)
    return low * low, high * high


def _clamp(node: Node, least: Bounds, a: Bounds, most: Bounds) -> Bounds:
    return np.minimum(np.maximum(a[0], least[0]), most[0]), np.minimum(np.maximum(a[1], least[1]), most[1])


def _not(node: Node, a: Bounds) -> Bounds:
    return (1 - a[1], 1 - a[0]) if _is_bool(node) else (-a[1] - 1, -a[0] - 1)


def _and(node: Node, a: Bounds, b: Bounds) -> Bounds:
    if _is_bool(node):
        return np.minimum(a[0], b[0]), np.minimum(a[1], b[1])
    return _bitwise(np.bitwise_and, a, b, np.minimum(a[1], b[1]))


def _or(node: Node, a: Bounds, b: Bounds) -> Bounds:
    if _is_bool(node):
        return np.maximum(a[0], b[0]), np.maximum(a[1], b[1])
    return _bitwise(np.bitwise_or, a, b, a[1] + b[1])


def _xor(node: Node, a: Bounds, b: Bounds) -> Bounds:
    return not_equal(a, b) if _is_bool(node) else _bitwise(np.bitwise_xor, a, b, a[1] + b[1])


def _bitwise(f: Callable[[Any, Any], Any], a: Bounds, b: Bounds, most: Floats) -> Bounds:
    """Exact for known numbers; of numbers that are not negative, between 0 and ``most``."""
    natural = (a[0] >= 0) & (b[0] >= 0) & (np.maximum(a[1], b[1]) < _LARGEST_WHOLE)
    known = natural & _known(a, b)
    exact = f(np.where(known, a[0], 0).astype(np.int64), np.where(known, b[0], 0).astype(np.int64)).astype(np.float64)
    low, high = np.where(natural, 0.0, -np.inf), np.where(natural, most, np.inf)
    return np.where(known, exact, low), np.where(known, exact, high)


def _shift_left(node: Node, a: Bounds, b: Bounds) -> Bounds:
    return product(a, (2.0 ** np.clip(b[0], 0, 64), 2.0 ** np.clip(b[1], 0, 64)))


def _shift_right(node: Node, a: Bounds, b: Bounds) -> Bounds:
    """Rounds down; a logical shift is the same for numbers that are not negative."""
    low, high = product(a, (2.0 ** -np.clip(b[1], 0, 64), 2.0 ** -np.clip(b[0], 0, 64)))
    return np.floor(low), np.floor(high)


def _shift_right_logical(node: Node, a: Bounds, b: Bounds) -> Bounds:
    low, high = _shift_right(node, a, b)
    return np.where(a[0] >= 0, low, -np.inf), np.where(a[0] >= 0, high, np.inf)


def _reduce_precision(node: Node, a: Bounds) -> Bounds:
    error = 2.0 ** -node.params["mantissa_bits"]
    return a[0] * (1 - np.sign(a[0]) * error), a[1] * (1 + np.sign(a[1]) * error)


def _is_finite(node: Node, a: Bounds) -> Bounds:
    finite = np.isfinite(a[0]) & np.isfinite(a[1])
    infinite = np.isinf(a[0]) & (a[0] == a[1])
    return _truth(finite, ~infinite)


def _is_bool(node: Node) -> bool:
    return bool(node.outputs[0].type.dtype == np.bool_)


def _within(low: float, high: float) -> Callable[..., Bounds]:
    return lambda node, *args: (np.full(1, low), np.full(1, high))


def _increasing(f: Callable[[Any], Any]) -> Callable[[Node, Bounds], Bounds]:
    return lambda node, a: (f(a[0]), f(a[1]))


def _round(node: Node, a: Bounds) -> Bounds:
    """Ties go away from zero or to even; both rules are monotone, so half a unit more is enough for either."""
    return np.floor(a[0] + 0.5) - (a[0] % 1 == 0.5), np.ceil(a[1] - 0.5) + (a[1] % 1 == 0.5)


_RULES: dict[str, Callable[..., Bounds]] = {
    "add": lambda node, a, b: (a[0] + b[0], a[1] + b[1]),
    "add_any": lambda node, a, b: (a[0] + b[0], a[1] + b[1]),
    "sub": lambda node, a, b: (a[0] - b[1], a[1] - b[0]),
    "neg": lambda node, a: (-a[1], -a[0]),
    "mul": lambda node, a, b: product(a, b),
    "rem": _remainder,
    "max": lambda node, a, b: (np.maximum(a[0], b[0]), np.maximum(a[1], b[1])),
    "min": lambda node, a, b: (np.minimum(a[0], b[0]), np.minimum(a[1], b[1])),
    "clamp": _clamp,
    "abs": _magnitude,
    "square": _square,
    "integer_pow": _integer_pow,
    "pow": _power,
    "exp": _exponential(np.e),
    "exp2": _exponential(2.0),
    "logistic": _logistic,
    "not": _not,
    "and": _and,
    "or": _or,
    "xor": _xor,
    "shift_left": _shift_left,
    "shift_right_arithmetic": _shift_right,
    "shift_right_logical": _shift_right_logical,
    "is_finite": _is_finite,
    "reduce_precision": _reduce_precision,
    "round": _round,
    "sin": _within(-1.0, 1.0),
    "cos": _within(-1.0, 1.0),
    "erf": _within(-1.0, 1.0),
    "argmax": _within(0.0, np.inf),
    "argmin": _within(0.0, np.inf),
    **{
        name: _increasing(f)
        for name, f in {
            "floor": np.floor,
            "ceil": np.ceil,
            "sign": np.sign,
            "sqrt": np.sqrt,
            "cbrt": np.cbrt,
            "log": np.log,
            "log1p": np.log1p,
            "expm1": np.expm1,
            "tanh": np.tanh,
            "atan": np.arctan,
            "asinh": np.arcsinh,
        }.items()
    },
}


def apply(node: Node, args: Sequence[Bounds], *, divisor_is_data: bool) -> Bounds | None:
    """Bounds of a node's result from those of its operands, or None if there is no rule."""
    with np.errstate(all="ignore"):
        if node.op == "div":
            result = _quotient(node, args[0], args[1], divisor_is_data)
        elif node.op in _RULES:
            result = _RULES[node.op](node, *args)
        else:
            return None
    return result if node.outputs[0].type.dtype == np.bool_ else _with_nan(node, args, result)


def _with_nan(node: Node, args: Sequence[Bounds], result: Bounds) -> Bounds:
    """Operands without any bounds may be NaN, and then so is the result; likewise the sine of infinity."""
    lost: Any = np.False_
    for low, high in args:
        lost = lost | (np.isinf(low) | np.isinf(high) if node.op in _PERIODIC else (low == -np.inf) & (high == np.inf))
    return (np.where(lost, -np.inf, result[0]), np.where(lost, np.inf, result[1])) if lost.any() else result


_PERIODIC = frozenset({"sin", "cos", "rem"})
