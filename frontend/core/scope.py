"""``Scope``: a cursor into the variables, with the random streams and the reserved names of one module.

The root scope holds all collections, ``{collection: {module: {...: value}}}``. A child holds references to its own
subtrees of them, made on first use.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from jax import Array as Array

from distaff.frontend import errors
from distaff.frontend.configurations import config
from distaff.frontend.core import meta, tracers
from distaff.frontend.core.filters import CollectionFilter, in_filter
from distaff.frontend.core.filters import DenyList as DenyList
from distaff.frontend.core.filters import group_collections as group_collections
from distaff.frontend.core.filters import intersect_filters as intersect_filters
from distaff.frontend.core.filters import is_filter_empty as is_filter_empty
from distaff.frontend.core.filters import subtract_filters as subtract_filters
from distaff.frontend.core.filters import union_filters as union_filters
from distaff.frontend.core.frozen_dict import FrozenDict, freeze
from distaff.frontend.core.initializer_shapes import ignores_key, initializer_shapes
from distaff.frontend.core.rng import KeyCounters, LazyRng, PRNGKey
from distaff.frontend.ids import FlaxId

T = TypeVar("T")

_EMPTY: Mapping[str, Any] = FrozenDict()


def __getattr__(name: str) -> Any:
    """The functions that run with scopes, which Flax has here; they are in ``core.functional``, which imports this."""
    if name in ("apply", "bind", "init", "lazy_init"):
        from distaff.frontend.core import functional

        return getattr(functional, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)


class Variable(Generic[T]):
    """A variable of a scope: read and, if its collection is mutable, assign ``value``."""

    __slots__ = ("collection", "name", "scope", "unbox")

    def __init__(self, scope: Scope, collection: str, name: str, unbox: bool = True) -> None:
        self.scope = scope
        self.collection = collection
        self.name = name
        self.unbox = unbox

    @property
    def value(self) -> T:
        """The current value, without its metadata box unless ``unbox`` is False."""
        value = self.scope.get_variable(self.collection, self.name)
        return meta.unbox(value) if self.unbox else value  # type: ignore[no-any-return]

    @value.setter
    def value(self, value: T) -> None:
        if self.unbox:
            boxed = self.scope.get_variable(self.collection, self.name)
            if isinstance(boxed, meta.AxisMetadata):
                self.scope.put_variable(self.collection, self.name, meta.replace_boxed(boxed, value))
                return
        self.scope.put_variable(self.collection, self.name, value)

    def is_mutable(self) -> bool:
        """Whether the collection can be assigned to."""
        return self.scope.is_mutable_collection(self.collection)


class Scope:
    """Variables, random streams and names of one place in the module tree.

    Args:
        variables: the collections; mutable ones must be plain dicts that belong to the scope.
        rngs: the random stream of each name.
        name: the last part of ``path``.
        mutable: which collections can be assigned to.
        parent: the scope that this one is a child of.
        path: names from the root to here: the module path.
        debug_path: ``path`` with the names of transforms, for messages.
        flags: internal marks, such as ``initializing``.
    """

    __slots__ = (  # noqa: RUF023 (in the order of __init__)
        "_variables", "rngs", "name", "mutable", "parent", "path", "debug_path", "flags", "_root", "key_counters",
        "reservations", "adopted", "trace_level", "_invalid", "__weakref__",
    )  # fmt: skip

    def __init__(
        self,
        variables: dict[str, Any],
        rngs: Mapping[str, PRNGKey | LazyRng] | None = None,
        name: str | None = None,
        mutable: CollectionFilter = False,
        parent: Scope | None = None,
        path: Iterable[str] = (),
        debug_path: Iterable[str] = (),
        flags: Mapping[str, Any] | None = None,
    ) -> None:
        self._variables = variables
        self.rngs = {stream: LazyRng.create(rng) for stream, rng in rngs.items()} if rngs else {}
        self.name = name
        self.mutable = mutable
        self.parent = parent
        self.path = tuple(path)
        self.debug_path = tuple(debug_path or path)
        self.flags: Mapping[str, Any] = flags or {}
        self._root = parent.root if parent else None  # not self: that would be a reference cycle
        self.key_counters = KeyCounters()
        # Collections (None: a child scope) that have something of this name.
        self.reservations: dict[str, set[str | None]] = {}
        # Modules from outside that were cloned into this tree, by the identity of the original: sharing survives.
        self.adopted: weakref.WeakValueDictionary[FlaxId, Any] = (
            parent.root.adopted if parent else weakref.WeakValueDictionary()
        )
        # The JAX transform that the variables belong to.
        self.trace_level: Hashable = parent.trace_level if parent else tracers.current_trace()
        self._invalid = False

    def __eq__(self, other: object) -> bool:
        """Equal scopes behave the same: they are the same place in the same variables with the same counters."""
        return self is other or (
            isinstance(other, Scope)
            and self.root._variables is other.root._variables
            and self.path == other.path
            and self.key_counters is other.key_counters
        )

    def __hash__(self) -> int:
        return hash((id(self.root._variables), self.path, id(self.key_counters)))

    @property
    def root(self) -> Scope:
        """The scope at the top of the tree."""
        return self._root or self

    @property
    def path_text(self) -> str:
        """The path for messages, as in ``/layers_0/attention``."""
        return "/" + "/".join(self.debug_path)

    # Life and names.

    @property
    def invalid(self) -> bool:
        """Whether the call that made the scope is over."""
        return self._invalid

    def invalidate(self) -> None:
        """Refuse all further use."""
        self._invalid = True

    @contextlib.contextmanager
    def temporary(self) -> Iterator[Scope]:
        """Invalidate the scope at the end of the ``with`` block."""
        try:
            yield self
        finally:
            self.invalidate()

    def _check_valid(self) -> None:
        if self._invalid:
            raise errors.InvalidScopeError(self.name)

    def rewound(self, rewind_rngs: bool = False) -> Scope:
        """The same place with no reserved names, so that its contents can be visited again.

        With ``rewind_rngs`` the random streams start again too.
        """
        self._check_valid()
        scope = Scope(
            self._variables, self.rngs, self.name, self.mutable, self.parent, self.path, self.debug_path, self.flags
        )
        scope.adopted = self.adopted
        scope.trace_level = self.trace_level
        if not rewind_rngs:
            scope.key_counters = self.key_counters
        return scope

    def name_reserved(self, name: str, col: str | None = None) -> bool:
        """Whether ``name`` is taken: by a child, or by a variable of the collection ``col`` (None: of any)."""
        taken = self.reservations.get(name)
        return taken is not None and (col is None or None in taken or col in taken)

    def reserve(self, name: str, col: str | None = None) -> None:
        """Take ``name`` for a child (``col`` None) or for a variable of a collection."""
        if not isinstance(name, str):
            raise TypeError(f"Names of modules and variables are strings, got {name!r} of type {type(name)}.")
        if self.name_reserved(name, col):
            raise ValueError(f'Duplicate use of scope name: "{name}" in "{self.path_text}".')
        self.reservations.setdefault(name, set()).add(col)

    def default_name(self, prefix: str) -> str:
        """The first free name of the form ``prefix0``, ``prefix1``, …."""
        number = 0
        while f"{prefix}{number}" in self.reservations:
            number += 1
        return f"{prefix}{number}"

    def push(self, name: str | None = None, prefix: str = "", reuse: bool = False) -> Scope:
        """A child scope.

        Args:
            name: its name; by default the first free one that starts with ``prefix``.
            reuse: take an existing child of that name instead of raising ValueError.
        """
        self._check_valid()
        if name is None:
            name = self.default_name(prefix)
        if not reuse or name not in self.reservations:
            self.reserve(name)
        child = Scope(
            {},
            {stream: LazyRng.create(rng, name) for stream, rng in self.rngs.items()},
            name,
            self.mutable,
            self,
            (*self.path, name),
            (*self.debug_path, name),
            self.flags,
        )
        child.key_counters = self.key_counters.child(name)
        return child

    def child(
        self,
        fn: Callable[..., Any],
        name: str | None = None,
        prefix: str | None = None,
        named_call: bool = True,
        **partial_kwargs: Any,
    ) -> Callable[..., Any]:
        """``fn`` with a child scope as its first argument; calling the result again reuses its variables."""
        if name is None:
            name = self.default_name(f"{getattr(fn, '__name__', '')}_" if prefix is None else prefix)
        scope = self.push(name)

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            with jax.named_scope(name) if named_call else contextlib.nullcontext():
                return fn(scope.rewound(), *args, **{**partial_kwargs, **kwargs})

        return call

    # Variables.

    def variables(self) -> dict[str, Any]:
        """All collections at this place."""
        for col in self.root._variables:
            self._collection(col)
        return self._variables

    def mutable_variables(self) -> Mapping[str, Any]:
        """The mutable collections at this place."""
        mutable = {col: variables for col, variables in self.variables().items() if in_filter(self.mutable, col)}
        return freeze(mutable) if config.flax_return_frozendict else mutable

    def is_mutable_collection(self, col: str) -> bool:
        """Whether variables of the collection can be assigned to."""
        return in_filter(self.mutable, col)

    def is_collection_empty(self, col: str) -> bool:
        """Whether the whole tree has no variable of the collection."""
        return not self.root._variables.get(col)

    def _collection(self, col: str) -> Mapping[str, Any]:
        """This place's part of a collection, for reading; empty if there is none."""
        if col not in self._variables:
            if self.parent is None:
                return _EMPTY
            of_parent = self.parent._collection(col)
            name = self.path[-1]
            if name not in of_parent:
                return _EMPTY
            self._variables[col] = of_parent[name]
        return self._variables[col]  # type: ignore[no-any-return]

    def _mutable_collection(self, col: str) -> dict[str, Any]:
        """This place's part of a collection, for writing; made on the way down from the root if there is none."""
        if col not in self._variables:
            below = {} if self.parent is None else self.parent._mutable_collection(col).setdefault(self.path[-1], {})
            self._variables[col] = below
        return self._variables[col]  # type: ignore[no-any-return]

    def has_variable(self, col: str, name: str) -> bool:
        """Whether the variable has a value."""
        return name in self._collection(col)

    def get_variable(self, col: str, name: str, default: Any = None) -> Any:
        """The stored value (in its box, if it has one), or ``default``."""
        return self._collection(col).get(name, default)

    def put_variable(self, col: str, name: str, value: Any) -> None:
        """Store a value.

        Raises:
            ModifyScopeVariableError: the collection is not mutable.
            JaxTransformError: the value belongs to a JAX transform that was entered inside the module.
        """
        self._check_valid()
        if not self.is_mutable_collection(col):
            raise errors.ModifyScopeVariableError(col, name, self.path_text)
        tracers.check_no_leak(value, self.trace_level, f"{col}/{name}", self.path_text)
        _put(self._mutable_collection(col), name, value)

    def variable(
        self,
        col: str,
        name: str,
        init_fn: Callable[..., Any] | None = None,
        *init_args: Any,
        unbox: bool = True,
        **init_kwargs: Any,
    ) -> Variable[Any]:
        """Declare a variable; ``init_fn(*init_args, **init_kwargs)`` makes its value if it has none.

        Raises:
            ScopeCollectionNotFound, ScopeVariableNotFoundError: it has no value and none can be made.
        """
        self.reserve(name, col)
        if not self.has_variable(col, name):
            if init_fn is None or not self.is_mutable_collection(col):
                if self.is_collection_empty(col):
                    raise errors.ScopeCollectionNotFound(col, name, self.path_text, self.root._variables)
                raise errors.ScopeVariableNotFoundError(name, col, self.path_text)
            self.put_variable(col, name, init_fn(*init_args, **init_kwargs))
        return Variable(self, col, name, unbox)

    def param(
        self, name: str, init_fn: Callable[..., Any], *init_args: Any, unbox: bool = True, **init_kwargs: Any
    ) -> Any:
        """Declare a parameter and return its value; ``init_fn(key, *init_args, **init_kwargs)`` makes it at init.

        Raises:
            ScopeCollectionNotFound, ScopeParamNotFoundError: it has no value and none can be made.
            ScopeParamShapeError: its value has another shape than ``init_fn`` would make.
        """
        self.reserve(name, "params")
        params = self._collection("params")
        if name in params:
            value = params[name]
            self._check_shapes(name, value, initializer_shapes(init_fn, init_args, init_kwargs))
        else:
            if not self.is_mutable_collection("params"):
                if self.is_collection_empty("params"):
                    raise errors.ScopeCollectionNotFound("params", name, self.path_text, self.root._variables)
                raise errors.ScopeParamNotFoundError(name, self.path_text)
            key = self.make_rng("params", needed=not ignores_key(init_fn))
            value = init_fn(key, *init_args, **init_kwargs)
            self.put_variable("params", name, value)
        return meta.unbox(value) if unbox else value

    def _check_shapes(self, name: str, value: Any, declared: tuple[tuple[Any, ...], ...]) -> None:
        for leaf, shape in zip(jax.tree.leaves(value), declared, strict=False):
            if np.shape(leaf) != shape:
                raise errors.ScopeParamShapeError(name, self.path_text, np.shape(leaf), shape)

    # Random keys and flags.

    def has_rng(self, name: str) -> bool:
        """Whether a random stream of this name was given."""
        return name in self.rngs

    def make_rng(self, name: str = "params", needed: bool = True) -> PRNGKey:
        """A new key from the stream, or from ``params`` if there is no such stream.

        If it is not ``needed``, the draw counts and the key is that of the stream, which costs less.

        Raises:
            InvalidRngError: neither was given.
        """
        stream = name if name in self.rngs else "params"
        if stream not in self.rngs:
            raise errors.InvalidRngError(
                f'At "{self.path_text}", {self.name} needs PRNG for "{name}". Pass a key: '
                f'model.apply(variables, x, rngs={{"{name}": jax.random.key(0)}}).'
            )
        self._check_valid()
        count = self.key_counters.next(stream)
        rng = self.rngs[stream]
        return LazyRng.create(rng, count).as_jax_rng() if needed else rng.rng

    def has_flag(self, key: str) -> bool:
        """Whether an internal mark is set."""
        return key in self.flags

    def get_flag(self, key: str, default: Any = None) -> Any:
        """The value of an internal mark, or ``default``."""
        return self.flags.get(key, default)


def _put(target: dict[str, Any], name: str, value: Any) -> None:
    """Assign, but write a dict into an existing dict: child scopes hold references to it."""
    old = target.get(name)
    if isinstance(old, dict) and isinstance(value, Mapping):
        for key, item in value.items():
            _put(old, key, item)
    else:
        target[name] = value
