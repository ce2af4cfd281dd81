"""Lifted transforms for modules: a transform of functions of scopes becomes one of module classes and functions.

A transform takes a function of a tree of scopes. Around it, the module, the modules in its fields, and the modules and
variables among the arguments give up their scopes; inside, clones of them get the scopes that the transform made.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from distaff.frontend import errors, struct
from distaff.frontend.core.lift.compiled import Calls
from distaff.frontend.core.lift.pack import outermost_scopes, scopes_at
from distaff.frontend.core.rng import LazyRng
from distaff.frontend.core.scope import Scope, Variable
from distaff.frontend.linen.attributes import PLAIN_TYPES
from distaff.frontend.linen.class_transform import wrap_method
from distaff.frontend.linen.fingerprint import _HashableProxy
from distaff.frontend.linen.module import Module, unbound_function
from distaff.frontend.linen.module_base import ModuleState

Transform = Callable[..., Callable[..., Any]]


@struct.dataclass
class _Placeholder:
    """Stands for a module or variable among the arguments of a transform: a tree without leaves."""

    index: int = struct.field(pytree_node=False)


def _has_scope(x: Any) -> bool:
    return isinstance(x, Module | Variable) and isinstance(x.scope, Scope)


def _fields(module: Module) -> dict[str, Any]:
    return {name: getattr(module, name) for name in module._config_fields}


class _Crossing:
    """A module and the arguments of a call, on their way into a transform.

    ``scopes`` goes through the transform, as do ``args`` and ``kwargs``; ``inside`` makes a module and arguments of
    what arrives.
    """

    def __init__(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module = module
        self._found: dict[int, Module | Variable[Any]] = {}
        self.args, self.kwargs = jax.tree.map(self._find_argument, (args, kwargs))
        self._find(module)
        self.scopes, self._places = outermost_scopes([x.scope for x in self._found.values()])  # type: ignore[misc]

    def _find_argument(self, x: Any) -> Any:
        if not _has_scope(x):
            return x
        self._find(x)
        return _Placeholder(list(self._found).index(id(x)))

    def _find(self, x: Any) -> None:
        """Note the modules and variables in the fields of a module, and then itself."""
        if id(x) in self._found or not _has_scope(x):
            return
        if isinstance(x, Module):
            for value in _fields(x).values():
                if type(value) not in PLAIN_TYPES:
                    jax.tree.map(self._find, value)
        self._found[id(x)] = x

    @property
    def passengers(self) -> list[Module | Variable[Any]]:
        """The modules and variables, the module itself last."""
        return list(self._found.values())

    def inside(
        self, scopes: Sequence[Scope], args: Any, kwargs: Any, cls: type[Module], state: ModuleState
    ) -> tuple[Module, Any, Any]:
        """The module as an instance of ``cls``, and the arguments, with these scopes."""
        cast = _Cast(self._found, scopes_at(scopes, self._places))
        module = cast.module(self.module, cls)
        module.__dict__["_state"] = state.inside_transform()
        originals = self.passengers

        def argument(x: Any) -> Any:
            return cast(originals[x.index]) if isinstance(x, _Placeholder) else x

        args, kwargs = jax.tree.map(argument, (args, kwargs), is_leaf=lambda x: isinstance(x, _Placeholder))
        return module, args, kwargs


class _Cast:
    """The inner modules and variables for the outer ones, one for each."""

    def __init__(self, found: Mapping[int, Any], scopes: Sequence[Scope]) -> None:
        self._scopes = dict(zip(found, scopes, strict=True))
        self._made: dict[int, Any] = {}

    def __call__(self, x: Any) -> Any:
        if id(x) not in self._scopes:
            return x
        if id(x) not in self._made:
            self._made[id(x)] = (
                self.module(x, type(x))
                if isinstance(x, Module)
                else Variable(self._scopes[id(x)], x.collection, x.name, x.unbox)
            )
        return self._made[id(x)]

    def module(self, module: Module, cls: type[Module]) -> Module:
        """An instance of ``cls`` with the fields of ``module``, on the inner scope."""
        fields = {
            name: value if type(value) in PLAIN_TYPES else jax.tree.map(self, value)
            for name, value in _fields(module).items()
        }
        return cls(**fields, name=module.name, parent=self._scopes.get(id(module)))


def _check_output(output: Any, name: object) -> None:
    if any(isinstance(leaf, Module | Variable) for leaf in jax.tree.leaves(output)):
        raise errors.TransformedMethodReturnValueError(name)


def _name_of(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", "unnamed_function")


def lifted(
    transform: Transform,
    functions: tuple[Callable[..., Any], ...],
    cls: type[Module] | None = None,
    one_scope: bool = False,
) -> Callable[..., Any]:
    """``transform(*functions)`` as a function of a module.

    Args:
        transform: takes functions of scopes and returns one.
        functions: functions of a module, with the state handling of methods around them.
        cls: the class of the module inside; by default its own.
        one_scope: the transform takes one scope, not a list.
    """

    @functools.wraps(functions[0])
    def call(module: Module, *args: Any, **kwargs: Any) -> Any:
        crossing = _Crossing(module, args, kwargs)
        state = module._state.inside_transform()

        def of_scopes(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def run(scopes: Any, *args: Any, **kwargs: Any) -> Any:
                inner, args, kwargs = crossing.inside(
                    [scopes] if one_scope else scopes, args, kwargs, cls or type(module), state
                )
                output = function(inner, *args, **kwargs)
                module._state.follow(inner._state)
                _check_output(output, _name_of(function))
                return output

            return run

        scopes = _only(crossing.scopes) if one_scope else crossing.scopes
        return transform(*map(of_scopes, functions))(scopes, *crossing.args, **crossing.kwargs)

    return call


def _only(scopes: list[Scope]) -> Scope:
    if len(scopes) != 1:
        paths = ", ".join(scope.path_text for scope in scopes)
        raise NotImplementedError(
            f"This transform takes the variables of one place in the tree, and the modules in its arguments and fields "
            f"have them at several: {paths}. Pass a module that contains all of them, or multi_scope=True to nn.vjp."
        )
    return scopes[0]


@contextlib.contextmanager
def _forked_rngs(module: Module) -> Iterator[None]:
    """Let the streams of the module start at keys drawn from them."""
    scope = module.scope
    if scope is None:  # nothing to draw
        yield
        return
    before = scope.rngs
    scope.rngs = {stream: LazyRng.create(scope.make_rng(stream)) for stream in before}
    try:
        yield
    finally:
        scope.rngs = before


def lifted_once(
    transform: Transform, function: Callable[..., Any], cls: type[Module] | None = None
) -> Callable[..., Any]:
    """As ``lifted``, for a transform that keeps what it made of the function, for all later calls.

    The transform's result gets, after the scopes, a key: equal keys mean that the function does the same.
    """
    calls = Calls()
    # What calls with a key left behind: on a later call, the function does not run.
    states: dict[Any, ModuleState] = {}

    def run(scopes: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        crossing, state = calls.stack[-1]
        inner, args, kwargs = crossing.inside(scopes, args, kwargs, cls or type(crossing.module), state)
        output = function(inner, *args, **kwargs)
        states[key] = inner._state.inside_transform()
        _check_output(output, _name_of(function))
        return output

    transformed = transform(functools.wraps(function)(run))

    @functools.wraps(function)
    def call(module: Module, *args: Any, **kwargs: Any) -> Any:
        with _forked_rngs(module):
            crossing = _Crossing(module, args, kwargs)
            key = tuple(_HashableProxy.from_module(x) for x in crossing.passengers)
            with calls.running((crossing, module._state.inside_transform())):
                output = transformed(crossing.scopes, key, *crossing.args, **crossing.kwargs)
        module._state.follow(states[key])
        return output

    return call


def is_module_class(target: Any) -> bool:
    """Whether ``target`` is a module class, or a ``functools.partial`` of one."""
    if isinstance(target, functools.partial):
        return is_module_class(target.func)
    return inspect.isclass(target) and issubclass(target, Module)


def lift_transform(
    transform: Callable[..., Any], target: Any, *, methods: Any = None, cached: bool = False, **options: Any
) -> Any:
    """``transform`` applied to a module class (some of its methods) or to a function of a module.

    Args:
        transform: ``transform(fn, **options)`` of a function of scopes.
        methods: for a class, the names of the methods (by default ``__call__``), or for each its own options.
        cached: ``transform`` keeps what it made; see ``lifted_once``.

    Raises:
        TransformTargetError: ``target`` is neither.
    """

    def lift(fn: Callable[..., Any], options: Mapping[str, Any], cls: type[Module] | None = None) -> Any:
        configured = functools.partial(transform, **options)
        return lifted_once(configured, fn, cls) if cached else lifted(configured, (fn,), cls)

    if is_module_class(target):
        return _transformed_class(transform.__name__, lift, target, methods, options)
    if not callable(target) or isinstance(target, Module):
        raise errors.TransformTargetError(target)
    return lift(wrap_method(target), options)


def _transformed_class(
    name: str, lift: Callable[..., Any], target: Any, methods: Any, options: Mapping[str, Any]
) -> Any:
    if isinstance(target, functools.partial):
        cls = _transformed_class(name, lift, target.func, methods, options)
        return functools.partial(cls, *target.args, **target.keywords)
    if methods is None:
        methods = ("__call__",)
    if not isinstance(methods, list | tuple | dict):
        raise ValueError(f"methods must be None, a list of names or a dict of options by name, got {methods!r}.")
    by_method = methods if isinstance(methods, dict) else dict.fromkeys(methods, options)
    lifted_methods = {method: lift(getattr(target, method), own, target) for method, own in by_method.items()}
    return type(name.capitalize() + target.__name__, (target,), {"__module__": target.__module__, **lifted_methods})


def lift_direct(
    transform: Callable[..., Any],
    functions: Sequence[Callable[..., Any]],
    module: Module,
    *args: Any,
    one_scope: bool = False,
    **options: Any,
) -> Any:
    """``transform(*functions, scopes, *args, **options)`` with functions of a module, called at once."""
    for function in functions:
        if is_module_class(function) or not callable(function):
            raise ValueError(
                f"The {transform.__name__} transform takes functions with a module as first argument, such as methods; "
                f"got {function!r}. Create the module, and pass lambda module, x: module(x)."
            )

    def call(*functions: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(transform, *functions)

    wrapped = tuple(wrap_method(unbound_function(function)) for function in functions)
    return lifted(call, wrapped, one_scope=one_scope)(module, *args, **options)
