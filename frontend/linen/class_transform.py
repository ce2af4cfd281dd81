"""What becomes of a module class when it is defined: a dataclass, with methods that keep the module's state.

All inspection happens here, once a class; a call of a method costs a few attribute reads.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import jax

from distaff.frontend import errors
from distaff.frontend.linen.context import context, intercepted
from distaff.frontend.linen.module_base import ModuleBase, SetupState

if TYPE_CHECKING:
    from distaff.frontend.linen.module import Module

F = TypeVar("F", bound=Callable[..., Any])

_RESERVED = ("parent", "name")
_NEVER_WRAPPED = frozenset(
    {"__eq__", "__repr__", "__init__", "__hash__", "__post_init__", "__setattr__", "__getattr__"}
)
_NAME_TYPES = (str, str | None, "str", "str | None", "Optional[str]")


def compact(fun: F) -> F:
    """Let a method create submodules, parameters and variables where it uses them.

    >>> class MLP(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return nn.Dense(4)(nn.relu(nn.Dense(8)(x)))
    """
    fun.compact = True  # type: ignore[attr-defined]
    return fun


def nowrap(fun: F) -> F:
    """Leave a method as it is: it does not trigger ``setup`` and cannot be intercepted."""
    fun.nowrap = True  # type: ignore[attr-defined]
    return fun


def compact_name_scope(fun: F) -> F:
    """Let a method create submodules where it uses them, below a level of the tree that has the method's name.

    >>> class Codec(nn.Module):
    ...     @nn.compact_name_scope
    ...     def encode(self, x):
    ...         return nn.Dense(2)(x)  # parameters at encode/Dense_0
    """
    name = fun.__name__

    @functools.wraps(fun)
    def method(module: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(module, "_name_scopes"):
            raise ValueError(
                f"Cannot call compact_name_scope method {name!r} on a Module that has not been setup. Call it inside "
                "init, apply or bind, and not in setup()."
            )
        return module._name_scopes[name](*args, **kwargs)

    method.compact_name_scope = True  # type: ignore[attr-defined]
    method.nowrap = True  # type: ignore[attr-defined]
    return method  # type: ignore[return-value]


def make_dataclass(cls: Any, kw_only: bool) -> None:
    """Make a module class a dataclass in place, with the keyword-only fields ``parent`` and ``name``."""
    annotations = inspect.get_annotations(cls)
    if "parent" in annotations or annotations.get("name", str) not in _NAME_TYPES:
        raise errors.ReservedModuleAttributeError(annotations)
    if "name" in annotations:
        cls.name = dataclasses.field(default=None, kw_only=True)
    for name in annotations:
        field = cls.__dict__.get(name)
        if isinstance(field, dataclasses.Field) and not field.init:
            # Set in setup: modules that were not set up yet do not have it.
            field.compare, field.hash, field.repr = False, False, False
    dataclasses.dataclass(repr=False, kw_only=kw_only, unsafe_hash="__hash__" not in cls.__dict__)(cls)
    for name in _RESERVED:  # after the class's own fields, as for readers of the signature
        cls.__dataclass_fields__[name] = cls.__dataclass_fields__.pop(name)
    if not hasattr(cls.__hash__, "of_unbound"):
        cls.__hash__ = _hash_of_unbound(cls.__hash__)
    scoped = [name for name, value in cls.__dict__.items() if hasattr(value, "compact_name_scope")]
    inherited = cls._compact_name_scope_methods
    cls._compact_name_scope_methods = (*inherited, *(name for name in scoped if name not in inherited))
    cls._config_fields = tuple(f.name for f in dataclasses.fields(cls) if f.init and f.name not in _RESERVED)


def _hash_of_unbound(hash_fn: Callable[[Any], int]) -> Callable[[Any], int]:
    @functools.wraps(hash_fn)
    def hash_module(self: Any) -> int:
        if self.scope is not None:
            raise TypeError("Can't call __hash__ on modules that hold variables.")
        try:
            return hash_fn(self)
        except TypeError as error:
            raise TypeError(
                "Failed to hash a module: it has an attribute that cannot be hashed. Use tuples for lists and "
                f"FrozenDict for dicts. The module: {self}"
            ) from error

    hash_module.of_unbound = True  # type: ignore[attr-defined]
    return hash_module


def wrap_methods(cls: type[Any], names: list[str]) -> None:
    """Wrap the methods among the class's attributes ``names``; a callable that is a field's default is no method."""
    for name in set(names) - cls.__dict__["__dataclass_fields__"].keys() - _NEVER_WRAPPED:
        value = cls.__dict__.get(name)
        binds = hasattr(type(value), "__get__") and not isinstance(value, type | staticmethod | classmethod)
        if callable(value) and binds and not hasattr(value, "nowrap"):
            setattr(cls, name, wrap_method(value))


def wrap_method(fun: Callable[..., Any]) -> Callable[..., Any]:
    """A method that sets the module up, marks it as running, and sows its output if that is asked for."""
    if hasattr(fun, "method_handler_wrapped"):
        return fun
    name = getattr(fun, "__name__", "unnamed_function")
    is_setup = name == "setup"
    run = _run_setup if is_setup else _run_compact if hasattr(fun, "compact") else _run
    profile_suffix = "" if name == "__call__" else f".{name}"

    @functools.wraps(fun)
    def method(*args: Any, **kwargs: Any) -> Any:
        if not args or not isinstance(args[0], ModuleBase):
            return fun(*args, **kwargs)
        module: Any = args[0]
        if not is_setup and module.scope is not None and module._state.setup_called is not SetupState.DONE:
            module._try_setup()
        if context.interceptors:
            return run(module, name, profile_suffix, intercepted(fun, module, name), args[1:], kwargs)
        return run(module, name, profile_suffix, fun, args, kwargs)

    method.method_handler_wrapped = True  # type: ignore[attr-defined]
    return method


def _run(
    module: Module,
    name: str,
    profile_suffix: str,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    context.module_stack.append(module)
    try:
        if context.named_calls:
            with jax.named_scope((module.name or type(module).__name__) + profile_suffix):
                output = call(*args, **kwargs)
        else:
            output = call(*args, **kwargs)
        capture = context.capture_stack[-1]
        if capture and capture(module, name):
            module.sow("intermediates", name, output)
        return output
    finally:
        context.module_stack.pop()


def _run_compact(module: Module, *call: Any) -> Any:
    if module.scope is None:
        raise errors.CallCompactUnboundModuleError()
    state = module._state
    is_outermost = not state.in_compact_method
    state.in_compact_method = True
    try:
        return _run(module, *call)
    finally:
        # A second call declares the same names again, and finds their variables.
        object.__setattr__(module, "scope", module.scope.rewound())
        if is_outermost:
            state.reset()


def _run_setup(module: Module, *call: Any) -> Any:
    if module.scope is None:
        raise errors.CallSetupUnboundModuleError()
    state = module._state
    is_outermost = not state.in_setup
    state.in_setup = True
    try:
        return _run(module, *call)
    finally:
        if is_outermost:
            state.reset()
