"""Logical axis names in collections of their own, the older way; ``nn.with_logical_partitioning`` is the newer.

``param_with_axes`` declares a parameter, and notes the names of its axes in the collection ``params_axes``, which
``get_axis_names`` turns into a tree of ``PartitionSpec`` like that of the parameters. ``scan_with_axes`` and
``vmap_with_axes`` add the name of their axis to what is noted inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax

from distaff.frontend import errors, struct
from distaff.frontend.core import lift
from distaff.frontend.core.filters import CollectionFilter, union_filters
from distaff.frontend.core.frozen_dict import FrozenDict, freeze
from distaff.frontend.core.lift.axes import In as ScanIn
from distaff.frontend.core.lift.axes import InOutAxis, InOutScanAxis
from distaff.frontend.core.lift.axes import Out as ScanOut
from distaff.frontend.core.scope import Scope, Variable
from distaff.frontend.core.spmd import get_logical_axis_rules as get_axis_rules
from distaff.frontend.core.spmd import logical_axis_rules as axis_rules
from distaff.frontend.core.spmd import set_logical_axis_rules as set_axis_rules
from distaff.frontend.linen import transforms
from distaff.frontend.linen.context import context
from distaff.frontend.linen.lifting import lift_transform
from distaff.frontend.sharding import (
    LogicalRules,
    RulesFallback,
    is_logical_spec,
    logical_to_mesh,
    logical_to_mesh_axes,
)
from distaff.frontend.sharding import with_logical_constraint as with_sharding_constraint
from distaff.frontend.traverse_util import flatten_dict, unflatten_dict

if TYPE_CHECKING:
    from distaff.frontend.linen.module import Module

__all__ = [
    "AxisMetadata",
    "LogicalRules",
    "PartitionedVariable",
    "RulesFallback",
    "ScanIn",
    "ScanOut",
    "axis_rules",
    "core_remat_static",
    "get_axis_names",
    "get_axis_rules",
    "logical_to_mesh",
    "logical_to_mesh_axes",
    "param_with_axes",
    "remat",
    "scan_with_axes",
    "set_axis_rules",
    "variable_with_axes",
    "vmap_with_axes",
    "with_sharding_constraint",
]

AxisNames = tuple[str | None, ...]


@struct.dataclass
class AxisMetadata:
    """The names of a variable's axes: a tuple, or a tree of tuples for a variable that is a tree."""

    names: Any = struct.field(pytree_node=False)


class PartitionedVariable(Variable[Any]):
    """A variable that is constrained to the sharding of its axes whenever it is read or assigned."""

    __slots__ = ("axes", "fallback")

    def __init__(
        self,
        scope: Scope,
        collection: str,
        name: str,
        axes: AxisNames | None = None,
        fallback: RulesFallback = RulesFallback.AXIS_IS_UNSHARDED,
    ) -> None:
        super().__init__(scope, collection, name, unbox=False)
        self.axes, self.fallback = axes, fallback

    @property
    def value(self) -> Any:
        """The current value."""
        return with_sharding_constraint(
            self.scope.get_variable(self.collection, self.name), self.axes, fallback=self.fallback
        )

    @value.setter
    def value(self, value: Any) -> None:
        constrained = with_sharding_constraint(value, self.axes, fallback=self.fallback)
        self.scope.put_variable(self.collection, self.name, constrained)


def _current_module() -> Module:
    module = context.module_stack[-1]
    if module is None:
        raise ValueError("There is no current module: call this inside a module's method, or pass module=….")
    return module


def _note_axes(module: Module, collection: str, name: str, axes: AxisNames) -> None:
    module.sow(f"{collection}_axes", f"{name}_axes", AxisMetadata(axes), reduce_fn=_same_axes)


def _same_axes(before: Any, now: Any) -> Any:
    if isinstance(before, AxisMetadata) and before != now:
        raise ValueError(f"Axis names of one variable must agree between calls; got {before.names} and {now.names}.")
    return now


