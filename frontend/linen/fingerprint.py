"""What a module's behaviour depends on, as a hashable value: equal fingerprints allow ``nn.jit`` to reuse a trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from distaff.frontend.core.filters import DenyList
from distaff.frontend.core.scope import Scope, Variable
from distaff.frontend.linen.attributes import PLAIN_TYPES
from distaff.frontend.linen.module import Module
from distaff.frontend.linen.module_base import ModuleState
from distaff.frontend.state_dict import is_serializable, to_state_dict


@dataclasses.dataclass(frozen=True)
class _HashableProxy:
    """Stands for a module in the keys of compiled code: equal for equal fingerprints, and hashed once."""

    fingerprint: Any
    hash_key: int

    @classmethod
    def from_module(cls, module: Module | Variable[Any]) -> _HashableProxy:
        """The fingerprint of a module: its configuration, and its state and scope where they change what it does.

        Raises:
            ValueError: a field is not hashable; the message names it.
        """
        fingerprint = _fingerprint(module, (), {})
        return cls(fingerprint, hash(fingerprint))

    def __hash__(self) -> int:
        return self.hash_key


def _fingerprint(x: Any, path: tuple[str, ...], seen: dict[int, int]) -> Any:
    if type(x) in PLAIN_TYPES:
        return x
    if isinstance(x, Module):
        return _of_module(x, path, seen)
    if isinstance(x, Variable):
        return Variable, x.collection, x.name, x.unbox
    if isinstance(x, DenyList):
        return DenyList, _fingerprint(x.deny, path, seen)
    if isinstance(x, Mapping):
        return tuple((key, _fingerprint(value, (*path, str(key)), seen)) for key, value in x.items())
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        fields = [f.name for f in dataclasses.fields(x) if hasattr(x, f.name)]
        return type(x), tuple(_fingerprint(getattr(x, name), (*path, name), seen) for name in fields)
    if isinstance(x, set | frozenset):
        return type(x), frozenset(x)
    if isinstance(x, np.ndarray):
        return x.shape, str(x.dtype), x.tobytes()
    if isinstance(x, list | tuple):
        return type(x), tuple(_fingerprint(item, (*path, str(i)), seen) for i, item in enumerate(x))
    if is_serializable(x):
        return type(x), _fingerprint(to_state_dict(x), path, seen)
    if not _is_hashable(x):
        raise ValueError(
            f"Value at {'/'.join(path)!r} is not hashable, and nn.jit needs to compare modules: {x!r} of type "
            f"{type(x).__name__}. Use a hashable value, or pass it as an argument."
        )
    return x


def _is_hashable(x: Any) -> bool:
    try:
        hash(x)
    except TypeError:
        return False
    return True


def _of_module(module: Module, path: tuple[str, ...], seen: dict[int, int]) -> Any:
    if id(module) in seen:
        return type(module), seen[id(module)]
    seen[id(module)] = len(seen)
    fields = tuple((name, _fingerprint(getattr(module, name), (*path, name), seen)) for name in module._config_fields)
    return type(module), fields, _of_state(module._state), _of_scope(module.scope, (*path, "scope"), seen)


def _of_state(state: ModuleState) -> Any:
    flags = (state.in_compact_method, state.in_setup, state.setup_called, state.is_initialized)
    return flags, tuple(state.autoname_cursor.items())


def _of_scope(scope: Scope | None, path: tuple[str, ...], seen: dict[int, int]) -> Any:
    if scope is None:
        return None
    reserved = tuple((name, frozenset(cols)) for name, cols in scope.reservations.items())
    drawn = tuple(scope.key_counters.flat().items())
    return _fingerprint(scope.mutable, path, seen), _fingerprint(scope.flags, path, seen), drawn, reserved
