"""The rules of this thread from logical to mesh axis names, and shardings by the names of a variable's axes.

Rules are pairs such as ``("embed", "model")``. Here a name is simply replaced, and one that no rule knows is taken for
a mesh axis; ``distaff.frontend.sharding`` assigns by priority.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
from jax.experimental.layout import Format
from jax.sharding import NamedSharding, PartitionSpec

from distaff.frontend.core import meta
from distaff.frontend.core.meta import AxisName

LogicalRules: TypeAlias = Sequence[tuple[str, AxisName]]


class _Context(threading.local):
    rules: LogicalRules = ()


_context = _Context()


def set_logical_axis_rules(rules: LogicalRules) -> None:
    """Set the rules of this thread."""
    _context.rules = rules


def get_logical_axis_rules() -> LogicalRules:
    """The rules of this thread."""
    return _context.rules


@contextlib.contextmanager
def logical_axis_rules(rules: LogicalRules) -> Iterator[None]:
    """Use ``rules`` inside the ``with`` block."""
    before = _context.rules
    _context.rules = rules
    try:
        yield
    finally:
        _context.rules = before


def composite_rules(rule1: LogicalRules | None, rule2: LogicalRules | None) -> LogicalRules:
    """Both sets of rules as one.

    Raises:
        ValueError: they map a name to different axes.
    """
    if not (rule1 and rule2):
        return rule1 or rule2 or ()
    rules = dict(rule1)
    for name, axes in rule2:
        if rules.setdefault(name, axes) != axes:
            raise ValueError(f"The rules for the axis {name!r} contradict each other: {rules[name]!r} and {axes!r}.")
    return tuple(rules.items())


def from_sharding_rules(sharding: tuple[AxisName, ...], sharding_rules: LogicalRules) -> tuple[AxisName, ...]:
    """The names in ``sharding`` replaced by the rules."""
    rules = dict(sharding_rules)
    return tuple(rules.get(str(axis), axis) if axis else axis for axis in sharding)


def map_sharding(f: Callable[[Any], Any], sharding: Any) -> Any:
    """Apply ``f`` to each axis name in a tuple, ``PartitionSpec``, ``NamedSharding`` or ``Format``."""
    if isinstance(sharding, PartitionSpec | tuple):
        return PartitionSpec(*map(f, sharding))
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, map_sharding(f, sharding.spec))
    if isinstance(sharding, Format):
        return Format(sharding.layout, map_sharding(f, sharding.sharding))
    raise TypeError(f"Expected a tuple of names, a PartitionSpec, NamedSharding or Format; got {sharding!r}.")


def get_mesh(sharding: Any) -> Any:
    """The mesh of a ``NamedSharding`` or ``Format``; None of names alone."""
    if isinstance(sharding, Format):
        return get_mesh(sharding.sharding)
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


def apply_rules(sharding: Any, sharding_rules: LogicalRules | None) -> Any:
    """The sharding with its names replaced by ``sharding_rules`` and the rules of this thread together."""
    rules = dict(composite_rules(get_logical_axis_rules(), sharding_rules))
    return map_sharding(lambda axis: rules.get(axis, axis), sharding)


def get_pspec(sharding: Any, sharding_rules: LogicalRules | None = None) -> Any:
    """As ``apply_rules``: of a tuple of names, the ``PartitionSpec``."""
    return apply_rules(sharding, sharding_rules)


def shard_value(value: Any, out_sharding: Any, sharding_rules: LogicalRules | None, mesh: Any) -> Any:
    """Lay ``value`` out by names, on ``mesh``, on that of ``out_sharding`` itself, or on that of ``jax.set_mesh``.

    Args:
        value: an array.
        out_sharding: names, ``PartitionSpec``, ``NamedSharding`` or ``Format``; if empty, ``value`` is returned.
        sharding_rules: what to replace the names by, besides the rules of this thread.
        mesh: the mesh, or None.

    Raises:
        ValueError: there is no mesh, there are two, or its axes are not all Auto or all Explicit.
    """
    if not out_sharding:
        return value
    sharding = apply_rules(out_sharding, sharding_rules)
    given, own = mesh or meta.get_global_mesh(), get_mesh(sharding)
    if given and own and given != own:
        raise ValueError(f"{out_sharding} is of another mesh than the current one, {given}.")
    mesh = own or given
    if mesh is None:
        raise ValueError(f"A mesh is needed to lay out a value as {out_sharding}: use jax.set_mesh, or pass one.")
    if isinstance(sharding, PartitionSpec):
        sharding = NamedSharding(mesh, sharding)
    if isinstance(sharding, Format) or mesh.are_all_axes_auto:
        return jax.lax.with_sharding_constraint(value, sharding)
    if mesh.are_all_axes_explicit:
        return jax.sharding.reshard(value, sharding)
    raise ValueError(f"The axes of a mesh must be all Auto or all Explicit, got {mesh.axis_types}.")
