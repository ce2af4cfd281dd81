"""Changed copies of nested, immutable state: say what changes where, and build the copy.

Works on dicts, FrozenDicts, lists, tuples, named tuples and dataclasses (such as ``TrainState``), nested in any way.
"""

from __future__ import annotations

import dataclasses
import enum
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from distaff.frontend.core.frozen_dict import FrozenDict
from distaff.frontend.errors import CursorFindError, TraverseTreeError

A = TypeVar("A")


class AccessType(enum.Enum):
    """How a child is reached from its parent: ``parent[key]`` or ``parent.key``."""

    ITEM = enum.auto()
    ATTR = enum.auto()


Step = tuple[Any, AccessType]
Path = tuple[Step, ...]


@dataclasses.dataclass(frozen=True)
class ParentKey(Generic[A]):
    """Where a cursor hangs below another."""

    parent: Cursor[A]
    key: Any
    access_type: AccessType


def is_named_tuple(obj: Any) -> bool:
    """Whether ``obj`` is an instance of a ``NamedTuple``."""
    return isinstance(obj, tuple) and hasattr(obj, "_fields") and hasattr(obj, "_replace")


def _children(obj: Any) -> tuple[AccessType, Iterable[tuple[Any, Any]]]:
    """The children of a container by key, and how they are reached; none for anything else."""
    if isinstance(obj, dict | FrozenDict):
        return AccessType.ITEM, obj.items()
    if is_named_tuple(obj):
        return AccessType.ATTR, obj._asdict().items()
    if isinstance(obj, list | tuple):
        return AccessType.ITEM, enumerate(obj)
    if dataclasses.is_dataclass(obj):
        return AccessType.ATTR, [(f.name, getattr(obj, f.name)) for f in dataclasses.fields(obj) if f.init]
    return AccessType.ITEM, ()


def _with_changes(obj: Any, changes: dict[Any, Any]) -> Any:
    """A copy of a container with some children replaced."""
    if isinstance(obj, FrozenDict):
        return obj.copy(changes)
    if is_named_tuple(obj):
        return obj._replace(**changes)
    if isinstance(obj, dict):
        return {**obj, **changes} if type(obj) is dict else _assigned(obj.copy(), changes)
    if isinstance(obj, list | tuple):
        return type(obj)(_assigned(list(obj), changes))
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return dataclasses.replace(obj, **changes)
    return obj


def _assigned(container: Any, changes: dict[Any, Any]) -> Any:
    for key, value in changes.items():
        container[key] = value
    return container


def _traverse_tree(
    path: Path,
    obj: Any,
    *,
    update_fn: Callable[[str, Any], Any] | None = None,
    cond_fn: Callable[[str, Any], bool] | None = None,
) -> Iterator[Any]:
    """The outermost places that ``update_fn`` changes, as ``(path, new value)``, or where ``cond_fn`` holds, as paths.

    The object itself, at the empty path, is not asked about. ``TraverseTreeError``: not exactly one function is given.
    """
    if (update_fn is None) == (cond_fn is None):
        raise TraverseTreeError(update_fn, cond_fn)
    if path:
        text = "/".join(str(key) for key, _ in path)
        if update_fn is not None:
            new = update_fn(text, obj)
            if new is not obj:
                yield path, new
                return
        elif cond_fn is not None and cond_fn(text, obj):
            yield path
            return
    access, children = _children(obj)
    for key, child in children:
        yield from _traverse_tree((*path, (key, access)), child, update_fn=update_fn, cond_fn=cond_fn)


