"""State dicts: any registered object as nested dicts of strings to leaves, and back into a target of the same shape.

Types register how they do it; struct dataclasses and ``FrozenDict`` do so themselves. Public in
``distaff.frontend.serialization``, apart from it so that what registers types needs no msgpack.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

ToStateDict = Callable[[Any], Any]
FromStateDict = Callable[[Any, Any], Any]


class _NamedTuple:
    """What all named tuples are registered as."""


class _Path(threading.local):
    """The names from the root of the target to what is being restored."""

    def __init__(self) -> None:
        self.names: list[str] = []


_registry: dict[type, tuple[ToStateDict, FromStateDict]] = {}
_path = _Path()


def current_path() -> str:
    """Where in the target the restoration is, for messages: names joined by slashes."""
    return "/".join(_path.names)


@contextlib.contextmanager
def _inside(name: str) -> Iterator[None]:
    _path.names.append(name)
    try:
        yield
    finally:
        _path.names.pop()


def _registered_type(target: Any) -> type:
    return _NamedTuple if isinstance(target, tuple) and hasattr(target, "_fields") else type(target)


def is_serializable(target: Any) -> bool:
    """Whether ``target``, a type or an instance of it, is registered; other values are leaves."""
    return (target if isinstance(target, type) else type(target)) in _registry


def register_serialization_state(
    ty: type, ty_to_state_dict: ToStateDict, ty_from_state_dict: FromStateDict, override: bool = False
) -> None:
    """Register how instances of ``ty`` become state dicts and are restored.

    Args:
        ty: the type.
        ty_to_state_dict: from an instance to a dict with string keys, whose values went through ``to_state_dict``.
        ty_from_state_dict: from a target instance and such a dict to a restored copy of the target.
        override: replace an earlier registration.

    Raises:
        ValueError: the type is registered, and ``override`` is False.
    """
    if ty in _registry and not override:
        raise ValueError(f"{ty.__name__} is already registered for serialization; pass override=True to replace that.")
    _registry[ty] = (ty_to_state_dict, ty_from_state_dict)


def to_state_dict(target: Any) -> Any:
    """The state of an object: nested dicts with string keys and the leaves as they are; a leaf is its own state.

    Raises:
        TypeError: a registered type's state has a key that is not a string.
    """
    handlers = _registry.get(_registered_type(target))
    if handlers is None:
        return target
    state = handlers[0](target)
    if isinstance(state, dict) and not all(isinstance(key, str) for key in state):
        raise TypeError(f"A state dict must have string keys only; that of {type(target).__name__} has {list(state)}.")
    return state


def from_state_dict(target: Any, state: Any, name: str = ".") -> Any:
    """A copy of ``target`` with the leaves of ``state``, which has the form that ``to_state_dict(target)`` has.

    Shapes and dtypes of leaves are not compared. ``name`` is what messages call this place.

    Raises:
        ValueError: names or sizes differ; the message says where.
    """
    handlers = _registry.get(_registered_type(target))
    if handlers is None:
        return state
    with _inside(name):
        return handlers[1](target, state)


def _listed(names: Iterable[str]) -> str:
    """Names as a set is written, in order."""
    return f"{{{', '.join(map(repr, sorted(names)))}}}"


def fields_to_state_dict(target: Any, names: Sequence[str]) -> dict[str, Any]:
    """The state of an object's attributes ``names``."""
    return {name: to_state_dict(getattr(target, name)) for name in names}


def fields_from_state_dict(target: Any, state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The restored attributes ``names`` of an object; ``state`` must have these and no other."""
    where = f"in state dict while restoring an instance of {type(target).__name__}, at path {current_path()}"
    for name in names:
        if name not in state:
            raise ValueError(f"Missing field {name} {where}")
    if unknown := state.keys() - set(names):
        raise ValueError(f'Unknown field(s) "{", ".join(sorted(unknown))}" {where}')
    return {name: from_state_dict(getattr(target, name), state[name], name) for name in names}


def dict_to_state(xs: Mapping[Any, Any]) -> dict[str, Any]:
    """The state of a mapping: its keys as text."""
    state = {str(key): to_state_dict(value) for key, value in xs.items()}
    if len(state) != len(xs):
        raise ValueError(f"Keys of a dict have the same text, so their state would be lost: {list(xs)}")
    return state


def dict_from_state(xs: Mapping[Any, Any], state: Mapping[str, Any]) -> dict[Any, Any]:
    """The restored items of a mapping; what the state has besides is left out."""
    missing = {str(key) for key in xs} - state.keys()
    if missing:
        raise ValueError(
            "The target dict keys and state dict keys do not match, target dict contains keys "
            f"{_listed(missing)} which are not present in state dict at path {current_path()}"
        )
    return {key: from_state_dict(value, state[str(key)], str(key)) for key, value in xs.items()}


def _items_to_state(xs: Sequence[Any]) -> dict[str, Any]:
    return {str(i): to_state_dict(x) for i, x in enumerate(xs)}


def _items_from_state(xs: Sequence[Any], state: Mapping[str, Any]) -> list[Any]:
    if len(state) != len(xs):
        raise ValueError(
            f"The size of the list and the state dict do not match, got {len(xs)} and {len(state)} at path "
            f"{current_path()}"
        )
    return [from_state_dict(x, state[str(i)], str(i)) for i, x in enumerate(xs)]


def _named_tuple_from_state(xs: Any, state: Mapping[str, Any]) -> Any:
    if state.keys() == {"name", "fields", "values"}:  # as Flax wrote named tuples before 2022
        state = {name: state["values"][i] for i, name in state["fields"].items()}
    if state.keys() != set(xs._fields):
        raise ValueError(
            "The field names of the state dict and the named tuple do not match, got "
            f"{_listed(state)} and {_listed(xs._fields)} at path {current_path()}"
        )
    return type(xs)(**fields_from_state_dict(xs, state, xs._fields))


def _partial_from_state(partial: Any, state: Mapping[str, Any]) -> jax.tree_util.Partial:
    fields = fields_from_state_dict(partial, state, ("args", "keywords"))
    return jax.tree_util.Partial(partial.func, *fields["args"], **fields["keywords"])


register_serialization_state(dict, dict_to_state, dict_from_state)
register_serialization_state(list, _items_to_state, _items_from_state)
register_serialization_state(tuple, _items_to_state, lambda xs, state: tuple(_items_from_state(xs, state)))
register_serialization_state(_NamedTuple, lambda xs: fields_to_state_dict(xs, xs._fields), _named_tuple_from_state)
register_serialization_state(
    jax.tree_util.Partial, lambda x: fields_to_state_dict(x, ("args", "keywords")), _partial_from_state
)
