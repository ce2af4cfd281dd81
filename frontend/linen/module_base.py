"""What a bound module can do: variables, random keys, and questions about the call that it is part of."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp

from distaff.frontend import errors
from distaff.frontend.core.rng import PRNGKey
from distaff.frontend.core.scope import Scope, Variable


class SetupState(enum.IntEnum):
    """Whether a module's ``setup`` has run: not at all, only on the outside of the present transform, or here."""

    NEW = 0
    TRANSFORMED = 1
    DONE = 2


class ModuleState:
    """The changing part of a module: where it is in its life, and what it has made so far."""

    __slots__ = (
        "autoname_cursor", "children", "in_compact_method", "in_setup", "is_initialized", "setup_called",
    )  # fmt: skip

    def __init__(self) -> None:
        self.in_compact_method = False
        self.in_setup = False
        self.setup_called = SetupState.NEW
        self.is_initialized = False
        # The next number of each class's automatic names: {"Dense": 2} after Dense_0 and Dense_1.
        self.autoname_cursor: dict[str, int] = {}
        # Submodules, and for variables the collection, by name.
        self.children: dict[str, ModuleBase | str] = {}

    def reset(self) -> None:
        """Back to where a method that may create submodules starts."""
        self.in_compact_method = False
        self.in_setup = False
        self.autoname_cursor = {}

    def inside_transform(self) -> ModuleState:
        """The state of the module's clone inside a lifted transform; setup runs again there."""
        state = ModuleState()
        state.setup_called = SetupState.TRANSFORMED if self.setup_called else SetupState.NEW
        state.follow(self)
        return state

    def follow(self, other: ModuleState) -> None:
        """Take over where ``other`` is, on the other side of a transform; not what it has made."""
        self.in_compact_method = other.in_compact_method
        self.in_setup = other.in_setup
        self.is_initialized = other.is_initialized
        self.autoname_cursor = dict(other.autoname_cursor)


def _append(xs: tuple[Any, ...], x: Any) -> tuple[Any, ...]:
    return (*xs, x)


def _empty() -> tuple[Any, ...]:
    return ()


