"""Arithmetic, comparisons and conversions of variables, which act on their values."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

_BINARY = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "and_", "xor", "or_")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_UNARY: dict[str, Callable[[Any], Any]] = {
    "complex": complex,
    "int": int,
    "float": float,
    "index": operator.index,
    "trunc": math.trunc,
    "floor": math.floor,
    "ceil": math.ceil,
    "neg": operator.neg,
    "pos": operator.pos,
    "abs": abs,
    "invert": operator.invert,
}


def add_operators(cls: type) -> None:
    """Give a class with ``get_value`` the operators of its value; those in place raise NotImplementedError."""
    for name in _BINARY:
        short = name.rstrip("_")
        forward, reflected = _binary(getattr(operator, name), cls)
        setattr(cls, f"__{short}__", forward)
        setattr(cls, f"__r{short}__", reflected)
        setattr(cls, f"__i{short}__", _in_place)
    for name in _COMPARISONS:
        setattr(cls, f"__{name}__", _binary(getattr(operator, name), cls)[0])
    for name, function in _UNARY.items():
        setattr(cls, f"__{name}__", _unary(function))


def _binary(function: Callable[[Any, Any], Any], cls: type) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def operand(x: Any) -> Any:
        has_value: bool = isinstance(x, cls)
        return x.get_value() if has_value else x

    def forward(self: Any, other: Any) -> Any:
        return function(self.get_value(), operand(other))

    def reflected(self: Any, other: Any) -> Any:
        return function(operand(other), self.get_value())

    return forward, reflected


def _unary(function: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda self: function(self.get_value())


def _in_place(self: Any, other: Any) -> Any:
    raise NotImplementedError("Variables have no in-place operators. Use `variable[...] += x`.")