class Cursor(Generic[A]):
    """A place in an object, through which changes to a copy of the object are noted; see ``cursor``.

    Operators and comparisons are those of the value at the place.
    """

    _obj: A
    _parent_key: ParentKey[Any] | None
    _changes: dict[Any, Cursor[Any]]

    def __init__(self, obj: A, parent_key: ParentKey[Any] | None) -> None:
        self.__dict__.update(_obj=obj, _parent_key=parent_key, _changes={})

    @property
    def _root(self) -> Cursor[Any]:
        return self if self._parent_key is None else self._parent_key.parent._root

    @property
    def _path(self) -> str:
        """The place as an expression: ``.params['dense']['kernel']``."""
        if self._parent_key is None:
            return ""
        at = self._parent_key
        step = f"[{at.key!r}]" if at.access_type is AccessType.ITEM else f".{at.key}"
        return at.parent._path + step

    def _child(self, key: Any, value: Any, access: AccessType) -> Cursor[Any]:
        child: Cursor[Any] = Cursor(value, ParentKey(self, key, access))
        self._changes[key] = child
        return child

    def _at(self, path: Path) -> Cursor[Any]:
        place: Cursor[Any] = self
        for key, access in path:
            place = place[key] if access is AccessType.ITEM else getattr(place, key)
        return place

    def __getitem__(self, key: Any) -> Cursor[Any]:
        obj: Any = self._obj
        if key in self._changes:
            return self._changes[key]
        if not hasattr(obj, "__getitem__"):
            raise TypeError(f"Cannot index into {obj}: it has no items.")
        if isinstance(obj, Mapping) and key not in obj:
            raise KeyError(f"Key {key} not found in {obj}")
        if is_named_tuple(obj):
            return getattr(self, obj._fields[key])  # type: ignore[no-any-return]
        return self._child(key, obj[key], AccessType.ITEM)

    def __getattr__(self, name: str) -> Cursor[Any]:
        if name in self._changes:
            return self._changes[name]
        if not hasattr(self._obj, name):
            raise AttributeError(f"Attribute {name} not found in {self._obj}", name=name, obj=self)
        return self._child(name, getattr(self._obj, name), AccessType.ATTR)

    def __setitem__(self, key: Any, value: Any) -> None:
        obj: Any = self._obj
        if is_named_tuple(obj):
            setattr(self, obj._fields[key], value)
        else:
            self._child(key, value, AccessType.ITEM)

    def __setattr__(self, name: str, value: Any) -> None:
        self._child(name, value, AccessType.ATTR)

    def set(self, value: Any) -> Any:
        """The whole object, with ``value`` here and all changes noted so far."""
        if self._parent_key is None:
            return value
        at = self._parent_key
        at.parent._child(at.key, value, at.access_type)
        return self._root.build()

    def build(self) -> A:
        """A copy of the object at this place with the changes noted at and below it; the original is unchanged."""
        changes = {key: child.build() for key, child in self._changes.items()}
        return _with_changes(self._obj, changes)  # type: ignore[no-any-return]

    def apply_update(self, update_fn: Callable[[str, Any], Any]) -> Cursor[A]:
        """Note a change wherever ``update_fn(path, value)`` returns something else than ``value``; return this cursor.

        Paths are like ``"params/dense/kernel"``. What lies below a changed value is not visited.
        """
        for path, value in _traverse_tree((), self._obj, update_fn=update_fn):
            parent, (key, access) = self._at(path[:-1]), path[-1]
            parent._child(key, value, access)
        return self

    def find(self, cond_fn: Callable[[str, Any], bool]) -> Cursor[Any]:
        """The one place where ``cond_fn(path, value)`` is true.

        Raises:
            CursorFindError: there is none, or more than one.
        """
        found = self.find_all(cond_fn)
        first, second = next(found, None), next(found, None)
        if first is None or second is not None:
            raise CursorFindError(first, second)
        return first

    def find_all(self, cond_fn: Callable[[str, Any], bool]) -> Iterator[Cursor[Any]]:
        """The outermost places where ``cond_fn(path, value)`` is true."""
        for path in _traverse_tree((), self._obj, cond_fn=cond_fn):
            yield self._at(path)

    def __str__(self) -> str:
        return str(self._obj)

    def __repr__(self) -> str:
        def hang(prefix: str, text: str) -> str:
            return prefix + text.replace("\n", "\n" + " " * len(prefix))

        changes = ",\n".join(hang(f"    {key!r}: ", repr(child)) for key, child in self._changes.items())
        body = f"{{\n{changes}\n  }}" if changes else "{}"
        obj = repr(self._obj).replace("\n", "\n  ")
        return f"Cursor(\n  _obj={obj},\n  _changes={body}\n)"

    def _indices(self, method: str) -> range:
        if not isinstance(self._obj, tuple | list):
            raise NotImplementedError(
                f"{method} method only implemented for tuples and lists, not type {type(self._obj)}"
            )
        return range(len(self._obj))

    def __len__(self) -> int:
        return len(self._obj)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Cursor[Any]]:
        return (self[i] for i in self._indices("__iter__"))

    def __reversed__(self) -> Iterator[Cursor[Any]]:
        return (self[i] for i in reversed(self._indices("__reversed__")))

    def __round__(self, ndigits: int | None = None) -> Any:
        return round(self._obj, ndigits)  # type: ignore[call-overload]


def _add_operators() -> None:
    """Give cursors the operators of their values."""

    def of_value(operation: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, *others: operation(self._obj, *others)

    def reflected(operation: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, other: operation(other, self._obj)

    arithmetic = "add sub mul matmul truediv floordiv mod pow lshift rshift and_ xor or_".split()
    binary = {name.rstrip("_"): getattr(operator, name) for name in arithmetic} | {"divmod": divmod}
    for name, operation in binary.items():
        setattr(Cursor, f"__{name}__", of_value(operation))
        setattr(Cursor, f"__r{name}__", reflected(operation))
    for name in "neg pos abs invert lt le eq ne gt ge".split():
        setattr(Cursor, f"__{name}__", of_value(getattr(operator, name)))


_add_operators()


def cursor(obj: A) -> Cursor[A]:
    """A cursor at ``obj``. Index it, read its attributes, assign to them; then ``build`` the changed copy.

    >>> cursor({"a": 1, "b": (2, 3)})["b"][0].set(10)
    {'a': 1, 'b': (10, 3)}
    >>> c = cursor(state)
    >>> c.params["dense"]["bias"] = jnp.zeros(4)
    >>> c.step = 0
    >>> state = c.build()
    >>> frozen = cursor(params).apply_update(lambda path, x: jax.lax.stop_gradient(x) if "encoder" in path else x)
    """
    return Cursor(obj, None)
