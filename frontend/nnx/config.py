"""Settings of this thread or of a ``with`` block: graph mode, graph updates, eager sharding, kinds of variables."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, ClassVar, TypeVar

from distaff.frontend.configurations import config

_F = TypeVar("_F", bound=Callable[..., Any])


_values = threading.local()  # those that this thread has set
_FLAGS = {  # where the others are
    "graph_mode": "nnx_graph_mode",
    "graph_updates": "nnx_graph_updates",
    "eager_sharding": "flax_always_shard_variable",
    "hijax": "flax_hijax_variable",
}


def current(name: str) -> bool:
    """The value of a setting that holds here."""
    value = getattr(_values, name, None)
    return _default(name) if value is None else value


def _default(name: str) -> bool:
    return name in _FLAGS and config._read(_FLAGS[name])


def _assign(changes: Mapping[str, bool | None]) -> dict[str, bool | None]:
    """Set values, or with None the default; gives what was set before."""
    before = {name: getattr(_values, name, None) for name in changes}
    for name, value in changes.items():
        if value is not None:
            setattr(_values, name, value)
        elif hasattr(_values, name):
            delattr(_values, name)
    return before


class _Setting:
    """Sets values when it is made; as a context manager until the end of the ``with`` block; also a decorator."""

    def __init__(self, changes: Mapping[str, bool]) -> None:
        self._changes = changes
        self._before = _assign(changes)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _assign(self._before)

    def __call__(self, f: _F) -> _F:
        """``f`` with the values set while it runs, and nowhere else."""
        _assign(self._before)

        @functools.wraps(f)
        def with_setting(*args: Any, **kwargs: Any) -> Any:
            before = _assign(self._changes)
            try:
                return f(*args, **kwargs)
            finally:
                _assign(before)

        return with_setting  # type: ignore[return-value]


class _Switch(_Setting):
    _name: ClassVar[str]

    def __init_subclass__(cls, name: str) -> None:
        cls._name = name

    def __init__(self, value: bool, /) -> None:
        super().__init__({self._name: value})

    @classmethod
    def current_value(cls) -> bool:
        """The value that holds here."""
        return current(cls._name)

    @classmethod
    def get_default(cls) -> bool:
        """The value where none was set: that of ``flax.config``."""
        return _default(cls._name)


class set_graph_mode(_Switch, name="graph_mode"):
    """Whether functions with ``graph=None`` follow shared references and cycles (True), or see plain trees."""


class set_graph_updates(_Switch, name="graph_updates"):
    """Whether transforms with ``graph_updates=None`` pass changes of structure on to the objects they were given."""


class use_eager_sharding(_Switch, name="eager_sharding"):
    """Whether variables with ``out_sharding`` are laid out on the mesh when they are made."""


def using_eager_sharding() -> bool:
    """Whether variables with ``out_sharding`` are laid out on the mesh when they are made."""
    return use_eager_sharding.current_value()


@dataclasses.dataclass(frozen=True)
class VarDefaults(Mapping[str, bool]):
    """What variables are made with where the constructor is not told."""

    hijax: bool
    ref: bool

    def __getitem__(self, key: str) -> bool:
        return vars(self)[key]  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        return iter(vars(self))

    def __len__(self) -> int:
        return len(vars(self))


def var_defaults(*, hijax: bool | None = None, ref: bool | None = None) -> VarDefaults | _Setting:
    """What variables are made with where the constructor is not told; with arguments, sets it.

    >>> with nnx.var_defaults(ref=True):  # also a decorator
    ...     model = Model(rngs)

    Args:
        hijax: make variables that JAX's own transforms may change: see ``nnx.Variable``.
        ref: keep values in mutable arrays.
    """
    changes = {name: value for name, value in (("hijax", hijax), ("ref", ref)) if value is not None}
    return _Setting(changes) if changes else VarDefaults(current("hijax"), current("ref"))
