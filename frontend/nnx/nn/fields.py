"""What layers share: how they make and read parameters, and settings that the constructor or the call may give."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

from distaff.frontend.core.initializer_shapes import ignores_key
from distaff.frontend.layers.dtypes import Array, Dtype
from distaff.frontend.layers.fields import Initializer
from distaff.frontend.nnx.pytrees import data
from distaff.frontend.nnx.rngs import Rngs
from distaff.frontend.nnx.variable_kinds import Param

A = TypeVar("A")
# Metadata of a parameter: names and values, as for ``nnx.Variable``.
Metadata: TypeAlias = Mapping[str, Any]
NO_METADATA: Metadata = MappingProxyType({})


def parameter(
    rngs: Rngs, init: Initializer, shape: tuple[int, ...], dtype: Dtype, metadata: Metadata = NO_METADATA
) -> Param[Array]:
    """A new parameter, initialised with the next key of the stream ``params``."""
    stream, key = rngs.params, None
    if ignores_key(init):
        stream.skip()
    else:
        key = stream()
    return Param(init(key, shape, dtype), **metadata)


def optional_parameter(
    used: bool,
    rngs: Rngs,
    init: Initializer,
    shape: tuple[int, ...],
    dtype: Dtype,
    metadata: Metadata = NO_METADATA,
) -> Any:
    """A new parameter, or None in its place, for an attribute that is data in either case."""
    return parameter(rngs, init, shape, dtype, metadata) if used else data(None)


def value_of(variable: Any) -> Any:
    """The value of a variable or array; None stays None."""
    return None if variable is None else variable[...]


def given(**options: Any) -> dict[str, Any]:
    """The options that are not None: functions that users put in place of JAX's need take only these."""
    return {name: option for name, option in options.items() if option is not None}


def first_from(*args: A | None, error_msg: str) -> A:
    """The first of the arguments that is not None; ValueError with this message if all are."""
    for arg in args:
        if arg is not None:
            return arg
    raise ValueError(error_msg)


def missing(layer: Any, setting: str) -> str:
    """What to say when neither the constructor nor the call was given a setting."""
    name = type(layer).__name__
    return (
        f"No `{setting}` argument was provided to {name}. Pass it to the constructor, {name}(..., {setting}=...), or "
        f"to the call, or call a view of the model: nnx.view(model, {setting}=...)."
    )
