"""The kinds of variables, and their names, which are those of Linen's collections."""

from __future__ import annotations

from typing import Any, TypeVar

from distaff.frontend.nnx.variables import Variable

A = TypeVar("A")
_MISSING: Any = object()
_names: dict[str, type[Variable[Any]]] = {}


class _HijaxMeta(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, Variable) and instance.hijax


class HijaxVariable(metaclass=_HijaxMeta):
    """For ``isinstance``: variables of any type that were made with ``hijax=True``."""


class Param(Variable[A]):
    """A parameter, to be trained."""


class BatchStat(Variable[A]):
    """A statistic of the data, as batch normalisation keeps them."""


class Cache(Variable[A]):
    """A value kept from one call to the next, as attention keeps keys and values."""


class Intermediate(Variable[A]):
    """What ``Module.sow`` stores."""


class Perturbation(Intermediate[A]):
    """What ``Module.perturb`` adds to a value, to take the value's gradient."""


def register_variable_name(name: str, typ: Any = _MISSING, *, overwrite: bool = False) -> Any:
    """Give a variable type the name of a collection; without ``typ``, a class decorator.

    Raises:
        ValueError: the name is taken and ``overwrite`` is not set.
    """
    if typ is _MISSING:
        return lambda cls: register_variable_name(name, cls, overwrite=overwrite)
    if name in _names and not overwrite:
        raise ValueError(f"The name {name!r} already belongs to {_names[name]}. Pass overwrite=True to replace it.")
    _names[name] = typ
    return typ


def variable_name_from_type(typ: type[Variable[Any]], /, *, allow_register: bool = False) -> str:
    """The registered name of a type; with ``allow_register`` the name of a new one is that of the class.

    Raises:
        ValueError: the type has no name.
    """
    for name, known in _names.items():
        if known is typ:
            return name
    if not allow_register:
        raise ValueError(f"{typ} has no name. Use nnx.register_variable_name, or pass allow_register=True.")
    register_variable_name(typ.__name__, typ)
    return typ.__name__


def variable_type_from_name(
    name: str, /, *, base: type[Variable[Any]] = Variable, allow_register: bool = False
) -> type[Variable[Any]]:
    """The type of a name; with ``allow_register`` an unknown name makes a new subclass of ``base``.

    Raises:
        ValueError: the name belongs to no type.
    """
    if name not in _names:
        if not allow_register:
            raise ValueError(f"No type is named {name!r}. Use nnx.register_variable_name, or pass allow_register=True.")
        register_variable_name(name, type(name, (base,), {}))
    return _names[name]


for _name, _type in {
    "params": Param,
    "batch_stats": BatchStat,
    "cache": Cache,
    "intermediates": Intermediate,
    "perturbations": Perturbation,
}.items():
    register_variable_name(_name, _type)
