"""Submodules inside attribute values: in lists, tuples, dicts and struct dataclasses, however nested."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import BuiltinFunctionType, FunctionType, NoneType
from typing import Any

from distaff.frontend.core.frozen_dict import FrozenDict
from distaff.frontend.linen.module_base import ModuleBase

# Types of most configuration values; they hold no modules, and to know it saves the walk.
PLAIN_TYPES = frozenset({int, float, bool, str, complex, NoneType, FunctionType, BuiltinFunctionType, type})


def map_modules(fn: Callable[[str, Any], Any], value: Any, suffix: str = "") -> Any:
    """Replace every module in ``value`` by ``fn(suffix, module)``, with lists as tuples and dicts as ``FrozenDict``.

    ``suffix`` is what the place adds to the attribute's name: ``_0`` in a list, ``_key`` in a dict, ``_0_key`` in a
    list of dicts.
    """
    if type(value) in PLAIN_TYPES:
        return value
    if isinstance(value, ModuleBase):
        return fn(suffix, value)
    if isinstance(value, Mapping):
        return _map_items(fn, value, suffix) if isinstance(value, dict | FrozenDict) else value
    if isinstance(value, list | tuple):
        places = getattr(value, "_fields", map(str, range(len(value))))
        items = _map_places(fn, dict(zip(places, value, strict=True)), suffix).values()
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if hasattr(value, "_flax_dataclass") and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value) if f.metadata.get("pytree_node", True)]
        return dataclasses.replace(value, **_map_places(fn, {name: getattr(value, name) for name in fields}, suffix))
    return value


def _map_items(fn: Callable[[str, Any], Any], value: Mapping[Any, Any], suffix: str) -> FrozenDict[Any, Any]:
    if len({str(key) for key in value}) < len(value):
        raise ValueError(f"Two keys of this attribute's dict have the same text, so names would clash: {list(value)}")
    return FrozenDict(_map_places(fn, value, suffix))


def _map_places(fn: Callable[[str, Any], Any], value: Mapping[Any, Any], suffix: str) -> dict[Any, Any]:
    """``value`` with its items mapped, visited by name in alphabetical order: the first place names a shared module."""
    mapped = {key: map_modules(fn, value[key], f"{suffix}_{key}") for key in sorted(value, key=str)}
    return {key: mapped[key] for key in value}


def attribute_text(value: Any) -> str:
    """A configuration value for display: functions and classes by name."""
    if callable(value) and not isinstance(value, ModuleBase) and getattr(value, "__name__", None):
        return str(value.__name__)
    return repr(value)
