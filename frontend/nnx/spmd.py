"""The names of variables' axes: given by initialisers, made shardings, and changed by transforms that map."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distaff.frontend.core import meta, spmd
from distaff.frontend.core.meta import LogicalNames
from distaff.frontend.core.spmd import logical_axis_rules as logical_axis_rules
from distaff.frontend.nnx.graph_functions import map as map_object
from distaff.frontend.nnx.graph_functions import split
from distaff.frontend.nnx.variable_metadata import PARTITION_NAME, with_metadata
from distaff.frontend.nnx.variables import Variable


def with_partitioning(
    initializer: Callable[..., Any], sharding: LogicalNames, mesh: Mesh | None = None, **metadata: Any
) -> Callable[..., Any]:
    """Wrap an initialiser so that the variable made of its value has the names of its axes as ``out_sharding``.

    >>> nnx.Linear(8, 8, kernel_init=nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model")), rngs=rngs)

    Args:
        initializer: the initialiser.
        sharding: for each axis a name (a mesh axis, or a logical one for which there are rules) or None.
        mesh: the mesh to lay it out on (default: that of ``jax.set_mesh``).
        metadata: more metadata for the variable.
    """
    return with_metadata(initializer, out_sharding=sharding, mesh=mesh, **metadata)  # type: ignore[no-any-return]


def _is_variable(x: Any) -> bool:
    return isinstance(x, Variable)


def get_var_pspec(variable: Variable[Any]) -> PartitionSpec | None:
    """The ``PartitionSpec`` of a variable by its names and the rules in force; None of what is no array."""
    names = variable.sharding_names
    if names:
        spec: PartitionSpec = spmd.get_pspec(names, variable.get_metadata("sharding_rules", None))
        return spec.spec if isinstance(spec, NamedSharding) else spec
    return PartitionSpec() if hasattr(variable.get_raw_value(), "shape") else None


def get_partition_spec(tree: Any) -> Any:
    """The tree with the ``PartitionSpec`` of each variable as its value, and of each array in its place."""

    def spec(x: Any) -> Any:
        if _is_variable(x):
            return x.replace(get_var_pspec(x))
        return PartitionSpec() if hasattr(x, "shape") else None

    return jax.tree.map(spec, tree, is_leaf=_is_variable)


def get_named_sharding(tree: Any, mesh: Mesh) -> Any:
    """As ``get_partition_spec``, with shardings on ``mesh``."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), get_partition_spec(tree), is_leaf=lambda x: isinstance(x, PartitionSpec)
    )


def as_abstract(tree: Any, graph: bool | None = None) -> Any:
    """A copy of abstract objects (of ``nnx.eval_shape``) whose named variables know their sharding.

    Args:
        tree: objects whose variables hold ``jax.ShapeDtypeStruct``.
        graph: as for ``nnx.map``.

    Raises:
        ValueError: a variable has names, but neither it nor ``jax.set_mesh`` has a mesh.
    """

    return _with_shardings(tree, None, graph)


def _with_shardings(tree: Any, mesh: Mesh | None, graph: bool | None) -> Any:
    """As ``as_abstract``, all on ``mesh`` if it is given."""

    def annotated(path: Any, x: Any) -> Any:
        value = x.get_raw_value() if _is_variable(x) else x
        if not _is_variable(x) or not isinstance(value, jax.ShapeDtypeStruct) or not x.sharding_names:
            return x
        spec = value.sharding.spec if isinstance(value.sharding, NamedSharding) else PartitionSpec()
        if spec != PartitionSpec() and mesh is None:
            return x
        used = mesh or x.get_metadata("mesh", None) or meta.get_global_mesh()
        if used is None:
            raise ValueError(
                f"The variable {'.'.join(map(str, path))} has axis names, but there is no mesh: jax.set_mesh."
            )
        if spec == PartitionSpec():
            spec = get_var_pspec(x) or spec
        return x.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(used, spec)))

    return map_object(annotated, tree, graph=graph)


abstract_with_sharding = as_abstract


def get_abstract_model(init_fn: Callable[[], Any], mesh: Mesh, *, graph: bool | None = None) -> Any:
    """The definition and the abstract state of the object that ``init_fn`` makes, with shardings on ``mesh``."""
    from distaff.frontend.nnx.transforms.abstract import eval_shape

    with jax.set_mesh(mesh):
        return split(_with_shardings(eval_shape(init_fn, graph=graph), mesh, graph), graph=graph)


# What transforms that map over an axis of a variable do to its names.


def _entries_of_axes(variable: Variable[Any], params: Mapping[str, Any]) -> list[tuple[str, tuple[Any, ...], Any]]:
    """The metadata with an entry for each axis: its name, the entries, and that of the mapped axis.

    These are the axes' names, and what else ``params`` has entries for.
    """
    fields = {"out_sharding": params[PARTITION_NAME]} | {k: v for k, v in params.items() if k != PARTITION_NAME}
    held = [(field, variable.get_metadata(field, None), entry) for field, entry in fields.items()]
    return [(field, tuple(entries), entry) for field, entries, entry in held if entries and isinstance(entries, tuple)]


def remove_axis(variable: Variable[Any], index: int, params: Mapping[str, Any]) -> None:
    """Drop the axis ``index`` of the value outside, named ``params[PARTITION_NAME]``, and run the variable's hooks.

    Other metadata that is a tuple with an entry for each axis loses what ``params`` has under its name.

    Raises:
        ValueError: the axis has another name.
    """
    if PARTITION_NAME not in params:
        return
    at = index + variable.get_raw_value().ndim + 1 if index < 0 else index  # the value has lost its axis already
    for field, entries, entry in _entries_of_axes(variable, params):
        what = f"a {type(variable).__name__} with {field}={entries}"
        variable.set_metadata(field, meta.drop_axis_name(entries, at, entry, what))
    variable.remove_axis(at, params[PARTITION_NAME])


def add_axis(variable: Variable[Any], index: int, params: Mapping[str, Any]) -> None:
    """The inverse of ``remove_axis``: name the axis that is to be inserted at ``index``."""
    if PARTITION_NAME not in params:
        return
    at = index + variable.get_raw_value().ndim + 1 if index < 0 else index  # the value has no such axis yet
    for field, entries, entry in _entries_of_axes(variable, params):
        variable.set_metadata(field, meta.insert_axis_name(entries, at, entry))
    variable.add_axis(at, params[PARTITION_NAME])
