"""Boxes that carry metadata with a variable, and the one that names the mesh axes of its dimensions.

A variable may be stored in an ``AxisMetadata`` box. Modules read it unboxed; transforms that stack variables along a
new axis (``vmap``, ``scan``) tell the box, so that the names stay in step with the dimensions.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, Self, TypeAlias, TypeVar

import jax

from distaff.frontend import errors, struct

A = TypeVar("A")
AxisName: TypeAlias = str | tuple[str, ...] | None
LogicalNames: TypeAlias = tuple[AxisName, ...]

# The key under which transforms pass the name of the axis that they add or remove.
PARTITION_NAME = "partition_name"


class AxisMetadata(abc.ABC, Generic[A]):
    """A box around a variable's value with metadata about its axes. Subclasses are pytree nodes."""

    @abc.abstractmethod
    def unbox(self) -> A:
        """The value inside."""

    @abc.abstractmethod
    def replace_boxed(self, val: Any) -> AxisMetadata[Any]:
        """The same metadata around another value."""

    @abc.abstractmethod
    def add_axis(self, index: int, params: dict[Any, Any]) -> Self:
        """The box after a transform inserted an axis at ``index``; ``params`` are its ``metadata_params``."""

    @abc.abstractmethod
    def remove_axis(self, index: int, params: dict[Any, Any]) -> Self:
        """The box after a transform removed the axis at ``index``; the inverse of ``add_axis``."""


def is_axis_metadata(val: Any) -> bool:
    """Whether ``val`` is a box."""
    return isinstance(val, AxisMetadata)


def map_axis_meta(fn: Callable[[AxisMetadata[Any]], Any], tree: Any) -> Any:
    """Map ``fn`` over the boxes in a tree; everything else stays."""
    return jax.tree.map(lambda x: fn(x) if isinstance(x, AxisMetadata) else x, tree, is_leaf=is_axis_metadata)


def add_axis(tree: Any, index: int, params: dict[Any, Any]) -> Any:
    """Call ``add_axis`` on every box in a tree."""
    return map_axis_meta(lambda x: x.add_axis(index, params), tree)


def remove_axis(tree: Any, index: int, params: dict[Any, Any]) -> Any:
    """Call ``remove_axis`` on every box in a tree."""
    return map_axis_meta(lambda x: x.remove_axis(index, params), tree)


def unbox(tree: Any) -> Any:
    """The tree with every box replaced by its value."""
    if isinstance(tree, jax.Array):
        return tree
    return map_axis_meta(lambda x: unbox(x.unbox()), tree)


def replace_boxed(tree: Any, updates: Any) -> Any:
    """The values of ``updates`` in the boxes of ``tree``."""

    def put(box: Any, value: Any) -> Any:
        return box.replace_boxed(replace_boxed(box.unbox(), value)) if isinstance(box, AxisMetadata) else value

    return jax.tree.map(put, tree, updates, is_leaf=is_axis_metadata)


def get_global_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh of the surrounding ``jax.set_mesh``, if any."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def global_mesh_defined() -> bool:
    """Whether code runs under ``jax.set_mesh``."""
    return get_global_mesh() is not None


def insert_axis_name(names: LogicalNames, index: int, name: AxisName) -> LogicalNames:
    """The names of a value's axes after an axis was inserted at ``index``; missing names before it are None."""
    padded = [*names, *(None,) * (index - len(names))]
    padded.insert(index, name)
    return tuple(padded)


def drop_axis_name(names: LogicalNames, index: int, name: AxisName, what: object) -> LogicalNames:
    """The inverse of ``insert_axis_name``.

    Raises:
        ValueError: the axis has another name; ``what`` says whose it is.
    """
    remaining = list(names)
    removed = remaining.pop(index)
    if removed != name:
        raise ValueError(f"Axis {index} of {what} is named {removed!r}, but the transform removes {name!r}.")
    return tuple(remaining)


