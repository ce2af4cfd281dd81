"""Lists and dicts of modules, variables and constants, and ``Sequential``, which calls them one after the other."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, MutableSequence
from typing import Any, Generic, TypeVar, overload

from distaff.frontend.nnx.module import Module
from distaff.frontend.nnx.pytrees import STATUSES, data

A = TypeVar("A")


class List(Module, MutableSequence[A], Generic[A]):
    """A list that is a module; each item is data or static as an attribute would be.

    >>> self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.relu])
    """

    _length: int

    def __init__(self, items: Iterable[A] | None = None, /) -> None:
        self._length = 0
        for item in items or ():
            self.append(item)

    def append(self, value: A) -> None:
        """Add an item at the end."""
        setattr(self, str(self._length), value)
        self._length += 1

    def insert(self, index: int, value: A) -> None:
        """Add an item before another."""
        items = list(self)
        items.insert(index, value)
        self._replace(items)

    def _replace(self, items: list[Any]) -> None:
        """Have these items, each with the status of a new one."""
        for i in range(self._length):
            delattr(self, str(i))
        self._length = 0
        for item in items:
            self.append(item)

    def _index(self, index: int) -> str:
        if not -self._length <= index < self._length:
            raise IndexError(f"Index {index} is out of range for a list of {self._length} items.")
        return str(index % self._length)

    @overload
    def __getitem__(self, index: int) -> A: ...

    @overload
    def __getitem__(self, index: slice) -> list[A]: ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.__dict__[str(i)] for i in range(*index.indices(self._length))]
        return self.__dict__[self._index(index)]

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(index, slice):
            items = list(self)
            items[index] = value
            self._replace(items)
        else:
            setattr(self, self._index(index), value)

    def __delitem__(self, index: Any) -> None:
        items = list(self)
        del items[index]
        self._replace(items)

    def __iter__(self) -> Iterator[A]:
        attributes = self.__dict__
        return iter([attributes[str(i)] for i in range(self._length)])

    def __len__(self) -> int:
        return self._length

    def __eq__(self, other: object) -> bool:
        return isinstance(other, List) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


class Dict(Module, MutableMapping[str, A], Generic[A]):
    """A dict that is a module; its items are attributes.

    >>> self.heads = nnx.Dict(policy=nnx.Linear(4, 2, rngs=rngs), value=nnx.Linear(4, 1, rngs=rngs))
    """

    @overload
    def __init__(self, mapping: Mapping[str, A] | Iterable[tuple[str, A]], /) -> None: ...

    @overload
    def __init__(self, **kwargs: A) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name, value in dict(*args, **kwargs).items():
            setattr(self, name, value)

    def __getitem__(self, key: str) -> A:
        return self.__dict__[key]  # type: ignore[no-any-return]

    def __setitem__(self, key: str, value: A) -> None:
        setattr(self, key, value)

    def __delitem__(self, key: str) -> None:
        if key not in self.__dict__:
            raise KeyError(key)
        delattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter([key for key in self.__dict__ if key != STATUSES])

    def __len__(self) -> int:
        return len(self.__dict__) - (STATUSES in self.__dict__)

    __hash__ = Module.__hash__  # equality is that of mappings


class Sequential(Module):
    """Calls ``fns`` one after the other, each with what the one before returned.

    A tuple is passed on as positional arguments, a dict as keyword arguments. ``rngs`` goes to those that take it.
    """

    def __init__(self, *fns: Any) -> None:
        self.layers = data(List(fns))

    def __call__(self, *args: Any, rngs: Any = None, **kwargs: Any) -> Any:
        """The last result; without layers what was given: the argument, the tuple of arguments, or the dict."""
        result: Any = args[0] if len(args) == 1 else args or kwargs or None
        for i, fn in enumerate(self.layers):
            if not callable(fn):
                raise TypeError(f"Layer {i} of nnx.Sequential cannot be called: {fn!r}.")
            if i > 0:
                args = () if isinstance(result, dict) else result if isinstance(result, tuple) else (result,)
                kwargs = result if isinstance(result, dict) else {}
            if rngs is not None and _takes_rngs(fn):
                kwargs = {**kwargs, "rngs": rngs}
            result = fn(*args, **kwargs)
        return result


def _takes_rngs(fn: Any) -> bool:
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return False
    return "rngs" in parameters
