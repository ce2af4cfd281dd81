"""What the graph sees in a value: a variable, a node, an array, a container of these, or a constant of Python's."""

from __future__ import annotations

import enum
from typing import Any, TypeVar

import jax
import numpy as np

from distaff.frontend.nnx.variables import Variable

T = TypeVar("T", bound=type)


class Kind(enum.IntEnum):
    """See the module's text. ``DATA`` is an array, or of a type that ``register_data_type`` was told of; ``REF`` a
    mutable array.

    What is not above ``DATA`` is data when it is assigned to an attribute.
    """

    VARIABLE = 1
    NODE = 2
    REF = 3
    DATA = 4
    CONTAINER = 5
    STATIC = 6


_registered: list[type] = [jax.Array, np.ndarray]
_of_type: dict[type, Kind] = {}
_node_types: list[type] = []


def kind_of(x: Any) -> Kind:
    """The kind of a value; of a type that was seen before, one look-up."""
    return _of_type.get(type(x)) or _classify(x)


def _classify(x: Any) -> Kind:
    if isinstance(x, jax.core.Tracer):  # of one type, whatever it stands for
        return Kind.REF if isinstance(x, jax.Ref) else Kind.DATA
    if isinstance(x, Variable):
        kind = Kind.VARIABLE
    elif isinstance(x, tuple(_node_types)):
        kind = Kind.NODE
    elif isinstance(x, jax.Ref):
        kind = Kind.REF
    elif isinstance(x, tuple(_registered)):
        kind = Kind.DATA
    elif x is None or jax.tree_util.default_registry.flatten_one_level(x) is None:
        kind = Kind.STATIC
    else:
        kind = Kind.CONTAINER
    _of_type[type(x)] = kind
    return kind


def add_node_type(cls: type) -> None:
    """Have instances of ``cls`` taken for nodes of the graph."""
    _node_types.append(cls)


def register_data_type(type_: T, /) -> T:
    """Have instances of a type taken for data wherever they are assigned to an attribute; also a class decorator."""
    _registered.append(type_)
    _of_type.clear()
    return type_


def is_data(value: Any, /) -> bool:
    """Whether an attribute that is assigned ``value`` is data: arrays, variables, nodes and registered types are.

    Lists, dicts and other containers are not, whatever they hold: wrap them with ``nnx.data``, ``nnx.List`` or
    ``nnx.Dict``.
    """
    return kind_of(value) <= Kind.DATA


def children_of(container: Any) -> list[Any]:
    """The direct children of a container."""
    if isinstance(container, list | tuple):
        return list(container)
    if type(container) is dict:
        return list(container.values())
    found = jax.tree_util.default_registry.flatten_one_level(container)
    return [] if found is None else list(found[0])


def has_data(value: Any, /) -> list[Any]:
    """The data in a value, at any depth of containers; empty if there is none."""
    kind = kind_of(value)
    if kind is Kind.CONTAINER:
        return [leaf for child in children_of(value) for leaf in has_data(child)]
    return [value] if kind <= Kind.DATA else []


def is_node(x: Any) -> bool:
    """Whether ``x`` is a module or another object with attributes, or a container."""
    return kind_of(x) in (Kind.NODE, Kind.CONTAINER)


def is_graph_node(x: Any) -> bool:
    """Whether ``x`` may be shared: a module or another object with attributes, a variable, or a mutable array."""
    return kind_of(x) <= Kind.REF
