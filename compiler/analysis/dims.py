"""The dimension table: for each primitive, where every operand dimension goes in the result.

This one table carries token axes through a program, tells where tokens would be mixed, and binds positions inside
attention to query or key. A primitive that is not in it is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distaff.compiler.ir import Dim, Node, Sym

TOUCHED = -1  # the operation mixes values along this dimension (reduced, contracted, sorted, cut, merged)
GONE = None  # a dimension of size 1 that has no counterpart in the result

DimMap = tuple[int | None, ...]
Shape = tuple[Dim, ...]
Rule = Callable[[dict[str, Any], list[Shape], Shape], list[DimMap]]

ELEMENTWISE = frozenset(
    """abs add add_any and asin acos atan asinh acosh atanh atan2 bitcast_convert_type cbrt ceil clamp
    convert_element_type cos cosh copy copy_p digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag
    integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not optimization_barrier or pow
    population_count real reduce_precision rem round rsqrt select_n shift_left shift_right_arithmetic
    shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor""".split()
)
STRUCTURAL = frozenset({"broadcast_in_dim", "reshape", "transpose", "squeeze", "expand_dims"})
REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin".split()
)
_ALONG_ONE = {
    "cumsum": "axis",
    "cummax": "axis",
    "cummin": "axis",
    "cumprod": "axis",
    "cumlogsumexp": "axis",
    "split": "axis",
    "sort": "dimension",
    "concatenate": "dimension",
}


def dim_map(node: Node) -> list[DimMap] | None:
    """For each operand, the result dimension of each of its dimensions, or None for an unknown primitive."""
    shapes = [v.type.shape for v in node.inputs]
    out = node.outputs[0].type.shape
    if node.op in ELEMENTWISE:
        return [tuple(range(len(s))) for s in shapes]
    if node.op in REDUCTIONS:
        return [_without(set(node.params["axes"]), len(shapes[0]), TOUCHED)]
    if node.op in _ALONG_ONE:
        axis = node.params[_ALONG_ONE[node.op]]
        return [tuple(TOUCHED if i == axis else i for i in range(len(s))) for s in shapes]
    rule = _RULES.get(node.op)
    return None if rule is None else rule(node.params, shapes, out)


def _without(removed: set[int], rank: int, mark: int | None) -> DimMap:
    result: list[int | None] = []
    position = 0
    for i in range(rank):
        result.append(mark if i in removed else position)
        position += i not in removed
    return tuple(result)


def _broadcast_in_dim(params: dict[str, Any], shapes: list[Shape], out: Shape) -> list[DimMap]:
    dims = params["broadcast_dimensions"]
    return [tuple(int(d) if size == out[int(d)] else GONE for size, d in zip(shapes[0], dims, strict=True))]


def _transpose(params: dict[str, Any], shapes: list[Shape], out: Shape) -> list[DimMap]:
    permutation = list(params["permutation"])
    return [tuple(permutation.index(i) for i in range(len(out)))]


def _squeeze(params: dict[str, Any], shapes: list[Shape], out: Shape) -> list[DimMap]:
    return [_without({int(d) for d in params["dimensions"]}, len(shapes[0]), GONE)]


def _stack(params: dict[str, Any], shapes: list[Shape], out: Shape) -> list[DimMap]:
    """Operands side by side along a new dimension."""
    axis = int(params["axis"])
    return [tuple(i + (i >= axis) for i in range(len(s))) for s in shapes]


def _expand_dims(params: dict[str, Any], shapes: list[Shape], out: Shape) -> list[DimMap]:
    added = {int(d) for d in params["dimensions"]}
    return [tuple(i for i in range(len(out)) if i not in added)]


def _reshape(params: dict[str, Any], shapes: list[Shape], out: Shape) -> list[DimMap]:
    """A dimension stays if the same size begins at the same offset on both sides; merged or split ones are touched."""
    starts = {(_product(out[:j]), d): j for j, d in enumerate(out) if d != 1}
    source = shapes[0]
    return [tuple(GONE if d == 1 else starts.get((_product(source[:i]), d), TOUCHED) for i, d in enumerate(source))]


def _product(dims: Shape) -> tuple[int, tuple[str, ...]]:
    """A product of dimensions as number and sorted symbolic factors, so that equal products compare equal."""
    number, symbols = 1, []
    for d in dims:
        if isinstance(d, Sym):
            if d.offset:
                symbols.append(str(d))
            else:
                number *= d.scale
                symbols.append(d.axis)
        else:
            number *= d
    return number, tuple(sorted(symbols))


def _dot_general(params: dict[str, Any], shapes: list[Shape], out: Shape) -> list[DimMap]:
    (left_contract, right_contract), (left_batch, right_batch) = params["dimension_numbers"]
    position = len(left_batch)
    maps: list[DimMap] = []
    for shape, contract, batch in zip(shapes, (left_contract, right_contract), (left_batch, right_batch), strict=True):
        result: list[int | None] = []
        for i in range(len(shape)):
            if i in batch:
                result.append(list(batch).index(i))
            elif i in contract:
                result.append(TOUCHED)
            else:
                result.append(position)
                position += 1
        maps.append(tuple(result))
    return maps


def _slice(params: dict[str, Any], shapes: list[Shape], out: Shape) -> list[DimMap]:
    strides = params["strides"] or (1,) * len(out)
    whole = zip(params["start_indices"], params["limit_indices"], strides, shapes[0], strict=True)
    return [tuple(i if (a, b, c) == (0, d, 1) else TOUCHED for i, (a, b, c, d) in enumerate(whole))]


def _dynamic_slice(params: dict[str, Any], shapes: list[Shape], out: Shape) -> list[DimMap]:
    kept: DimMap = tuple(i if d == o else TOUCHED for i, (d, o) in enumerate(zip(shapes[0], out, strict=True)))
    return [kept, *([()] * (len(shapes) - 1))]


def _pad(params: dict[str, Any], shapes: list[Shape], out: Shape) -> list[DimMap]:
    return [tuple(i if tuple(c) == (0, 0, 0) else TOUCHED for i, c in enumerate(params["padding_config"])), ()]


def _rev(params: dict[str, Any], shapes: list[Shape], out: Shape) -> list[DimMap]:
    return [tuple(TOUCHED if i in params["dimensions"] else i for i in range(len(out)))]


def _top_k(params: dict[str, Any], shapes: list[Shape], out: Shape) -> list[DimMap]:
    axis = params.get("axis", -1) % len(out)
    return [tuple(TOUCHED if i == axis else i for i in range(len(out)))]


def _gather(params: dict[str, Any], shapes: list[Shape], out: Shape) -> list[DimMap]:
    numbers = params["dimension_numbers"]
    operand = shapes[0]
    batch = [i for i in range(len(out)) if i not in numbers.offset_dims]
    result: list[int | None] = [TOUCHED] * len(operand)
    dropped = set(numbers.collapsed_slice_dims) | set(numbers.operand_batching_dims)
    kept = [i for i in range(len(operand)) if i not in dropped]
    for i, o in zip(kept, numbers.offset_dims, strict=True):
        if params["slice_sizes"][i] == operand[i] and i not in numbers.start_index_map:
            result[i] = o
    for i, b in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        result[i] = batch[b]
    return [tuple(result), (*batch, TOUCHED)]


def _iota(params: dict[str, Any], shapes: list[Shape], out: Shape) -> list[DimMap]:
    return []


_RULES: dict[str, Rule] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "stack": _stack,
    "expand_dims": _expand_dims,
    "reshape": _reshape,
    "dot_general": _dot_general,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "pad": _pad,
    "rev": _rev,
    "top_k": _top_k,
    "gather": _gather,
    "iota": _iota,
}


def register_dim_map(primitive: str, rule: Rule) -> None:
    """Teaches the table a primitive of the user's: ``rule(params, operand shapes, result shape) -> [DimMap]``.

    With it an opaque kernel (a Pallas call, an FFI call under a name of its own) can be served. A wrong rule makes
    wrong programs, which validation at compile time is likely, but not certain, to catch.
    """
    if primitive in _RULES or primitive in ELEMENTWISE or primitive in REDUCTIONS or primitive in _ALONG_ONE:
        raise ValueError(f"{primitive} has a dimension map already")
    _RULES[primitive] = rule
