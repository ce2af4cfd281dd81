"""Frozen dataclasses that are JAX pytrees, as in ``flax.struct``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self, TypeVar, dataclass_transform, overload

import jax

from distaff.frontend.state_dict import (
    fields_from_state_dict,
    fields_to_state_dict,
    register_serialization_state,
)

T = TypeVar("T")


def field(pytree_node: bool = True, *, metadata: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """A dataclass field; with ``pytree_node=False`` it is static (part of the tree's structure, not a leaf)."""
    return dataclasses.field(metadata={**(metadata or {}), "pytree_node": pytree_node}, **kwargs)


def _replace(self: T, **updates: Any) -> T:
    """A copy with the given fields replaced."""
    return dataclasses.replace(self, **updates)  # type: ignore[type-var]


@overload
def dataclass(clz: type[T], **kwargs: Any) -> type[T]: ...
@overload
def dataclass(**kwargs: Any) -> Callable[[type[T]], type[T]]: ...
@dataclass_transform(frozen_default=True, field_specifiers=(field, dataclasses.field))
def dataclass(clz: type[T] | None = None, **kwargs: Any) -> type[T] | Callable[[type[T]], type[T]]:
    """Make a class a frozen dataclass, a pytree node, and give it ``replace(**updates)``.

    Fields made with ``field(pytree_node=False)`` are static and must be hashable; all others are children, and what
    ``serialization.to_state_dict`` keeps. ``kwargs``, such as ``kw_only=True``, are those of ``dataclasses.dataclass``.
    """
    if clz is None:
        return functools.partial(dataclass, **kwargs)
    if "_flax_dataclass" in clz.__dict__:
        return clz
    cls: Any = dataclasses.dataclass(**{"frozen": True, **kwargs})(clz)
    nodes = {f.name: f.metadata.get("pytree_node", True) for f in dataclasses.fields(cls)}
    data_fields = [name for name, is_node in nodes.items() if is_node]
    cls.replace = _replace
    cls._flax_dataclass = True
    jax.tree_util.register_dataclass(
        cls, data_fields=data_fields, meta_fields=[name for name, is_node in nodes.items() if not is_node]
    )
    register_serialization_state(
        cls,
        lambda x: fields_to_state_dict(x, data_fields),
        lambda x, state: x.replace(**fields_from_state_dict(x, state, data_fields)),
    )
    return cls  # type: ignore[no-any-return]


@dataclass_transform(frozen_default=True, field_specifiers=(field, dataclasses.field))
class PyTreeNode:
    """Base class that makes every subclass a ``struct.dataclass``."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__()
        dataclass(cls, **kwargs)

    def replace(self, **overrides: Any) -> Self:
        """A copy with the given fields replaced."""
        return dataclasses.replace(self, **overrides)  # type: ignore[type-var]
