"""Settings of this process or of a ``with`` block: graph mode, graph updates, eager sharding, mutable arrays."""

from __future__ import annotations

import dataclasses
import threading
from types import TracebackType
from typing import ClassVar


class _Setting:
    """A bool. Calling the class sets it; as a context manager, until the end of the ``with`` block, in this thread."""

    _default: ClassVar[bool]
    _local: ClassVar[threading.local]

    def __init_subclass__(cls, default: bool = True) -> None:
        cls._default = default
        cls._local = threading.local()

    def __init__(self, value: bool, /) -> None:
        self._before = self.get_default()
        self._value = value
        type(self)._default = value

    def __enter__(self) -> None:
        type(self)._default = self._before
        self.get_stack().append(self._value)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.get_stack().pop()

    @classmethod
    def get_stack(cls) -> list[bool]:
        """The values of the ``with`` blocks that this thread is in."""
        if not hasattr(cls._local, "stack"):
            cls._local.stack = []
        return cls._local.stack  # type: ignore[no-any-return]

    @classmethod
    def get_default(cls) -> bool:
        """The value outside ``with`` blocks."""
        return cls._default

    @classmethod
    def current_value(cls) -> bool:
        """The value that holds here."""
        stack = cls.get_stack()
        return stack[-1] if stack else cls._default


class set_graph_mode(_Setting):
    """Whether functions with ``graph=None`` follow shared references and cycles (True), or see plain trees."""


class set_graph_updates(_Setting):
    """Whether transforms with ``graph_updates=None`` pass changes of structure on to the objects they were given."""


class use_eager_sharding(_Setting):
    """Whether variables with ``out_sharding`` are laid out on the mesh when they are made."""


def using_eager_sharding() -> bool:
    """Whether variables with ``out_sharding`` are laid out on the mesh when they are made."""
    return use_eager_sharding.current_value()


@dataclasses.dataclass(frozen=True)
class VarDefaults:
    """What variables are made with where the constructor is not told."""

    hijax: bool = False
    ref: bool = False


class _Ref(_Setting, default=False):
    pass


def ref_by_default() -> bool:
    """Whether variables keep their values in mutable arrays if not told otherwise."""
    return _Ref.current_value()


def var_defaults(*, hijax: bool | None = None, ref: bool | None = None) -> VarDefaults | _Setting:
    """What variables are made with where the constructor is not told; with ``ref``, sets it, or for a ``with`` block.

    Raises:
        NotImplementedError: ``hijax=True``.
    """
    if hijax:
        raise NotImplementedError("Variables as JAX types of their own (hijax=True) are not supported; leave it out.")
    return VarDefaults(ref=ref_by_default()) if ref is None else _Ref(ref)