@dataclass_transform(field_specifiers=(dataclasses.field,))
class ModuleBase:
    """A module's access to its scope. Type checkers read here that module classes are dataclasses."""

    scope: Scope | None = None
    _state: ModuleState

    def _bound(self, purpose: str) -> Scope:
        if self.scope is None:
            raise ValueError(
                f"Can't {purpose} on unbound modules ({type(self).__name__}). Do it inside a method that runs under "
                "init or apply, or on module.bind(variables)."
            )
        return self.scope

    def _declares(self, kind: str, name: str, col: str) -> Scope:
        """The scope, for a method that may declare a variable ``name`` here and now."""
        if not self._initialization_allowed:
            raise ValueError(
                f'The {kind} "{name}" of {type(self).__name__} must be initialized in `setup()` or in a method wrapped '
                "in `@compact`."
            )
        scope = self._bound(f"declare a {kind}")
        if scope.name_reserved(name, col):
            raise errors.NameInUseError(kind, name, type(self).__name__)
        return scope

    @property
    def _initialization_allowed(self) -> bool:
        """Whether submodules and variables may be created: in setup, in compact methods, and at construction."""
        state = self._state
        return not state.is_initialized or state.in_setup or state.in_compact_method

    def param(
        self, name: str, init_fn: Callable[..., Any], *init_args: Any, unbox: bool = True, **init_kwargs: Any
    ) -> Any:
        """Declare a parameter, a variable of the collection ``params``, and return its value.

        Args:
            name: its name in this module.
            init_fn: ``init_fn(key, *init_args, **init_kwargs)`` makes the initial value.
            unbox: return the value without its metadata box.

        Raises:
            NameInUseError: the name is taken.
            ScopeParamNotFoundError, ScopeCollectionNotFound: ``apply`` was not given the parameter.
            ScopeParamShapeError: the given parameter has another shape.
        """
        scope = self._declares("param", name, "params")
        value = scope.param(name, init_fn, *init_args, unbox=unbox, **init_kwargs)
        self._state.children[name] = "params"
        return value

    def variable(
        self,
        col: str,
        name: str,
        init_fn: Callable[..., Any] | None = None,
        *init_args: Any,
        unbox: bool = True,
        **init_kwargs: Any,
    ) -> Variable[Any]:
        """Declare a variable of the collection ``col``; its ``.value`` is read and, if mutable, assigned to.

        Args:
            init_fn: ``init_fn(*init_args, **init_kwargs)`` makes the initial value; it is given no key. None: the
                variable must be passed to ``apply``.
            unbox: ``.value`` is without its metadata box.

        Raises:
            NameInUseError: the name is taken.
            ScopeVariableNotFoundError, ScopeCollectionNotFound: it has no value and none can be made.
        """
        scope = self._declares("variable", name, col)
        variable = scope.variable(col, name, init_fn, *init_args, unbox=unbox, **init_kwargs)
        self._state.children[name] = col
        return variable

    @property
    def variables(self) -> dict[str, Any]:
        """The variables of this module and its submodules, by collection."""
        return self._bound("access variables").variables()

    def get_variable(self, col: str, name: str, default: Any = None) -> Any:
        """The value of a variable of this module, or ``default``."""
        return self._bound("access variables").get_variable(col, name, default)

    def put_variable(self, col: str, name: str, value: Any) -> None:
        """Store the value of a variable of this module; ModifyScopeVariableError if the collection is immutable."""
        self._bound("access variables").put_variable(col, name, value)

    def has_variable(self, col: str, name: str) -> bool:
        """Whether this module has a variable of that name with a value."""
        return self._bound("access variables").has_variable(col, name)

    def is_mutable_collection(self, col: str) -> bool:
        """Whether the collection can be assigned to in this call."""
        return self._bound("check mutability").is_mutable_collection(col)

    def has_rng(self, name: str) -> bool:
        """Whether a random stream of that name was given to this call."""
        return self._bound("query for RNGs").has_rng(name)

    def make_rng(self, name: str = "params") -> PRNGKey:
        """A new key from a random stream, or from ``params`` if the stream was not given.

        The key depends on the given key, the module's path and the number of the draw, and on nothing else.
        """
        return self._bound("use RNGs").make_rng(name)

    def is_initializing(self) -> bool:
        """Whether this call is ``init``."""
        return bool(self._bound("check if init is running").get_flag("initializing", False))

    @property
    def path(self) -> tuple[str, ...]:
        """The names from the root module, whose path is ``()``, to this one."""
        return self._bound("access module paths").path

    def sow(
        self,
        col: str,
        name: str,
        value: Any,
        reduce_fn: Callable[[Any, Any], Any] = _append,
        init_fn: Callable[[], Any] = _empty,
    ) -> bool:
        """Leave a value in a collection for the caller of ``apply(..., mutable=[col])``.

        Args:
            reduce_fn: joins what is there and the new value; by default values are collected in a tuple.
            init_fn: makes what the first value is joined to.

        Returns:
            False, with nothing stored, if the collection is not mutable.
        """
        scope = self._bound("store variables")
        if not scope.is_mutable_collection(col):
            return False
        if not scope.has_variable(col, name):
            scope.reserve(name, col)
            self._state.children[name] = col
        stored = scope.get_variable(col, name) if scope.has_variable(col, name) else init_fn()
        scope.put_variable(col, name, reduce_fn(stored, value))
        return True

    def perturb(self, name: str, value: Any, collection: str = "perturbations") -> Any:
        """``value`` plus a zero variable, so that the gradient by that variable is the gradient by ``value``.

        Without the collection among the variables given to ``apply``, the value itself.
        """
        scope = self._bound("store variables")
        if scope.is_mutable_collection(collection) and not scope.has_variable(collection, name):
            scope.reserve(name, collection)
            self._state.children[name] = collection
            scope.put_variable(collection, name, jax.tree.map(jnp.zeros_like, value))
        if collection not in scope.root._variables:
            return value
        if not scope.has_variable(collection, name):
            raise ValueError(
                f'Perturbation collection "{collection}" was passed to apply without "{name}" at "{scope.path_text}". '
                "Make the perturbations with init, or leave the collection out."
            )
        return jax.tree.map(jnp.add, value, scope.get_variable(collection, name))
