"""Variables of Linen (values, perhaps in boxes, by collection) as variables of NNX (objects by attribute), and back.

Names of collections and types of variables stand for each other by the registry of ``nnx.register_variable_name``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import jax

from distaff.frontend import struct
from distaff.frontend.core import meta
from distaff.frontend.core.meta import AxisMetadata, LogicalNames
from distaff.frontend.nnx import spmd
from distaff.frontend.nnx.variable_kinds import variable_name_from_type, variable_type_from_name
from distaff.frontend.nnx.variables import Variable
from distaff.frontend.traverse_util import flatten_dict, unflatten_dict

# Metadata that remembers in which box of Linen a variable was.
_BOX = "linen_meta_type"


class NNXMeta(struct.PyTreeNode, AxisMetadata[Any]):
    """The box in which Linen keeps a variable of NNX that has metadata. ``value`` is the only leaf."""

    var_type: type[Variable[Any]] = struct.field(pytree_node=False)
    value: Any = struct.field(pytree_node=True)
    metadata: dict[str, Any] = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        """The value."""
        return self.value

    def replace_boxed(self, val: Any) -> Self:
        """The same metadata around another value."""
        return self.replace(value=val)

    def add_axis(self, index: int, params: Mapping[Any, Any]) -> Self:
        """The box after a transform inserted an axis: its name is inserted, hooks of the variable run."""
        return self._renamed(spmd.add_axis, index, params)

    def remove_axis(self, index: int, params: Mapping[Any, Any]) -> Self:
        """The inverse of ``add_axis``."""
        return self._renamed(spmd.remove_axis, index, params)

    def _renamed(self, change: Any, index: int, params: Mapping[Any, Any]) -> Self:
        variable = self.to_nnx_variable()
        change(variable, index, params)
        return self.replace(metadata=variable.get_metadata(exclude_required=True))

    def get_partition_spec(self) -> jax.sharding.PartitionSpec | None:
        """The ``PartitionSpec`` by the names of the variable."""
        return spmd.get_var_pspec(self.to_nnx_variable())

    def to_nnx_variable(self) -> Variable[Any]:
        """The variable."""
        return self.var_type.from_metadata(self.value, dict(self.metadata))


def is_vanilla_variable(variable: Variable[Any]) -> bool:
    """Whether a variable has no metadata or hooks of its own, so that its value says all."""
    return not variable.get_metadata(exclude_required=True)


def to_linen_var(variable: Variable[Any]) -> Any:
    """What Linen keeps of a variable: its value; with metadata, in the box that it came in or in an ``NNXMeta``."""
    metadata = variable.get_metadata(exclude_required=True)
    value = variable.get_raw_value()
    if _BOX in metadata:
        return metadata[_BOX].from_nnx_metadata({"value": value, **metadata})
    return NNXMeta(type(variable), value, metadata) if metadata else value


def to_nnx_var(col: str, x: Any) -> Variable[Any]:
    """The variable of a value, boxed or not, of the collection ``col``."""
    if isinstance(x, NNXMeta):
        return x.to_nnx_variable()
    cls = variable_type_from_name(col, allow_register=True)
    if not isinstance(x, AxisMetadata):
        return cls(x)
    if not hasattr(x, "to_nnx_metadata"):
        raise ValueError(
            f"A {type(x).__name__} in the collection {col!r} can't become a variable of NNX: the box has no methods "
            "to_nnx_metadata and from_nnx_metadata. Define them."
        )
    metadata = x.to_nnx_metadata()
    return cls.from_metadata(metadata.pop("value"), {**metadata, _BOX: type(x)})


def linen_vars_to_nnx_attrs(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Collections of values as nested dicts of variables.

    Raises:
        ValueError: two collections have a variable of the same name at the same place.
    """
    flat: dict[tuple[Any, ...], Any] = {}
    for col, values in variables.items():
        for path, value in flatten_dict(values, is_leaf=lambda _, x: not isinstance(x, Mapping)).items():
            if path in flat:
                raise ValueError(
                    f"The variable {'/'.join(map(str, path))!r} stands in the collection {col!r} and in another; in an "
                    "object of NNX only one can have that name."
                )
            flat[path] = to_nnx_var(col, value)
    return unflatten_dict(flat)


def nnx_attrs_to_linen_vars(nnx_attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings of variables as collections of values.

    Raises:
        ValueError: something is no variable.
    """
    collections: dict[str, dict[tuple[Any, ...], Any]] = {}
    for path, x in flatten_dict(nnx_attrs).items():
        if not isinstance(x, Variable):
            raise ValueError(
                f"Cannot infer the collection of {'/'.join(map(str, path))!r}, which is no variable: {x!r}."
            )
        name = variable_name_from_type(type(x), allow_register=True)
        collections.setdefault(name, {})[path] = to_linen_var(x)
    return {name: unflatten_dict(flat) for name, flat in collections.items()}


def with_partitioning(fn: Any, names: LogicalNames, mesh: jax.sharding.Mesh | None = None) -> Any:
    """As ``nnx.with_partitioning``; in Linen the value comes in a ``Partitioned`` box."""
    return spmd.with_partitioning(fn, names, mesh, **{_BOX: meta.Partitioned})