def param_with_axes(
    name: str,
    init_fn: Callable[..., Any],
    *init_args: Any,
    axes: AxisNames | None = None,
    module: Module | None = None,
    **init_kwargs: Any,
) -> Any:
    """``module.param``, with names for the axes.

    Args:
        name: the parameter's name.
        init_fn: makes the first value, from a random key and ``init_args``.
        *init_args: arguments of ``init_fn``.
        axes: one logical name (or None) for each axis.
        module: by default the module whose method is running.
        **init_kwargs: keyword arguments of ``init_fn``.

    Raises:
        ValueError: other names were given for the same parameter before, or no module is running.
    """
    module = module or _current_module()
    value = module.param(name, init_fn, *init_args, **init_kwargs)
    if axes is None:
        return value
    value = with_sharding_constraint(value, jax.sharding.PartitionSpec(*axes))
    _note_axes(module, "params", name, axes)
    return value


def variable_with_axes(
    collection: str,
    name: str,
    init_fn: Callable[..., Any],
    *init_args: Any,
    axes: AxisNames | None = None,
    module: Module | None = None,
    fallback: RulesFallback = RulesFallback.AXIS_IS_UNSHARDED,
    **init_kwargs: Any,
) -> PartitionedVariable:
    """``module.variable``, with names for the axes, which are noted in the collection ``{collection}_axes``.

    Args:
        collection: the variable's collection.
        name: its name.
        init_fn: makes the first value, from ``init_args``.
        *init_args: arguments of ``init_fn``.
        axes: one logical name (or None) for each axis.
        module: by default the module whose method is running.
        fallback: what to do with a name that no rule fits.
        **init_kwargs: keyword arguments of ``init_fn``.

    Raises:
        ScopeVariableNotFoundError: the variable has no value, and its collection is not mutable.
        ValueError: other names were given for the same variable before, or no module is running.
    """
    module = module or _current_module()
    scope = module.scope
    if scope is None:
        raise errors.CallCompactUnboundModuleError()
    scope.reserve(name)
    if not scope.has_variable(collection, name):
        if not scope.is_mutable_collection(collection):
            raise errors.ScopeVariableNotFoundError(name, collection, scope.path_text)
        value = init_fn(*init_args, **init_kwargs)
        scope.put_variable(collection, name, with_sharding_constraint(value, axes, fallback=fallback))
    if axes is not None:
        _note_axes(module, collection, name, axes)
    return PartitionedVariable(scope, collection, name, axes, fallback)


def get_axis_names(axes_metadata: Any) -> FrozenDict[Any, Any]:
    """A collection such as ``variables["params_axes"]`` as a tree of ``PartitionSpec`` by the variables' own names."""

    def spec(names: Any) -> Any:
        return None if names is None else jax.sharding.PartitionSpec(*names)

    specs = {
        (*path[:-1], path[-1].removesuffix("_axes")): jax.tree.map(spec, noted.names, is_leaf=is_logical_spec)
        for path, noted in flatten_dict(axes_metadata).items()
    }
    return freeze(unflatten_dict(specs))


