"""Switches with the names that ``flax.config`` gives them, set from the environment (``FLAX_PROFILE=0``) or by name.

Only those that change something here exist; to set another is an error.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, Generic, NoReturn, TypeVar

T = TypeVar("T")

_BOOLS = dict.fromkeys(["y", "yes", "t", "true", "on", "1"], True) | dict.fromkeys(
    ["n", "no", "f", "false", "off", "0"], False
)


class Config:
    """The switches and their values: ``config.flax_profile``, ``config.update("flax_profile", False)``."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def _add(self, name: str, value: Any) -> None:
        if name in self._values:
            raise RuntimeError(f"Config option {name} already defined")
        self._values[name] = value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name, name=name, obj=self)
        return self._read(name)

    def _read(self, name: str) -> Any:
        if name not in self._values:
            raise AttributeError(f"Unrecognized config option: {name}", name=name, obj=self)
        return self._values[name]

    def update(self, name_or_holder: str | FlagHolder[Any], value: Any, /) -> None:
        """Set a switch; LookupError if there is none of that name."""
        name = name_or_holder.name if isinstance(name_or_holder, FlagHolder) else name_or_holder
        if name not in self._values:
            raise LookupError(f"Unrecognized config option: {name}. There are {', '.join(self._values)}.")
        self._values[name] = value

    @contextlib.contextmanager
    def temp_flip_flag(self, var_name: str, var_value: bool) -> Iterator[None]:
        """Set the switch ``flax_<var_name>`` inside a ``with`` block."""
        name = f"flax_{var_name}"
        before = getattr(self, name)
        self.update(name, var_value)
        try:
            yield
        finally:
            self.update(name, before)

    def __repr__(self) -> str:
        return "Config(" + ", ".join(f"\n  {name}={value!r}" for name, value in self._values.items()) + "\n)"


config = Config()


class FlagHolder(Generic[T]):
    """A switch as an object: its ``value`` is the present one."""

    def __init__(self, name: str, help: str) -> None:
        self.name = name
        self.__name__ = name.removeprefix("flax_")
        self.__doc__ = help

    def __bool__(self) -> NoReturn:
        raise TypeError(f"The flag {self.name} has no truth value; use {self.__name__}.value.")

    @property
    def value(self) -> T:
        """The present value."""
        return getattr(config, self.name)  # type: ignore[no-any-return]


def bool_flag(name: str, *, default: bool, help: str) -> FlagHolder[bool]:
    """Define a switch; the environment variable of its upper-case name overrides the default."""
    return _define(name, default, _as_bool, help)


def int_flag(name: str, *, default: int | None, help: str) -> FlagHolder[int]:
    """Define a number; the environment variable of its upper-case name overrides the default."""
    return _define(name, default, int, help)


def _define(name: str, default: Any, parse: Callable[[str], Any], help: str) -> FlagHolder[Any]:
    name = name.lower()
    text = os.environ.get(name.upper())
    try:
        config._add(name, default if text is None else parse(text))
    except (KeyError, ValueError) as error:
        raise ValueError(f"The environment variable {name.upper()} has the value {text!r}.") from error
    return FlagHolder(name, help)


def _as_bool(text: str) -> bool:
    return _BOOLS[text.lower()]


flax_profile = bool_flag(
    "flax_profile", default=True, help="Run module methods under jax.named_scope, for profiles; read at import."
)
flax_preserve_adopted_names = bool_flag(
    "flax_preserve_adopted_names", default=False, help="A module passed to another keeps its own name, if it has one."
)
flax_return_frozendict = bool_flag(
    "flax_return_frozendict", default=False, help="init and apply return FrozenDicts instead of dicts."
)
flax_fix_rng = bool_flag(
    "flax_fix_rng_separator",
    default=False,
    help="Fold paths into random keys so that ('ab', 'c') and ('a', 'bc') differ. Changes initial parameters.",
)
flax_use_orbax_checkpointing = bool_flag(
    "flax_use_orbax_checkpointing", default=True, help="save_checkpoint writes with Orbax; otherwise a msgpack file."
)
flax_always_shard_variable = bool_flag(
    "flax_always_shard_variable", default=True, help="What nnx.use_eager_sharding says where it was not called."
)
flax_hijax_variable = bool_flag(
    "flax_hijax_variable", default=False, help="What nnx.var_defaults says of hijax where it was not called."
)
nnx_graph_mode = bool_flag("nnx_graph_mode", default=True, help="What nnx.set_graph_mode says where it was not called.")
nnx_graph_updates = bool_flag(
    "nnx_graph_updates", default=True, help="What nnx.set_graph_updates says where it was not called."
)
