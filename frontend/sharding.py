"""Logical axis names, and the rules that map them to the axes of a mesh.

Models name dimensions by meaning (``"embed"``, ``"heads"``); rules such as ``[("heads", "model"), ("embed", None)]``
say how they lie on the mesh of the day. Public as ``nn.logical_axis_rules`` and so on.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from distaff.frontend import struct
from distaff.frontend.core import meta
from distaff.frontend.core.meta import LogicalNames
from distaff.frontend.core.spmd import LogicalRules as LogicalRules
from distaff.frontend.core.spmd import get_logical_axis_rules as get_logical_axis_rules
from distaff.frontend.core.spmd import logical_axis_rules as logical_axis_rules
from distaff.frontend.core.spmd import set_logical_axis_rules as set_logical_axis_rules


# What a dimension is before a rule has assigned it. None would say "replicated".
class _Unassigned(enum.Enum):
    UNASSIGNED = "UnassignedAxis"


_UNASSIGNED = _Unassigned.UNASSIGNED


def _mesh_names(axes: Any) -> set[Any]:
    """The mesh axes in one or many assignments."""
    return set(jax.tree.leaves(axes)) - {None, PartitionSpec.UNCONSTRAINED, _UNASSIGNED}


def _assign(names: Sequence[Any] | None, rules: LogicalRules | None) -> list[Any] | None:
    """The mesh axes of each dimension; each rule applies once, and no mesh axis is used twice."""
    if names is None:
        return None
    rules = get_logical_axis_rules() if rules is None else rules
    if not isinstance(rules, tuple | list):
        raise ValueError(f"Axis rules are a list of (logical name, mesh axes) pairs, got {type(rules)}: {rules!r}")
    repeated = {name for name in names if isinstance(name, str) and list(names).count(name) > 1}
    if repeated:
        raise ValueError(f"Dimension names {sorted(repeated)} occur more than once in {tuple(names)}; rename one.")
    result: list[Any] = [_UNASSIGNED if isinstance(name, str) else name for name in names]
    for name, mesh_axes in rules:
        if name in names:
            position = list(names).index(name)
            if result[position] is _UNASSIGNED and not _mesh_names(mesh_axes) & _mesh_names(result):
                result[position] = mesh_axes
    return result


def logical_to_mesh_axes(
    array_dim_names: Sequence[str | None] | None, rules: LogicalRules | None = None
) -> PartitionSpec | None:
    """The mesh axes of an array whose dimensions have these logical names.

    Rules are tried in order; a rule whose mesh axis is already taken by another dimension of the array is passed over,
    and a dimension that no rule fits is replicated.

    Args:
        array_dim_names: one name (or None) a dimension.
        rules: pairs of logical name and mesh axes; by default those of the surrounding ``logical_axis_rules``.

    Raises:
        ValueError: a name occurs twice, or the rules are not a list of pairs.
    """
    axes = _assign(array_dim_names, rules)
    return None if axes is None else PartitionSpec(*(None if axis is _UNASSIGNED else axis for axis in axes))


def logical_to_mesh(tree: Any, rules: LogicalRules | None = None) -> Any:
    """Map ``logical_to_mesh_axes`` over the ``PartitionSpec`` leaves of a tree."""
    return jax.tree.map(
        lambda names: logical_to_mesh_axes(names, rules), tree, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )


def logical_to_mesh_sharding(tree: Any, mesh: jax.sharding.Mesh, rules: LogicalRules | None = None) -> Any:
    """As ``logical_to_mesh``, as shardings on ``mesh``."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        logical_to_mesh(tree, rules),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


class RulesFallback(enum.Enum):
    """What ``with_logical_constraint`` does with a name that no rule fits."""

    AXIS_IS_UNSHARDED = "axis_is_unsharded"
    RAISE_ERROR = "raise_error"
    NO_CONSTRAINT = "no_constraint"


def _constrain(
    names: Sequence[Any] | None,
    x: Any,
    *,
    rules: LogicalRules,
    mesh: jax.sharding.Mesh | None,
    fallback: RulesFallback,
) -> Any:
    axes = _assign(names, rules)
    if axes is None:
        return x
    if _UNASSIGNED in axes and fallback is not RulesFallback.AXIS_IS_UNSHARDED:
        if fallback is RulesFallback.RAISE_ERROR:
            raise ValueError(f"No rule fits all of the axis names {names}; rules: {rules}")
        return x
    if mesh is None and not meta.global_mesh_defined():
        return x
    spec = PartitionSpec(*(None if axis is _UNASSIGNED else axis for axis in axes))
    return jax.lax.with_sharding_constraint(x, spec if mesh is None else NamedSharding(mesh, spec))


def is_logical_spec(x: Any) -> bool:
    """Whether ``x`` is a leaf of the tree of axis names: None, or a tuple of names."""
    return x is None or (
        isinstance(x, tuple | PartitionSpec)
        and all(isinstance(name, str) or name is None or name is PartitionSpec.UNCONSTRAINED for name in x)
    )


def with_logical_constraint(
    x: Any,
    logical_axis_resources: Any,
    rules: LogicalRules | None = None,
    mesh: jax.sharding.Mesh | None = None,
    fallback: RulesFallback = RulesFallback.AXIS_IS_UNSHARDED,
) -> Any:
    """Constrain the sharding of ``x`` by logical axis names; without rules or without a mesh, return it as it is.

    Args:
        x: an array or a tree of arrays.
        logical_axis_resources: a tuple of names for each array, one name (or None) a dimension.
        rules: by default those of the surrounding ``logical_axis_rules``.
        mesh: by default that of the surrounding ``jax.set_mesh``.
        fallback: what to do with a name that no rule fits.
    """
    rules = get_logical_axis_rules() if rules is None else rules
    if not rules or logical_axis_resources is None:
        return x
    constrain = functools.partial(_constrain, rules=rules, mesh=mesh, fallback=fallback)
    return jax.tree.map(constrain, logical_axis_resources, x, is_leaf=is_logical_spec)


class LogicallyPartitioned(meta.Partitioned):
    """A value with the logical name of each of its dimensions; ``rules`` default to the surrounding ones."""

    rules: LogicalRules | None = struct.field(default=None, pytree_node=False)

    def unbox(self, apply_constraint: bool = True) -> Any:
        """The value, constrained to its sharding where rules and a mesh are known."""
        if not apply_constraint or (self.mesh is None and not meta.global_mesh_defined()):
            return self.value
        return with_logical_constraint(self.value, self.get_partition_spec(), rules=self.rules, mesh=self.mesh)


def with_logical_partitioning(
    fn: Callable[..., Any],
    names: LogicalNames,
    mesh: jax.sharding.Mesh | None = None,
    rules: LogicalRules | None = None,
) -> Callable[..., LogicallyPartitioned]:
    """Wrap an initialiser so that its value comes in a ``LogicallyPartitioned`` box.

    >>> nn.Dense(8, kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp")))
    """

    @functools.wraps(fn)
    def init(*args: Any, **kwargs: Any) -> LogicallyPartitioned:
        return LogicallyPartitioned(fn(*args, **kwargs), names, mesh, rules)

    return init