class Partitioned(struct.PyTreeNode, AxisMetadata[Any]):
    """A value with the mesh axis (or None) that each of its dimensions is split over.

    Usually made by ``with_partitioning`` around an initialiser. ``value`` is the only leaf.
    """

    value: Any
    names: LogicalNames = struct.field(pytree_node=False)
    mesh: jax.sharding.Mesh | None = struct.field(default=None, pytree_node=False)

    def unbox(self, apply_constraint: bool = True) -> Any:
        """The value, constrained to its sharding where a mesh is known."""
        if not apply_constraint or (self.mesh is None and not global_mesh_defined()):
            return self.value
        spec = self.get_partition_spec()
        sharding = spec if self.mesh is None else jax.sharding.NamedSharding(self.mesh, spec)
        return jax.lax.with_sharding_constraint(self.value, sharding)

    def replace_boxed(self, val: Any) -> Self:
        """The same names around another value."""
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Self:
        """Insert the transform's axis name at ``index``."""
        return self.replace(names=insert_axis_name(self.names, index, self._axis_name(params)))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Self:
        """Remove the transform's axis name at ``index``."""
        return self.replace(names=drop_axis_name(self.names, index, self._axis_name(params), self))

    def _axis_name(self, params: dict[Any, Any]) -> AxisName:
        if PARTITION_NAME not in params:
            raise errors.PartitioningUnspecifiedError(self)
        name: AxisName = params[PARTITION_NAME]
        return name

    def get_partition_spec(self) -> jax.sharding.PartitionSpec:
        """The names as a ``PartitionSpec``."""
        return jax.sharding.PartitionSpec(*self.names)

    def get_sharding(self, mesh: jax.sharding.Mesh) -> jax.sharding.Sharding:
        """The names as a sharding on ``mesh``."""
        return jax.sharding.NamedSharding(mesh, self.get_partition_spec())

    # As a variable of NNX has it: what its metadata calls each field.
    _NNX_NAMES: ClassVar[dict[str, str]] = {"mesh": "mesh", "names": "out_sharding", "rules": "sharding_rules"}

    def to_nnx_metadata(self) -> dict[str, Any]:
        """The fields by their names in the metadata of a variable of NNX; ``value`` is among them."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {self._NNX_NAMES.get(name, name): value for name, value in fields.items()}

    @classmethod
    def from_nnx_metadata(cls, metadata: Mapping[str, Any]) -> Self:
        """The box of a value, ``metadata["value"]``, and the metadata of a variable of NNX; the rest is dropped."""
        names = {field.name: cls._NNX_NAMES.get(field.name, field.name) for field in dataclasses.fields(cls)}
        return cls(**{name: metadata[nnx_name] for name, nnx_name in names.items() if nnx_name in metadata})


def with_partitioning(
    fn: Callable[..., Any], names: LogicalNames, mesh: jax.sharding.Mesh | None = None
) -> Callable[..., Partitioned]:
    """Wrap an initialiser so that its value comes in a ``Partitioned`` box.

    >>> nn.Dense(8, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model")))
    """

    @functools.wraps(fn)
    def init(*args: Any, **kwargs: Any) -> Partitioned:
        return Partitioned(fn(*args, **kwargs), names, mesh)

    return init


def _leaf_spec(x: Any) -> jax.sharding.PartitionSpec | None:
    if hasattr(x, "get_partition_spec"):
        spec: jax.sharding.PartitionSpec = x.get_partition_spec()
        return spec
    return jax.sharding.PartitionSpec() if hasattr(x, "shape") else None


def get_partition_spec(tree: Any) -> Any:
    """The ``PartitionSpec`` of each variable in a tree: of the box if it has one, otherwise replicated."""
    return jax.tree.map(_leaf_spec, tree, is_leaf=is_axis_metadata)


def get_sharding(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """The sharding on ``mesh`` of each variable in a tree."""

    def leaf_sharding(x: Any) -> jax.sharding.Sharding | None:
        if hasattr(x, "get_sharding"):
            sharding: jax.sharding.Sharding = x.get_sharding(mesh)
            return sharding
        spec = _leaf_spec(x)
        return None if spec is None else jax.sharding.NamedSharding(mesh, spec)

    return jax.tree.map(leaf_sharding, tree, is_leaf=is_axis_metadata)
