"""``FrozenDict``: an immutable, hashable dict of dicts that JAX treats as a pytree node like ``dict``."""

from __future__ import annotations

from collections.abc import Hashable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Any, TypeVar

import jax

from distaff.frontend import state_dict

K = TypeVar("K")
V = TypeVar("V")


class FrozenKeysView(KeysView[K]):
    """The keys of a ``FrozenDict``."""

    def __repr__(self) -> str:
        return f"frozen_dict_keys({list(self)})"


class FrozenValuesView(ValuesView[V]):
    """The values of a ``FrozenDict``."""

    def __repr__(self) -> str:
        return f"frozen_dict_values({list(self)})"


class FrozenDict(Mapping[K, V]):
    """An immutable mapping; dicts inside it read as ``FrozenDict`` too. Build one with ``freeze``."""

    __slots__ = ("_dict", "_hash")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._dict: dict[K, Any] = {key: _thaw(value) for key, value in dict(*args, **kwargs).items()}
        self._hash: int | None = None

    @classmethod
    def _view(cls, plain: dict[Any, Any]) -> FrozenDict[Any, Any]:
        """Wrap a dict of plain dicts, which nobody else may change, without a copy."""
        view = cls.__new__(cls)
        view._dict = plain
        view._hash = None
        return view

    def __getitem__(self, key: K) -> V:
        value = self._dict[key]
        return self._view(value) if isinstance(value, dict) else value  # type: ignore[return-value]

    def __setitem__(self, key: K, value: V) -> None:
        raise ValueError("FrozenDict is immutable. Make a changed copy: frozen.copy({key: value}).")

    def __contains__(self, key: object) -> bool:
        return key in self._dict

    def __iter__(self) -> Iterator[K]:
        return iter(self._dict)

    def __len__(self) -> int:
        return len(self._dict)

    def __repr__(self) -> str:
        return f"FrozenDict({pretty_repr(self._dict)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenDict, (self.unfreeze(),)

    def __hash__(self) -> int:
        if self._hash is None:
            combined = 0
            for item in self.items():
                combined ^= hash(item)
            self._hash = combined
        return self._hash

    def keys(self) -> KeysView[K]:
        """A view of the keys."""
        return FrozenKeysView(self)

    def values(self) -> ValuesView[V]:
        """A view of the values, dicts as ``FrozenDict``."""
        return FrozenValuesView(self)

    def items(self) -> ItemsView[K, V]:
        """A view of the items, dicts as ``FrozenDict``."""
        return ItemsView(self)

    def copy(self, add_or_replace: Mapping[K, V] | None = None) -> FrozenDict[K, V]:
        """A copy with the entries of ``add_or_replace`` added or replaced."""
        return type(self)({**self, **(add_or_replace or {})})

    def pop(self, key: K) -> tuple[FrozenDict[K, V], V]:
        """A copy without ``key``, and its value."""
        return type(self)({k: v for k, v in self._dict.items() if k != key}), self[key]

    def unfreeze(self) -> dict[K, Any]:
        """A plain dict of plain dicts with the same leaves."""
        return unfreeze(self)  # type: ignore[no-any-return]

    def pretty_repr(self, num_spaces: int = 4) -> str:
        """The contents, one entry a line."""
        return f"FrozenDict({pretty_repr(self._dict, num_spaces)})"

    def tree_flatten_with_keys(self) -> tuple[tuple[Any, ...], Hashable]:
        """The children in order of their keys, as ``jax.tree_util`` asks for them."""
        keys = tuple(sorted(self._dict))  # type: ignore[type-var]
        return tuple((jax.tree_util.DictKey(key), self._dict[key]) for key in keys), keys

    def tree_flatten(self) -> tuple[tuple[Any, ...], Hashable]:
        """The children in order of their keys, without the keys."""
        keys = tuple(sorted(self._dict))  # type: ignore[type-var]
        return tuple(self._dict[key] for key in keys), keys

    @classmethod
    def tree_unflatten(cls, keys: tuple[Any, ...], values: tuple[Any, ...]) -> FrozenDict[Any, Any]:
        """The inverse of ``tree_flatten``."""
        return cls._view(dict(zip(keys, values, strict=True)))


jax.tree_util.register_pytree_with_keys_class(FrozenDict)
state_dict.register_serialization_state(
    FrozenDict,
    lambda xs: state_dict.dict_to_state(xs._dict),
    lambda xs, state: FrozenDict(state_dict.dict_from_state(xs._dict, state)),
)


def _thaw(value: Any) -> Any:
    """A private copy of the dicts in ``value``, all of them plain; leaves are shared."""
    if isinstance(value, FrozenDict):
        return value._dict
    if isinstance(value, dict):
        return {key: _thaw(item) for key, item in value.items()}
    return value


def freeze(xs: Mapping[Any, Any]) -> FrozenDict[Any, Any]:
    """An immutable copy of a dict of dicts."""
    return FrozenDict(xs)


def unfreeze(x: Any) -> Any:
    """A mutable copy of a (frozen) dict of dicts, with the same leaves; other values are returned as they are."""
    if isinstance(x, FrozenDict):
        x = x._dict
    if isinstance(x, dict):
        return {key: unfreeze(value) for key, value in x.items()}
    return x


def copy(x: Mapping[str, Any], add_or_replace: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """A copy of a dict or ``FrozenDict``, of the same type, with entries added or replaced."""
    if isinstance(x, FrozenDict):
        return x.copy(add_or_replace)
    if isinstance(x, dict):
        return {**unfreeze(x), **(add_or_replace or {})}
    raise TypeError(f"Expected a FrozenDict or dict, got {type(x)}")


def pop(x: Mapping[str, Any], key: str) -> tuple[Mapping[str, Any], Any]:
    """A copy of a dict or ``FrozenDict`` without ``key``, and its value."""
    if isinstance(x, FrozenDict):
        return x.pop(key)
    if isinstance(x, dict):
        rest = unfreeze(x)
        value = rest.pop(key)
        return rest, value
    raise TypeError(f"Expected a FrozenDict or dict, got {type(x)}")


def pretty_repr(x: Any, num_spaces: int = 4) -> str:
    """A dict of dicts with one entry a line."""
    if isinstance(x, FrozenDict):
        return x.pretty_repr(num_spaces)
    if not isinstance(x, dict):
        return repr(x)
    if not x:
        return "{}"
    lines = "".join(f"{key}: {pretty_repr(value, num_spaces)},\n" for key, value in x.items())
    indent = " " * num_spaces
    return "{\n" + "".join(f"{indent}{line}\n" for line in lines.splitlines()) + "}"
