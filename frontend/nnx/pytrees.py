"""``Pytree``, the base of all objects with variables: their attributes are data or static, and they are pytree nodes.

An attribute is *data* if it was assigned a variable, an array, another such object or ``nnx.data(value)``; JAX looks
into it. It is *static* otherwise, or with ``nnx.static(value)``: a part of what the object is. Once set, this stays so.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
import inspect
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Self, TypeVar

import jax

from distaff.frontend import errors
from distaff.frontend.jax_compat import running_trace
from distaff.frontend.nnx.kinds import Kind, add_node_type, has_data, kind_of
from distaff.frontend.nnx.kinds import is_data as is_data_value

T = TypeVar("T")
_MISSING: Any = object()
_MARK = "nnx_is_data"  # in the metadata of dataclass fields
STATUSES = "_pytree__nodes"  # the key of an object's __dict__ with the attributes that differ from what they look like
_AS_IN_SOURCE = re.compile(r"^(?:[\w.]+\.)?(Data|Static)\[")


class _Annotation:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class DataAnnotation(_Annotation):
    """What ``nnx.data`` returns: a value to be assigned to an attribute, which becomes data."""

    __slots__ = ()


class StaticAnnotation(_Annotation):
    """What ``nnx.static`` returns: a value to be assigned to an attribute, which becomes static."""

    __slots__ = ()


def _annotate(is_data: bool, value: Any, kwargs: dict[str, Any]) -> Any:
    if value is not _MISSING and not kwargs:
        return DataAnnotation(value) if is_data else StaticAnnotation(value)
    if value is not _MISSING:
        kwargs["default"] = value
    metadata = {**(kwargs.pop("metadata", None) or {}), _MARK: is_data}
    return dataclasses.field(**kwargs, metadata=metadata)


def data(value: Any = _MISSING, /, **kwargs: Any) -> Any:
    """Mark a value that is assigned to an attribute as data: ``self.layers = nnx.data([...])``.

    Without a value, in a class body: the attribute of that name is data. ``kwargs`` are those of ``dataclasses.field``.
    """
    return _annotate(True, value, kwargs)


def static(value: Any = _MISSING, /, **kwargs: Any) -> Any:
    """Mark a value that is assigned to an attribute as static; the opposite of ``nnx.data``."""
    return _annotate(False, value, kwargs)


class _Alias:
    def __init__(self, is_data: bool) -> None:
        self.is_data = is_data

    def __getitem__(self, item: Any) -> Any:
        return Annotated[item, self]


Data = _Alias(True)
Static = _Alias(False)


def _annotated_statuses(cls: type) -> dict[str, bool]:
    """Which attributes the class body says are data or static."""
    statuses: dict[str, bool] = {}
    for name, annotation in inspect.get_annotations(cls).items():
        if isinstance(annotation, str):
            written = _AS_IN_SOURCE.match(annotation)
            if written:
                statuses[name] = written[1] == "Data"
        else:
            marks = [mark for mark in getattr(annotation, "__metadata__", ()) if isinstance(mark, _Alias)]
            if marks:
                statuses[name] = marks[0].is_data
    for name, value in list(cls.__dict__.items()):
        if isinstance(value, dataclasses.Field) and _MARK in value.metadata:
            statuses[name] = value.metadata[_MARK]
        elif isinstance(value, _Annotation):
            statuses[name] = isinstance(value, DataAnnotation)
            setattr(cls, name, value.value)
    return statuses


_object_new: Any = object.__new__


class PytreeMeta(abc.ABCMeta):
    """Makes objects; after ``__init__`` it checks that no static attribute has come to hold data."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """A new object."""
        new: Any = cls.__new__
        node = new(cls) if new is _object_new else new(cls, *args, **kwargs)
        _set_trace(node, running_trace())
        node.__init__(*args, **kwargs)
        if cls._pytree__is_pytree:  # type: ignore[attr-defined]
            check_pytree(node)
        return node


class Pytree(metaclass=PytreeMeta):
    """Base of all objects with variables.

    Class keyword ``pytree``: whether instances are pytree nodes of JAX. If not, they are leaves there, and attributes
    may be lists or dicts of modules and variables without a mark; the graph functions of nnx see into them anyway.

    Raises:
        ValueError: an attribute is assigned data although it is static, or a container of data that is not marked.
        TraceContextError: an attribute is assigned inside a JAX transform that was entered after the object was made.
    """

    # Of the object, not of what it is: the trace that it was made in, and structures kept for dispatch.
    __slots__ = ("__dict__", "__weakref__", "_pytree__structures", "_pytree__trace")
    _pytree__is_pytree: ClassVar[bool] = True
    _pytree__nodes: Mapping[str, bool] = MappingProxyType({})
    _pytree__rank: Any = None  # a method: which attributes come first in the graph, those of lower numbers

    _pytree__trace: Any
    _pytree__structures: Any

    def __init_subclass__(cls, *, pytree: bool | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if pytree is not None:
            cls._pytree__is_pytree = pytree
        inherited = {k: v for base in reversed(cls.__mro__[1:]) for k, v in base.__dict__.get(STATUSES, {}).items()}
        cls._pytree__nodes = {**inherited, **_annotated_statuses(cls)}
        if cls._pytree__is_pytree:
            _register(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        self._check_valid_context()
        if name == "__dict__":  # structures refer to the dict
            attributes = dict(value)
            vars(self).clear()
            vars(self).update(attributes)
        elif name == "__class__" or isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
            if name == "__class__":  # shows in the dict, which is what structures look at
                self.__dict__[STATUSES] = dict(self._pytree__nodes)
        else:
            self._setattr(name, value)

    def _setattr(self, name: str, value: Any) -> None:
        attributes = self.__dict__
        known = self._pytree__nodes
        if isinstance(value, _Annotation):
            is_data, value = isinstance(value, DataAnnotation), value.value
            if not is_data and self._pytree__is_pytree and has_data(value):
                raise ValueError(
                    f"Found data in value of type {type(value)} annotated with nnx.static(...) when setting attribute "
                    f"{name!r} of Pytree type {type(self)}. Assign it without nnx.static."
                )
            explicit = is_data != (is_data_value(value)) or name in known
        elif name in known:
            is_data, explicit = known[name], False
        elif name in attributes:
            is_data = is_data_value(attributes[name])
            explicit = is_data and not is_data_value(value)
        else:
            is_data = is_data_value(value)
            explicit = False
        if not is_data and self._pytree__is_pytree:
            self._check_static(name, value)
        if explicit and known.get(name) is not is_data:
            attributes[STATUSES] = {**known, name: is_data}
        attributes[name] = value

    def _check_static(self, name: str, value: Any, found_data: str = "Found data") -> None:
        kind = kind_of(value)
        if kind <= Kind.DATA and name not in self._pytree__nodes:
            raise ValueError(
                f"Cannot assign data value of type {type(value)} to static attribute {name!r} of Pytree type "
                f"{type(self)}. To make the attribute data, assign it as `self.{name} = nnx.data(...)`."
            )
        found = has_data(value)
        if found:
            if kind is not Kind.CONTAINER:
                found_data = "Found unexpected data"
            kinds = ", ".join(sorted({type(x).__name__ for x in found}))
            raise ValueError(
                f"{found_data} on value of type {type(value)} in static attribute {name!r} of Pytree type "
                f"{type(self)}: it holds {kinds}. If the attribute is meant to be data, assign `self.{name} = "
                f"nnx.data(...)`, use nnx.List or nnx.Dict, or declare `{name}: nnx.Data[...]` in the class; or make "
                f"the class no pytree: `class {type(self).__name__}(..., pytree=False)`."
            )

    def __delattr__(self, name: str) -> None:
        self._check_valid_context()
        object.__delattr__(self, name)
        if name in self.__dict__.get(STATUSES, ()):
            self.__dict__[STATUSES] = {key: value for key, value in self._pytree__nodes.items() if key != name}

    @property
    def _can_update(self) -> bool:
        return self._pytree__trace is running_trace()

    def _check_valid_context(self) -> None:
        if self._pytree__trace is not running_trace():
            raise errors.TraceContextError(
                f"Cannot mutate {type(self).__name__!r} from different trace level: it was made outside of the JAX "
                "transform that runs now. Pass it to the function as an argument and use the transform of nnx, such "
                "as nnx.jit or nnx.grad."
            )

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        _set_trace(self, running_trace())
        self.__dict__.update(state)

    def __copy__(self) -> Self:
        made: Self = empty_node(type(self), self.__dict__)
        return made

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        memo = {} if memo is None else memo
        made: Self = empty_node(type(self), {})
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __repr__(self) -> str:
        from distaff.frontend.nnx.representation import represent

        return represent(self)


_set_trace = Pytree.__dict__["_pytree__trace"].__set__
add_node_type(Pytree)


class Object(Pytree, pytree=False):
    """A ``Pytree`` that JAX sees as a leaf; older code derives from it."""


def empty_node(cls: type[Any], attributes: dict[str, Any]) -> Any:
    """An object of ``cls`` with these attributes, without running ``__init__`` or any check."""
    node = object.__new__(cls)
    _set_trace(node, running_trace())
    node.__dict__.update(attributes)
    return node


def check_pytree(pytree: Any) -> None:
    """Raise ValueError if a static attribute of the object holds data, which may have come into it later."""
    statuses = pytree._pytree__nodes
    for name, value in pytree.__dict__.items():
        if (name not in statuses and type(value) in (list, dict)) or statuses.get(name) is False:
            pytree._check_static(name, value, "Found unexpected data")


def mark_data(node: Pytree, names: Iterable[str], static: Iterable[str] = ()) -> None:
    """Have attributes be data whatever they look like, as far as the class does not say so; and others static."""
    known = node._pytree__nodes
    marked = {name: True for name in names if not (known.get(name) or is_data_value(node.__dict__[name]))}
    marked.update(dict.fromkeys(static, False))
    if marked:
        node.__dict__[STATUSES] = {**known, **marked}


def external_key(name: str) -> str | int:
    """An attribute's name as it stands in paths: ``"0"`` as 0, as lists have them."""
    return int(name) if name.isdigit() else name


