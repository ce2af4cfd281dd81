"""Metadata and hooks that initialisers give to the variables made of their values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from distaff.frontend.core import meta

A = TypeVar("A")
PARTITION_NAME = meta.PARTITION_NAME
HOOKS = ("on_get_value", "on_set_value", "on_create_value", "on_add_axis", "on_remove_axis")


@dataclasses.dataclass
class VariableMetadata(Generic[A]):
    """A value with the metadata and hooks that the variable made of it gets; what ``with_metadata`` returns."""

    raw_value: A
    on_set_value: tuple[Callable[..., Any], ...] = ()
    on_get_value: tuple[Callable[..., Any], ...] = ()
    on_create_value: tuple[Callable[..., Any], ...] = ()
    on_add_axis: tuple[Callable[..., Any], ...] = ()
    on_remove_axis: tuple[Callable[..., Any], ...] = ()
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def as_metadata(self) -> dict[str, Any]:
        """Metadata and hooks in one dict, as a variable keeps them."""
        hooks = {name: getattr(self, name) for name in HOOKS}
        return {**self.metadata, **{name: hook for name, hook in hooks.items() if hook}}


def as_tuple(hooks: Any) -> Sequence[Callable[..., Any]]:
    """One hook or several as several."""
    return hooks if isinstance(hooks, tuple | list) else (hooks,)


def with_metadata(
    initializer: Any,
    on_set_value: Any = (),
    on_get_value: Any = (),
    on_create_value: Any = (),
    on_add_axis: Any = (),
    on_remove_axis: Any = (),
    **metadata: Any,
) -> Any:
    """Wrap an initialiser so that a variable made of its value gets this metadata and these hooks.

    A hook is ``hook(variable, value) -> value``, for axes ``hook(variable, index, name)``; one or several each.
    """
    given = (on_get_value, on_set_value, on_create_value, on_add_axis, on_remove_axis)
    hooks: Any = {name: tuple(as_tuple(hook)) for name, hook in zip(HOOKS, given, strict=True)}

    def init(*args: Any, **kwargs: Any) -> VariableMetadata[Any]:
        return VariableMetadata(initializer(*args, **kwargs), **hooks, metadata=metadata)

    return init


def with_current_names(metadata: dict[str, Any]) -> dict[str, Any]:
    """Older names of ``out_sharding`` replaced."""
    for old in ("sharding", "sharding_names"):
        if old in metadata:
            metadata["out_sharding"] = metadata.pop(old)
    return metadata