def _with_named_axis(target: Any, collection: str, axis: Any, axis_name: str | None) -> Any:
    """``target``, which has one more axis outside than inside, with that axis among the noted names outside only."""
    position = getattr(axis, "axis", axis)

    def insert(names: Any) -> Any:
        return None if names is None else (*names[:position], axis_name, *names[position:])

    def drop(names: Any) -> Any:
        if names is None:
            return None
        if names[position] != axis_name:
            raise ValueError(f"Axis {position} of {names} should be the transform's, {axis_name!r}.")
        return names[:position] + names[position + 1 :]

    def on_noted(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def change(noted: Any) -> Any:
            if not isinstance(noted, AxisMetadata):
                return noted
            return AxisMetadata(jax.tree.map(fn, noted.names, is_leaf=is_logical_spec))

        return lambda tree: jax.tree.map(change, tree, is_leaf=lambda x: isinstance(x, AxisMetadata))

    module = context.module_stack[-1]
    noted_in = f"{collection}_axes"
    return transforms.map_variables(
        target,
        noted_in,
        mutable=module is None or module.is_mutable_collection(noted_in),
        trans_in_fn=on_noted(drop),
        trans_out_fn=on_noted(insert),
    )


def scan_with_axes(
    target: Any,
    variable_axes: Mapping[Any, InOutScanAxis] | None = None,
    variable_broadcast: CollectionFilter = False,
    variable_carry: CollectionFilter = False,
    split_rngs: Mapping[Any, bool] | None = None,
    in_axes: Any = 0,
    out_axes: Any = 0,
    length: int | None = None,
    reverse: bool = False,
    unroll: int = 1,
    axis_name: str = "layers",
    axes_collections: tuple[str, ...] = ("params",),
    data_transform: Callable[..., Any] | None = None,
    methods: Any = None,
) -> Any:
    """``nn.scan``, with ``axis_name`` for the axis that variables of ``axes_collections`` get; see there."""
    scanned = transforms.scan(
        target,
        variable_axes=variable_axes,
        variable_broadcast=union_filters(variable_broadcast, tuple(f"{col}_axes" for col in axes_collections)),
        variable_carry=variable_carry,
        split_rngs=split_rngs,
        in_axes=in_axes,
        out_axes=out_axes,
        length=length,
        reverse=reverse,
        unroll=unroll,
        data_transform=data_transform,
        methods=methods,
    )
    for col in axes_collections:
        if col in (variable_axes or {}):
            scanned = _with_named_axis(scanned, col, (variable_axes or {})[col], axis_name)
    return scanned


def vmap_with_axes(
    target: Any,
    variable_axes: Mapping[Any, InOutAxis],
    split_rngs: Mapping[Any, bool] | None = None,
    in_axes: Any = 0,
    out_axes: Any = 0,
    axis_size: int | None = None,
    axis_name: str | None = None,
    partitioning_axis_names: Mapping[Any, str] | None = None,
    spmd_axis_name: str | None = None,
    methods: Any = None,
) -> Any:
    """``nn.vmap``, with a name in ``partitioning_axis_names`` for the axis that a collection gets; see there."""
    names = partitioning_axis_names or {}
    mapped = transforms.vmap(
        target,
        variable_axes={**variable_axes, **{f"{col}_axes": None for col in names}},
        split_rngs=split_rngs or {},
        in_axes=in_axes,
        out_axes=out_axes,
        axis_size=axis_size,
        axis_name=axis_name,
        spmd_axis_name=spmd_axis_name,
        methods=methods,
    )
    for col, axis in variable_axes.items():
        if col in names:
            mapped = _with_named_axis(mapped, col, axis, names[col])
    return mapped


def core_remat_static(
    fn: Callable[..., Any],
    variables: CollectionFilter = True,
    rngs: CollectionFilter = True,
    concrete: bool = False,
    prevent_cse: bool = True,
    static_argnums: int | Iterable[int] = (),
    policy: Callable[..., bool] | None = None,
) -> Callable[..., Any]:
    """``core.lift.remat`` of a function of a scope, by the name that Flax gives to rematerialised modules here."""
    static = (static_argnums,) if isinstance(static_argnums, int) else tuple(static_argnums)
    return lift.remat(fn, variables, rngs, concrete, prevent_cse, static, policy)


def remat(
    target: Any,
    variables: CollectionFilter = True,
    rngs: CollectionFilter = True,
    concrete: bool = False,
    prevent_cse: bool = True,
    static_argnums: int | Iterable[int] = (),
    policy: Callable[..., bool] | None = None,
    methods: Any = None,
) -> Any:
    """``nn.remat``, with ``static_argnums`` that do not count the module: 0 is the argument after it."""
    return lift_transform(
        core_remat_static,
        target,
        methods=methods,
        variables=variables,
        rngs=rngs,
        concrete=concrete,
        prevent_cse=prevent_cse,
        static_argnums=static_argnums,
        policy=policy,
    )
