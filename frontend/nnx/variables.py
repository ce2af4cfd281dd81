"""Variables: boxes of one value (an array, mostly) that modules read and assign, with metadata that stays with them.

A variable is shared by reference: two attributes may hold the same one. It may be assigned only while the JAX transform
runs in which it was made; the transforms of this package hand their functions variables of their own and assign the
outer ones afterwards.
"""

from __future__ import annotations

import collections
import copy as copying
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Generic, Self, TypeVar

import jax
import numpy as np

from distaff.frontend import errors
from distaff.frontend.core import spmd
from distaff.frontend.jax_compat import Box, running_trace
from distaff.frontend.nnx import config
from distaff.frontend.nnx.origin import Origin, describe_origin, find_origin
from distaff.frontend.nnx.stored_values import changes_in_place, has_parts, stored, with_part
from distaff.frontend.nnx.variable_metadata import HOOKS, VariableMetadata, as_tuple, with_current_names
from distaff.frontend.nnx.variable_operators import add_operators

A = TypeVar("A")
_MISSING: Any = object()
# Metadata is never changed in place: another dict is another version, which cached structures look at.
_NO_METADATA: dict[str, Any] = {}
# Metadata that every variable has; stored only where it differs from what is here.
_DEFAULTS = {"hijax": False, "ref": False, "eager_sharding": True}


def _without_defaults(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metadata.items() if key not in _DEFAULTS or value != _DEFAULTS[key]}


