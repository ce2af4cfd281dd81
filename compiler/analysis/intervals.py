"""Interval analysis of attention bodies over blocks of the (query, key) grid.

An `Interval` bounds a value over all cells of each block and over all its other dimensions together. Functions of
positions are affine forms of the two positions plus a bounded remainder, so that ``i - j < w`` is decided for whole
bands of distances; rounding of floating-point positions and integer overflow widen the remainder.

*Data* (values computed from token data or from float weights) are unknown. One assumption makes masks provable:
ordinary data stay finite and within ``+-BOUND`` under every operation, as attention scores do, and are not divided by
zero. What leaves that range does so because of a mask value. Rounding of data is not modelled. ``live`` marks data
that can carry information in every cell of the block: not merged with a mask that some cells have and others not.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from distaff.compiler.analysis import interval_arithmetic as arithmetic
from distaff.compiler.analysis.blocks import Blocks, Bools, Floats
from distaff.compiler.analysis.interval_arithmetic import BOUND, Bounds, is_float, is_integer
from distaff.compiler.analysis.position_tables import PositionTable
from distaff.compiler.ir import Node, Sym, Value
from distaff.compiler.ir.types import KEY, QUERY

_LARGEST_CONSTANT = 65_536  # elements; larger arrays without positions are weights and treated as data
_NONE = np.zeros(1, np.bool_)
_ALL = np.ones(1, np.bool_)
_ANY_UNIT = 2.0**60  # of zero, which is a multiple of everything
_ULPS = 8.0  # error of one operation in units of the dtype's precision
_EXPONENTIAL_ULPS = 256.0  # it grows with the exponent, which is at most about 104
_FLOAT_INFO: Any = jnp.finfo  # untyped in jax
_INTEGER_INFO: Any = jnp.iinfo


@dataclasses.dataclass(frozen=True, eq=False)
class Interval:
    """``q * query + k * key + [lo, hi]``, with one ``lo``, ``hi`` and ``live`` a block (or one for all of them).

    ``data`` says whether the value depends on token data (then ``q`` and ``k`` are 0). ``unit`` is a power of two of
    which it is a whole multiple (0 if none is known): floating-point arithmetic on few enough units is exact.
    """

    lo: Floats
    hi: Floats
    q: float = 0.0
    k: float = 0.0
    data: bool = False
    live: Bools = dataclasses.field(default_factory=lambda: _NONE)
    unit: float = 0.0

    def bounds(self, blocks: Blocks) -> Bounds:
        """Lowest and highest value over each block."""
        if not self.q and not self.k:
            return self.lo, self.hi
        low, high = blocks.span(self.q, self.k)
        return low + self.lo, high + self.hi

    def plain(self, blocks: Blocks) -> Interval:
        """The same without an affine part."""
        low, high = self.bounds(blocks)
        return dataclasses.replace(self, lo=low, hi=high, q=0.0, k=0.0)


def _defined(low: Floats, high: Floats) -> Bounds:
    """Bounds in which NaN, nothing known, is replaced by infinities."""
    undefined = np.isnan(low) | np.isnan(high)
    return (np.where(undefined, -np.inf, low), np.where(undefined, np.inf, high)) if undefined.any() else (low, high)


def ordinary_data(dtype: np.dtype[Any]) -> Interval:
    """Unknown token data of a dtype."""
    low, high = (0.0, 1.0) if dtype == np.bool_ else (-BOUND, BOUND)
    if is_integer(dtype):
        low, high = max(low, _INTEGER_INFO(dtype).min), min(high, _INTEGER_INFO(dtype).max)
    return Interval(np.full(1, low), np.full(1, high), data=True, live=_ALL)


def constant(value: Value) -> Interval | PositionTable:
    """Bounds of a constant, weight or table; float weights and very large or abstract arrays count as data."""
    dims = {d.axis: i for i, d in enumerate(value.type.shape) if isinstance(d, Sym)}
    large = not dims and math.prod(value.type.per_token()) > _LARGEST_CONSTANT
    array = None if large else known_array(value)
    if array is None or not array.size:
        return ordinary_data(value.type.dtype)
    if dims:
        return PositionTable(array, dims, dict.fromkeys(dims, 0))
    low, high = np.full(1, array.min(), np.float64), np.full(1, array.max(), np.float64)
    return Interval(*_defined(low, high), unit=_unit_of(array))


def known_array(value: Value) -> np.ndarray[Any, Any] | None:
    """The array behind a constant or table as NumPy (bfloat16 widened), or None if its numbers may not be used."""
    if value.data is None or (value.name and is_float(value.type.dtype)):
        return None  # weights may be replaced or quantised after the proof
    try:
        array = np.asarray(value.data)
    except TypeError:  # a traced or abstract array
        return None
    if is_float(array.dtype):
        return array.astype(np.float64) if array.dtype.kind == "V" else array
    return array if array.dtype == np.bool_ or is_integer(array.dtype) else None


def _unit_of(array: np.ndarray[Any, Any]) -> float:
    """The largest power of two that divides all finite elements."""
    if not is_float(array.dtype):
        return 1.0
    fraction, exponent = np.frexp(array[np.isfinite(array) & (array != 0)].astype(np.float64))
    whole = (fraction * 2.0**53).astype(np.int64)
    return float(np.min((whole & -whole) * 2.0 ** (exponent - 53.0), initial=_ANY_UNIT))


def token_slice(node: Node) -> PositionTable | None:
    """The table that ``table[start : start + S]`` reads, if the node is such a slice of a known constant."""
    (source,) = node.inputs
    limits, starts = node.params["limit_indices"], node.params["start_indices"]
    dims = {limit.axis: i for i, limit in enumerate(limits) if isinstance(limit, Sym)}
    array = known_array(source)
    if source.type.token_dims or not dims or array is None or any(s != 1 for s in node.params["strides"] or ()):
        return None
    return PositionTable(array, dims, {axis: int(starts[i]) for axis, i in dims.items()})


def from_table(table: PositionTable, blocks: Blocks) -> Interval:
    """A table over each block."""
    low, high, slopes = table.bounds(blocks)
    return Interval(low, high, slopes.get(QUERY, 0.0), slopes.get(KEY, 0.0), unit=1.0 if table.integral else 0.0)


def transfer(node: Node, args: Sequence[Interval], blocks: Blocks) -> list[Interval]:
    """The results of a node that neither reduces nor contracts a token dimension."""
    if node.op in _IDENTITY:
        return [args[0]] * len(node.outputs)
    if node.op in _SPECIAL:
        results = [_SPECIAL[node.op](node, args, blocks)] * len(node.outputs)
    elif (linear := _linear(node, args)) is not None:
        results = [linear]
    else:
        results = [_generic(node, args, blocks)] * len(node.outputs)
    return [_representable(node, i, r, blocks) for i, r in enumerate(results)]


# Data movement that cannot change bounds taken over all other dimensions.
_IDENTITY = frozenset(
    """broadcast_in_dim reshape transpose squeeze expand_dims slice dynamic_slice rev split reduce_max
    reduce_min reduce_and reduce_or copy copy_p stop_gradient optimization_barrier real""".split()
)


def _iota(node: Node, args: Sequence[Interval], blocks: Blocks) -> Interval:
    size = node.outputs[0].type.shape[node.params["dimension"]]
    zero = np.zeros(1)
    if isinstance(size, Sym):
        return Interval(zero, zero, float(size.axis == QUERY), float(size.axis == KEY), unit=1.0)
    return Interval(zero, zero + max(size - 1, 0), unit=1.0)


def _sum(a: Interval, b: Interval) -> Interval:
    with np.errstate(invalid="ignore"):
        low, high = _defined(a.lo + b.lo, a.hi + b.hi)
    return Interval(low, high, a.q + b.q, a.k + b.k, unit=min(a.unit, b.unit))


def _negative(a: Interval) -> Interval:
    return Interval(-a.hi, -a.lo, -a.q, -a.k, unit=a.unit)


def _scaled(a: Interval, factor: float, unit: float) -> Interval:
    low, high = _defined(*arithmetic.product((a.lo, a.hi), (np.full(1, factor), np.full(1, factor))))
    return Interval(low, high, factor * a.q, factor * a.k, unit=min(a.unit * unit, _ANY_UNIT))


def _linear(node: Node, args: Sequence[Interval]) -> Interval | None:
    """Sums, and products with and quotients by a known number, keep affine forms of positions."""
    if any(a.data for a in args):
        return None
    if node.op in ("add", "add_any"):
        return _sum(args[0], args[1])
    if node.op == "sub":
        return _sum(args[0], _negative(args[1]))
    if node.op == "neg":
        return _negative(args[0])
    if node.op == "mul":
        for a, b in (args, args[::-1]):
            if (factor := _number(b)) is not None:
                return _scaled(a, factor, b.unit)
    if node.op == "div" and is_float(node.outputs[0].type.dtype) and (divisor := _number(args[1])):
        inverse = 1 / divisor
        return _scaled(args[0], inverse, abs(inverse) if np.frexp(abs(inverse))[0] == 0.5 else 0.0)
    return None


def _number(a: Interval) -> float | None:
    """The finite number that an interval is, if it is one and the same for all blocks."""
    known = not a.q and not a.k and a.lo.size == 1 and a.lo[0] == a.hi[0] and np.isfinite(a.lo[0])
    return float(a.lo[0]) if known else None


def _convert(node: Node, args: Sequence[Interval], blocks: Blocks) -> Interval:
    """Casts keep values; to integers they truncate, to booleans they ask for non-zero."""
    (a,) = args
    source, target = node.inputs[0].type.dtype, node.outputs[0].type.dtype
    if target == np.bool_ and source != np.bool_:
        low, high = arithmetic.not_equal(a.bounds(blocks), (np.zeros(1), np.zeros(1)))
        return Interval(low, high, data=a.data, live=a.live & (low < high), unit=1.0)
    if is_float(target) and not (a.data or a.q or a.k):  # rounding is monotone
        with np.errstate(over="ignore"):
            low, high = a.lo.astype(target).astype(np.float64), a.hi.astype(target).astype(np.float64)
        return Interval(low, high, unit=a.unit)
    if is_integer(target) and a.unit < 1:
        low, high = a.bounds(blocks)
        return Interval(np.trunc(low), np.trunc(high), data=a.data, live=a.live, unit=1.0)
    return a


def _select(node: Node, args: Sequence[Interval], blocks: Blocks) -> Interval:
    predicate, cases = args[0], args[1:]
    first, last = predicate.bounds(blocks)
    if first.size and (first == last).all() and (first == first[0]).all():
        return cases[int(first[0])]
    data = any(a.data for a in args)
    if data or len({(c.q, c.k) for c in cases}) > 1:
        cases = [c.plain(blocks) for c in cases]
    low: Any = np.inf
    high: Any = -np.inf
    chosen_live, all_live, all_settled = _NONE, _ALL, _ALL
    for i, case in enumerate(cases):
        possible = (first <= i) & (i <= last)
        low = np.minimum(low, np.where(possible, case.lo, np.inf))
        high = np.maximum(high, np.where(possible, case.hi, -np.inf))
        chosen_live = chosen_live | (possible & case.live)
        all_live = all_live & (~possible | case.live)
        all_settled = all_settled & (~possible | (case.live if case.data else case.lo == case.hi))
    undecided_live = all_live | (predicate.live & all_settled)
    live = np.where(first == last, chosen_live, undecided_live) & (low < high)
    return Interval(low, high, cases[0].q, cases[0].k, data=data, live=live, unit=min(c.unit for c in cases))


def _join(node: Node, args: Sequence[Interval], blocks: Blocks) -> Interval:
    """Parts put side by side along another dimension."""
    parts = [a.plain(blocks) for a in args]
    low, high = parts[0].lo, parts[0].hi
    live = parts[0].live
    for part in parts[1:]:
        low, high, live = np.minimum(low, part.lo), np.maximum(high, part.hi), live & part.live
    return Interval(low, high, data=any(p.data for p in parts), live=live, unit=min(p.unit for p in parts))


def _gather(node: Node, args: Sequence[Interval], blocks: Blocks) -> Interval:
    """Any element of the operand; of a constant only if the indices lie in its bounds (outside it reads as NaN)."""
    source, index = args[0].plain(blocks), args[1]
    shape, sizes = node.inputs[0].type.shape, node.params["slice_sizes"]
    indexed = node.params["dimension_numbers"].start_index_map
    room = [n - sizes[i] for i in indexed if not isinstance(n := shape[i], Sym)]
    first, last = index.bounds(blocks)
    inside = (first >= 0) & (last <= min(room, default=-1))
    if source.data or "CLIP" in str(node.params["mode"]).upper():
        return source
    return Interval(np.where(inside, source.lo, -np.inf), np.where(inside, source.hi, np.inf), unit=source.unit)


def contract(node: Node, args: Sequence[Interval], blocks: Blocks) -> Interval:
    """The products that a ``dot_general`` adds up."""
    return _finish(node, "mul", args, arithmetic.product(args[0].bounds(blocks), args[1].bounds(blocks)), blocks)


def _dot(node: Node, args: Sequence[Interval], blocks: Blocks) -> Interval:
    terms = contract(node, args, blocks)
    (dims, _), _ = node.params["dimension_numbers"]
    shape = node.inputs[0].type.shape
    return _times(terms, [shape[d] for d in dims])


def _reduce_sum(node: Node, args: Sequence[Interval], blocks: Blocks) -> Interval:
    shape = node.inputs[0].type.shape
    return _times(args[0].plain(blocks), [shape[d] for d in node.params["axes"]])


def _times(terms: Interval, dims: Sequence[Any]) -> Interval:
    """A sum over static dimensions; sums of ordinary data are ordinary."""
    count = float(np.prod([d for d in dims if not isinstance(d, Sym)], initial=1.0))
    low, high = terms.lo * count, terms.hi * count
    if terms.data:
        low = np.where(terms.lo >= -BOUND, np.maximum(low, -BOUND), low)
        high = np.where(terms.hi <= BOUND, np.minimum(high, BOUND), high)
    return dataclasses.replace(terms, lo=low, hi=high)


_SPECIAL: dict[str, Any] = {
    "iota": _iota,
    "convert_element_type": _convert,
    "select_n": _select,
    "concatenate": _join,
    "pad": _join,
    "sort": _join,
    "gather": _gather,
    "dot_general": _dot,
    "reduce_sum": _reduce_sum,
}
_COMPARISONS = {
    "eq": arithmetic.equal,
    "ne": arithmetic.not_equal,
    "lt": arithmetic.less,
    "le": arithmetic.less_equal,
    "gt": arithmetic.greater,
    "ge": arithmetic.greater_equal,
}


def _generic(node: Node, args: Sequence[Interval], blocks: Blocks) -> Interval:
    """Comparisons of positions keep what they have in common; all else is arithmetic on bounds."""
    if node.op in _COMPARISONS and not any(a.data for a in args):
        low, high = _sum(args[0], _negative(args[1])).bounds(blocks)
        return Interval(*_COMPARISONS[node.op]((low, high), (np.zeros(1), np.zeros(1))), unit=1.0)
    bounds = [a.bounds(blocks) for a in args]
    if node.op in _COMPARISONS:
        return _finish(node, node.op, args, _COMPARISONS[node.op](*bounds), blocks)
    return _finish(node, node.op, args, arithmetic.apply(node, bounds, divisor_is_data=args[-1].data), blocks)


def _finish(node: Node, op: str, args: Sequence[Interval], result: Bounds | None, blocks: Blocks) -> Interval:
    """Adds to the bounds what follows from the operands: ordinary data stay ordinary, and which data stay live.

    Integers may be hashed and bits reinterpreted: only real arithmetic keeps data ordinary.
    """
    data = any(a.data for a in args)
    bounds = [a.bounds(blocks) for a in args]
    ordinary = [(low >= -BOUND) & (high <= BOUND) for low, high in bounds]
    low, high = (np.full(1, -np.inf), np.full(1, np.inf)) if result is None else result
    low, high = _defined(low, high)
    if not data:
        return Interval(low, high, unit=_unit_after(node, op, [a.unit for a in args]))
    low_stays = high_stays = functools.reduce(np.logical_and, ordinary)
    if op in _RISING:  # each end follows from the same ends of the operands
        ends = [bounds[0], *(((-b, -a) if op == "sub" else (a, b)) for a, b in bounds[1:])]
        low_stays = functools.reduce(np.logical_and, [first >= -BOUND for first, _ in ends])
        high_stays = functools.reduce(np.logical_and, [last <= BOUND for _, last in ends])
    if not is_integer(node.outputs[0].type.dtype) and op != "bitcast_convert_type":
        low = np.where(low_stays, np.maximum(low, -BOUND), low)
        high = np.where(high_stays, np.minimum(high, BOUND), high)
    live = low < high
    within = (low >= -BOUND) & (high <= BOUND)
    for arg, (first, last), fits in zip(args, bounds, ordinary, strict=True):
        live = live & (arg.live if arg.data else _harmless(op, first, last, fits, within))
    return Interval(low, high, data=True, live=live)


_RISING = frozenset({"add", "add_any", "sub", "exp", "exp2"})


def _unit_after(node: Node, op: str, units: Sequence[float]) -> float:
    if op in ("floor", "ceil", "round", "sign") or not is_float(node.outputs[0].type.dtype):
        return 1.0
    if op in ("mul", "square"):
        return min(units[0] * units[-1], _ANY_UNIT)
    return min(units) if op in ("add", "sub", "max", "min", "clamp", "abs", "rem") else 0.0


def _harmless(op: str, low: Floats, high: Floats, ordinary: Bools, result_ordinary: Bools) -> Bools:
    """Whether an operand that depends on positions lets the data through in every cell of the block."""
    harmless: Bools = low == high
    if op in ("add", "sub", "add_any"):
        harmless = ordinary | result_ordinary
    elif op in ("mul", "div"):
        harmless = ordinary & ((low > 0) | (high < 0))
    elif op == "and":
        harmless = (low == 1) & (high == 1)
    elif op == "or":
        harmless = (low == 0) & (high == 0)
    return harmless


def _representable(node: Node, i: int, value: Interval, blocks: Blocks) -> Interval:
    """Widens what a dtype cannot hold: overflow and, in functions of positions, rounding and flushed tiny numbers."""
    dtype = node.outputs[i].type.dtype
    integer = is_integer(dtype)
    if not (integer or is_float(dtype)):
        return value
    low, high = value.bounds(blocks)
    limits = _INTEGER_INFO(dtype) if integer else _FLOAT_INFO(dtype)
    least, most = float(limits.min), float(limits.max)
    if value.data and not integer:
        least, most = min(least, -BOUND), max(most, BOUND)
    below, above = low < least, high > most
    if below.any() or above.any():
        if integer:
            low, high = np.where(below | above, least, low), np.where(below | above, most, high)
        else:
            low, high = np.where(below, -np.inf, low), np.where(above, np.inf, high)
        value = dataclasses.replace(value, lo=low, hi=high, q=0.0, k=0.0)
    if integer or node.op not in _ROUNDED:
        return value
    return _flushed(value if value.data else _rounded(node, value, limits, blocks), float(limits.tiny))


def _rounded(node: Node, value: Interval, limits: Any, blocks: Blocks) -> Interval:
    """A float function of positions after one more operation; casts of plain bounds have rounded them already."""
    flat = not value.q and not value.k
    low, high = value.bounds(blocks)
    size = np.maximum(np.abs(low), np.abs(high))
    exact = value.unit and (size <= value.unit * 2.0 ** (limits.nmant + 1)).all()
    if exact or (flat and node.op == "convert_element_type"):
        return value
    error = (_EXPONENTIAL_ULPS if node.op in ("exp", "exp2", "pow") else _ULPS) * float(limits.eps)
    if not flat:
        return dataclasses.replace(value, lo=value.lo - size * error, hi=value.hi + size * error, unit=0.0)
    return Interval(low * (1 - np.sign(low) * error), high * (1 + np.sign(high) * error))


def _flushed(value: Interval, tiny: float) -> Interval:
    """With zero added to bounds that may underflow to it."""
    low, high = (value.lo > 0) & (value.lo < tiny), (value.hi < 0) & (value.hi > -tiny)
    if value.q or value.k or not (low.any() or high.any()):
        return value
    return dataclasses.replace(value, lo=np.where(low, 0.0, value.lo), hi=np.where(high, 0.0, value.hi))


_ROUNDED = frozenset(
    """add add_any sub mul div convert_element_type exp exp2 expm1 log log1p pow integer_pow sqrt rsqrt
    cbrt tanh logistic sin cos tan dot_general reduce_sum square erf erfc""".split()
)