def sorted_attributes(node: Pytree) -> list[tuple[Any, str]]:
    """The attributes as (key in paths, name), ints first; without what only the object itself needs."""
    names = sorted(node.__dict__)
    rank = node._pytree__rank
    if rank is not None:
        names.sort(key=rank)
    if names and names[0][:1].isdigit():
        return sorted(
            ((external_key(name), name) for name in names if name != STATUSES),
            key=lambda k: (isinstance(k[0], str), k[0]),
        )
    return [(name, name) for name in names if name != STATUSES]


def is_data_attribute(node: Pytree, name: str, value: Any) -> bool:
    """Whether the attribute is data."""
    status = node._pytree__nodes.get(name)
    return is_data_value(value) if status is None else status


def _split_attributes(node: Pytree) -> tuple[list[str], list[Any], tuple[Any, ...]]:
    """The names and values of data, and what is static: those names, the constants, and which of these look like data.

    Which data does not look like data is seen again when the object is made anew.
    """
    names: list[str] = []
    children: list[Any] = []
    constants: list[tuple[str, Any]] = []
    for _, name in sorted_attributes(node):
        value = node.__dict__[name]
        if is_data_attribute(node, name, value):
            names.append(name)
            children.append(value)
        else:
            constants.append((name, value))
    own = node.__dict__.get(STATUSES, {})
    static = tuple(name for name, _ in constants if own.get(name) is False)
    return names, children, (tuple(names), tuple(constants), static)


def _register(cls: type[Pytree]) -> None:
    """Objects are pytree nodes: their data is the children, all else static."""

    def flatten(node: Pytree) -> tuple[list[Any], Any]:
        _, children, constants = _split_attributes(node)
        return children, constants

    def flatten_with_keys(node: Pytree) -> tuple[list[Any], Any]:
        names, children, constants = _split_attributes(node)
        keys = (external_key(name) for name in names)
        paths = (jax.tree_util.SequenceKey(k) if isinstance(k, int) else jax.tree_util.GetAttrKey(k) for k in keys)
        return list(zip(paths, children, strict=True)), constants

    def unflatten(constants: Any, children: Iterable[Any]) -> Pytree:
        names, values, static = constants
        data = dict(zip(names, children, strict=True))
        made: Pytree = empty_node(cls, {**dict(values), **data})
        mark_data(made, names, static)
        return made

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)


def dataclass(cls: Any = None, /, **kwargs: Any) -> Any:
    """``dataclasses.dataclass`` for subclasses of ``Pytree``; fields may be ``nnx.data()`` or ``nnx.static()``."""
    if cls is None:
        return lambda cls: dataclass(cls, **kwargs)
    return dataclasses.dataclass(**kwargs)(cls)