class Variable(Generic[A]):
    """A box of one value. Subclasses are the kinds that filters select by: ``nnx.Param``, ``nnx.BatchStat``...

    ``variable[...]`` reads the value and ``variable[...] = x`` assigns it; ``variable[index]`` reads or assigns a part.
    Arithmetic and ``jnp`` functions take a variable as its value, and its attributes are those of the value.

    A subclass may define the hooks ``on_get_value(value)``, ``on_set_value(value)``, ``on_create_value(value)`` (each
    returns the value to go on with), ``on_add_axis(index, name)`` and ``on_remove_axis(index, name)``.

    Args:
        value: the value, or the ``VariableMetadata`` that a wrapped initialiser returned.
        hijax: keep the value where JAX's own transforms may change it too: a function under ``jax.jit`` that gets the
            variable, or refers to it, assigns it as if it were not transformed. Not differentiable.
        ref: keep the value in a mutable array (``jax.Ref``), for which the same holds; its shape and dtype are fixed.
        eager_sharding: lay the value out by ``out_sharding`` now (default: ``nnx.use_eager_sharding``).
        metadata: names and values that stay with the variable, such as ``out_sharding``.

    Raises:
        ValueError: ``out_sharding`` is given and there is no mesh to lay the value out on.
    """

    __slots__ = ("__weakref__", "_origin", "_raw_value", "_trace", "_var_metadata")
    __array_priority__ = 100  # so that numpy arrays leave operators to us
    _class_hooks: ClassVar[frozenset[str]] = frozenset()
    required_metadata: ClassVar[frozenset[str]] = frozenset(_DEFAULTS)

    _raw_value: Any
    _trace: Any
    _origin: Origin
    _var_metadata: dict[str, Any]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._class_hooks = frozenset(name for name in HOOKS if hasattr(cls, name))
        _register(cls)

    def __init__(
        self,
        value: A | VariableMetadata[A],
        *,
        hijax: bool | None = None,
        ref: bool | None = None,
        eager_sharding: bool | None = None,
        **metadata: Any,
    ) -> None:
        if isinstance(value, VariableMetadata):
            metadata = {**metadata, **value.as_metadata()}
            value = value.raw_value
        _set_trace(self, running_trace())
        _set_origin(self, find_origin())
        eager = config.current("eager_sharding") if eager_sharding is None else eager_sharding
        if not eager:
            metadata["eager_sharding"] = False
        _set_metadata(self, with_current_names(metadata) if metadata else _NO_METADATA)
        raw = self.create_value(value) if metadata or self._class_hooks else value
        if eager and metadata:
            raw = self._laid_out(raw)
        if config.current("hijax") if hijax is None else hijax:
            _set_metadata(self, {**self._var_metadata, "hijax": True})
        _set_raw(self, stored(raw, self.hijax, config.current("ref") if ref is None else ref))

    def _laid_out(self, value: Any) -> Any:
        names = self._var_metadata.get("out_sharding")
        if not names or not hasattr(value, "shape") or isinstance(value, jax.ShapeDtypeStruct):
            return value
        return spmd.shard_value(value, names, self._var_metadata.get("sharding_rules"), self._var_metadata.get("mesh"))

    # What it is.

    @property
    def type(self) -> type[Variable[Any]]:
        """The class of the variable."""
        return type(self)

    var_type = type

    @property
    def hijax(self) -> bool:
        """Whether JAX's own transforms may change the value."""
        return self._var_metadata.get("hijax", False)  # type: ignore[no-any-return]

    @property
    def ref(self) -> bool:
        """Whether the value lies in a mutable array."""
        return isinstance(self._raw_value, jax.Ref)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the value."""
        return self.get_raw_value().shape  # type: ignore[attr-defined, no-any-return]

    @property
    def sharding_names(self) -> Any:
        """The metadata ``out_sharding``: the name of the mesh axis (or None) of each dimension."""
        return self._var_metadata.get("out_sharding")

    # Metadata.

    def get_metadata(
        self, name: str | None = None, default: Any = _MISSING, *, exclude_required: bool | None = None
    ) -> Any:
        """One piece of metadata, or all in a new dict.

        Args:
            name: which; all if left out.
            default: what to return if there is no such piece.
            exclude_required: leave out what every variable has.

        Raises:
            KeyError: there is no such metadata and no ``default``.
        """
        if name is None:
            required = {} if exclude_required else {**_DEFAULTS, "ref": self.ref}
            own = self._var_metadata
            if exclude_required:
                own = {key: value for key, value in own.items() if key not in _DEFAULTS}
            return {**required, **own}
        if name == "ref":
            return self.ref
        if name in self._var_metadata or default is _MISSING:
            return self._var_metadata[name] if name in self._var_metadata else _DEFAULTS[name]
        return _DEFAULTS.get(name, default)

    def has_metadata(self, name: str) -> bool:
        """Whether there is metadata of that name."""
        return name in self._var_metadata or name in _DEFAULTS

    def set_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Set metadata: all of it (one dict), one piece (name and value), or some (keywords).

        Raises:
            TraceContextError: the variable was made outside the running JAX transform.
            TypeError: other arguments.
            ValueError: another ``hijax``.
        """
        self._check_can_update()
        if kwargs and not args:
            changed = {**self._var_metadata, **kwargs}
        elif len(args) == 1 and not kwargs and isinstance(args[0], Mapping):
            changed = dict(args[0])
        elif len(args) == 2 and not kwargs:
            changed = {**self._var_metadata, args[0]: args[1]}
        else:
            raise TypeError(
                f"set_metadata takes a dict, or a name and a value, or keywords; got {len(args)} arguments and the "
                f"keywords {sorted(kwargs)}."
            )
        if self.hijax != changed.setdefault("hijax", self.hijax):
            raise ValueError("Whether a variable is hijax stays as it is; make a copy: variable.copy(hijax=...).")
        _set_metadata(self, _without_defaults(changed))

    def del_metadata(self, name: str) -> None:
        """Remove one piece of metadata.

        Raises:
            KeyError: there is none of that name, or every variable has it.
            TraceContextError: the variable was made outside the running JAX transform.
        """
        self._check_can_update()
        changed = dict(self._var_metadata)
        if name in _DEFAULTS:
            raise KeyError(f"Every variable has {name!r}.")
        del changed[name]
        _set_metadata(self, changed)

    def __getattr__(self, name: str) -> Any:
        if name in Variable.__slots__:  # not yet set, as in an object that is being copied
            raise AttributeError(name)
        if name in self._var_metadata:
            return self._var_metadata[name]
        return getattr(self.get_value(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _ASSIGNABLE:
            raise AttributeError(
                f"{type(self).__name__} has no attribute {name!r} to assign. Set metadata with "
                f"variable.set_metadata({name}=value), and the value with variable[...] = value."
            )
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        self.del_metadata(name)

    # The value.

    @property
    def _can_update(self) -> bool:
        return self._trace is running_trace() or changes_in_place(self._raw_value)

    def _check_can_update(self) -> None:
        if not self._can_update:
            raise errors.TraceContextError(
                f"Cannot mutate {type(self).__name__} from a different trace level: it was made"
                f"{describe_origin(self._origin)} outside of the JAX transform that runs now. Pass the variable, or "
                "the module that holds it, to the function as an argument and use the transform of nnx, such as "
                "nnx.jit or nnx.grad."
            )

    def get_raw_value(self) -> A:
        """What is stored, without hooks; a ``jax.Ref`` if the value lies in one."""
        raw = self._raw_value
        return raw.get() if self._var_metadata and isinstance(raw, Box) else raw  # type: ignore[no-any-return]

    def set_raw_value(self, value: A, *, _unsafe_bypass_check: bool = False) -> None:
        """Replace what is stored, without hooks.

        Raises:
            TraceContextError: the variable was made outside the running JAX transform.
        """
        if not _unsafe_bypass_check:
            self._check_can_update()
        if isinstance(self._raw_value, Box):
            self._raw_value.set(value)
        else:
            _set_raw(self, value)

    raw_value = property(get_raw_value, set_raw_value)

    def write(self, value: Any) -> None:
        """Store a value without hooks or checks: what transforms assign results with."""
        _set_raw(self, value)

    def create_value(self, value: A) -> A:
        """The value to store at first: ``value`` after the hooks ``on_create_value``."""
        return self._hooked("on_create_value", value)  # type: ignore[no-any-return]

    def _hooked(self, name: str, value: Any) -> Any:
        if name in self._class_hooks:
            value = getattr(self, name)(value)
        for hook in as_tuple(self._var_metadata.get(name, ())):
            value = hook(self, value)
        return value

    def get_value(self, *, index: Any = _MISSING) -> A:
        """The value after the hooks ``on_get_value``; with ``index``, that part of it."""
        value = self._raw_value
        if self._var_metadata and isinstance(value, Box):  # there is metadata if there is a box
            value = value.get()
        if isinstance(value, jax.Ref):
            value = value[... if index is _MISSING else index]
            index = _MISSING
        if self._class_hooks or self._var_metadata:
            value = self._hooked("on_get_value", value)
        return value if index is _MISSING else value[index]  # type: ignore[no-any-return]

    def set_value(self, value: A, *, index: Any = _MISSING) -> None:
        """Assign the value, or with ``index`` a part of it, after the hooks ``on_set_value``.

        Raises:
            TraceContextError: the variable was made outside the running JAX transform.
        """
        if isinstance(value, Variable):
            value = value.get_raw_value()
        raw = self._raw_value
        if isinstance(raw, jax.Ref):
            raw[... if index is _MISSING else index] = self._hooked("on_set_value", value)
            return
        self._check_can_update()
        if self._class_hooks or self._var_metadata:
            value = self._hooked("on_set_value", value)
        if index is not _MISSING:
            value = with_part(self.get_raw_value(), index, value)
        if self._var_metadata and isinstance(raw, Box):
            raw.set(value)
        else:
            _set_raw(self, value)

    value = property(lambda self: self.get_value(), lambda self, value: self.set_value(value))

    def copy_from(self, other: Variable[A]) -> None:
        """Take over the value and the metadata of a variable of the same type.

        Raises:
            ValueError: the types differ.
            TraceContextError: this one was made outside the running JAX transform.
        """
        if type(self) is not type(other):
            raise ValueError(f"Cannot copy a {type(other).__name__} into a {type(self).__name__}: the types differ.")
        self.update_from_state(other)

    def update_from_state(self, variable_state: Variable[A]) -> None:
        """Take over the value and the metadata of another variable."""
        self._check_can_update()
        if isinstance(self._raw_value, jax.Ref) and not isinstance(variable_state._raw_value, jax.Ref):
            self._raw_value[...] = variable_state.get_raw_value()
        else:
            self.set_raw_value(variable_state.get_raw_value())
        if self._var_metadata != variable_state._var_metadata:
            _set_metadata(self, variable_state._var_metadata)

    # Copies.

    def copy(self, value: Any = _MISSING, *, _copy_ref: bool = True, **updates: Any) -> Self:
        """A new variable with the same value and metadata, but for what is given; ``hijax`` and ``ref`` too."""
        raw, hijax = self._raw_value if value is _MISSING else value, self.hijax
        if updates or isinstance(raw, Box) or (hijax and value is not _MISSING):
            hijax, ref = updates.pop("hijax", hijax), updates.pop("ref", self.ref)
            raw = raw.get() if isinstance(raw, Box) else raw
            raw = stored(raw[...] if isinstance(raw, jax.Ref) else raw, hijax, ref)
        elif value is _MISSING and _copy_ref and isinstance(raw, jax.Ref):
            raw = jax.new_ref(raw[...])
        if not updates and hijax is self.hijax:
            return self._of(raw, self._var_metadata)
        metadata = {**self._var_metadata, **updates, "hijax": hijax}
        return self._of(raw, _without_defaults(metadata))

    replace = copy
    to_state = copy

    @classmethod
    def from_metadata(cls, value: Any, attributes: dict[str, Any]) -> Self:
        """A variable that stores ``value`` as it is, with this metadata; no hook runs."""
        metadata = _without_defaults(attributes)
        ref = metadata.pop("ref", isinstance(value, jax.Ref))
        return cls._of(stored(value, metadata.get("hijax", False), ref), metadata or _NO_METADATA)

    @classmethod
    def _of(cls, value: Any, attributes: dict[str, Any]) -> Self:
        made = object.__new__(cls)
        _set_raw(made, value)
        _set_metadata(made, attributes)
        _set_trace(made, running_trace())
        _set_origin(made, ())
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {"_raw_value": self._raw_value, "_var_metadata": self._var_metadata}

    def __setstate__(self, state: dict[str, Any]) -> None:
        _set_raw(self, state["_raw_value"])
        _set_metadata(self, state["_var_metadata"])
        _set_trace(self, running_trace())
        _set_origin(self, ())

    # Axes.

    def add_axis(self, axis_index: int, axis_name: str | None) -> None:
        """Run the hooks ``on_add_axis``: a transform inserted an axis."""
        self._axis_hooks("on_add_axis", axis_index, axis_name)

    def remove_axis(self, axis_index: int, axis_name: str | None) -> None:
        """Run the hooks ``on_remove_axis``: a transform removed an axis."""
        self._axis_hooks("on_remove_axis", axis_index, axis_name)

    def _axis_hooks(self, name: str, index: int, axis_name: str | None) -> None:
        if name in self._class_hooks:
            getattr(self, name)(index, axis_name)
        for hook in as_tuple(self._var_metadata.get(name, ())):
            hook(self, index, axis_name)

    # As a value.

    def __jax_array__(self) -> Any:
        return self.get_value()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.asarray(self.get_value(), dtype=dtype)

    def __getitem__(self, key: Any) -> Any:
        return self.get_value() if key is Ellipsis else self.get_value(index=key)

    def __setitem__(self, key: Any, value: Any) -> None:
        if key is Ellipsis and not has_parts(self.get_raw_value()):
            self.set_value(value)
        else:
            self.set_value(value, index=key)

    def __delitem__(self, key: Any) -> None:
        self._check_can_update()
        changed: Any = copying.copy(self.get_raw_value())
        del changed[key]
        self.set_raw_value(changed)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the value."""
        value: Any = self.get_value()
        return value(*args, **kwargs)

    def __len__(self) -> int:
        return len(self.get_value())  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.get_value())  # type: ignore[call-overload, no-any-return]

    def __contains__(self, item: Any) -> bool:
        return item in self.get_value()  # type: ignore[operator]

    def __round__(self, ndigits: int = 0) -> Any:
        return round(self.get_value(), ndigits)  # type: ignore[call-overload]

    __hash__ = None  # type: ignore[assignment]  # equality compares values

    def __repr__(self) -> str:
        from distaff.frontend.nnx.representation import represent

        return represent(self)


_set_raw = Variable.__dict__["_raw_value"].__set__
_set_trace = Variable.__dict__["_trace"].__set__
_set_origin = Variable.__dict__["_origin"].__set__
_set_metadata = Variable.__dict__["_var_metadata"].__set__
_ASSIGNABLE = frozenset({"value", "raw_value", *Variable.__slots__})


def assign_all(variables: Iterable[Variable[Any]], values: Iterable[Any]) -> None:
    """Store values in variables, without hooks or checks; as ``write`` does, but many at once."""
    collections.deque(map(_set_raw, variables, values), maxlen=0)


def _register(cls: type[Variable[Any]]) -> None:
    """Variables are pytree nodes: the value is the child, the metadata static."""

    def flatten(variable: Variable[Any]) -> tuple[tuple[Any], Any]:
        return (variable._raw_value,), tuple(sorted(variable._var_metadata.items()))

    def flatten_with_keys(variable: Variable[Any]) -> tuple[tuple[Any], Any]:
        children, metadata = flatten(variable)
        return ((jax.tree_util.GetAttrKey("value"), children[0]),), metadata

    def unflatten(metadata: Any, children: Iterable[Any]) -> Variable[Any]:
        (value,) = children
        return cls._of(value, dict(metadata) if metadata else _NO_METADATA)

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)


add_operators(Variable)
_register(Variable)
