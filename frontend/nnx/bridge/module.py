"""``bridge.Module``: modules of NNX written as those of Linen, with ``init``, ``apply``, ``setup``, ``compact``."""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from distaff.frontend import errors
from distaff.frontend.core import FrozenDict
from distaff.frontend.core.filters import CollectionFilter
from distaff.frontend.core.meta import unbox as unbox_value
from distaff.frontend.nnx.bridge.variables import linen_vars_to_nnx_attrs, nnx_attrs_to_linen_vars, to_nnx_var
from distaff.frontend.nnx.filters import Not
from distaff.frontend.nnx.graph_functions import clone, state, update
from distaff.frontend.nnx.module import Module as NNXModule
from distaff.frontend.nnx.pytrees import Pytree, PytreeMeta
from distaff.frontend.nnx.rngs import Rngs, RngState
from distaff.frontend.nnx.state import State, to_flat_state
from distaff.frontend.nnx.traversal import iter_graph
from distaff.frontend.nnx.variable_kinds import Param
from distaff.frontend.nnx.variables import Variable
from distaff.frontend.traverse_util import unflatten_dict

F = TypeVar("F", bound=Callable[..., Any])


class AttrPriority(enum.IntEnum):
    """Which attribute comes first in the graph, and so gives a module that stands at several places its path."""

    HIGH = 0
    INIT_PARENT = 20
    DEFAULT = 50
    LOW = 100


class ModuleState(State):
    """Variables given to ``apply`` for a submodule that does not exist yet; hidden until it is assigned."""


class Scope(Pytree):
    """What one ``init`` or ``apply`` gives its modules.

    Attributes:
        rngs: the random streams.
        mutable: the collections that may change.
        initializing: whether ``init`` runs.
    """

    def __init__(self, rngs: Rngs, mutable: CollectionFilter, initializing: bool = False) -> None:
        self.rngs = rngs
        self.mutable = mutable
        self.initializing = initializing

    def copy(self) -> Scope:
        """Another scope with the same streams."""
        return Scope(self.rngs, self.mutable, self.initializing)


@dataclasses.dataclass
class ModuleStackEntry:
    """A module that runs: whether in a compact method, and how many submodules of each class that has made."""

    module: Module
    in_compact: bool
    type_counter: defaultdict[type, int] = dataclasses.field(default_factory=lambda: defaultdict(int))

    def next_name(self, cls: type) -> str:
        """The name of the next submodule of a class: ``Dense_0``, ``Dense_1``, …"""
        number = self.type_counter[cls]
        self.type_counter[cls] += 1
        return f"{cls.__name__}_{number}"


class ModuleContext(threading.local):
    """The modules that run in this thread, the innermost last; the first entry is None."""

    def __init__(self) -> None:
        self.module_stack: list[ModuleStackEntry | None] = [None]


MODULE_CONTEXT = ModuleContext()


class _Running:
    """A block in which a module is the innermost that runs."""

    def __init__(self, module: Module, in_compact: bool = False) -> None:
        self._entry = ModuleStackEntry(module, in_compact)

    def __enter__(self) -> None:
        MODULE_CONTEXT.module_stack.append(self._entry)

    def __exit__(self, *_: object) -> None:
        MODULE_CONTEXT.module_stack.pop()


def current_context() -> ModuleStackEntry | None:
    """The entry of the module that runs, if any."""
    return MODULE_CONTEXT.module_stack[-1]


def current_module() -> Module | None:
    """The module that runs, if any."""
    context = current_context()
    return None if context is None else context.module


def running_parent(what: str) -> tuple[ModuleStackEntry, Scope]:
    """The entry and the scope of the module that runs; ValueError if none does, or it has no variables yet."""
    context = current_context()
    if context is None or context.module.scope is None:
        raise ValueError(f"{what} can be made only in a bridge.Module, while its `init` or `apply` runs.")
    return context, context.module.scope


def compact(method: F) -> F:
    """Mark a method that declares submodules and variables where it uses them."""

    @functools.wraps(method)
    def run(self: Module, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, Module):
            raise ValueError(f"bridge.compact is for methods of a bridge.Module, not of a {type(self).__name__}.")
        with _Running(self, in_compact=True):
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]


class ModuleMeta(PytreeMeta):
    """Makes modules; in a compact method, or where they are given a name, they become submodules of what runs."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """A new module; in a compact method, that of the same name from an earlier call if there is one."""
        context = current_context()
        name = None
        attached = context is not None and "parent" not in kwargs
        if context is not None:
            if kwargs.pop("parent", None) is not None and context.in_compact:
                raise ValueError("In a compact method, 'parent' can only be None: the parent is the module that runs.")
            name = kwargs.get("name")
            if name is not None and not isinstance(name, str):
                raise ValueError(f"'name' must be a 'str', got {type(name).__name__}")
            if "name" not in inspect.get_annotations(cls):
                kwargs.pop("name", None)
            if name is None and attached and context.in_compact:
                name = context.next_name(cls)
        module = super().__call__(*args, **kwargs)
        if context is None or not attached or name is None:
            return module
        return adopt(running_parent(f"The submodule {name!r}")[0].module, name, module)


def adopt(parent: Module, name: str, module: Any) -> Any:
    """Make ``module`` the submodule ``name``, or return the one of that name from an earlier call."""
    current = vars(parent).get(name)
    if isinstance(current, NNXModule):
        return current
    setattr(parent, name, module)
    parent.set_attr_priority(name, AttrPriority.INIT_PARENT)
    return module


class Module(NNXModule, metaclass=ModuleMeta):
    """Base class of modules with Linen's way of writing: annotated fields, ``setup`` or ``compact`` methods.

    >>> class Dense(bridge.Module):
    ...     features: int
    ...     @bridge.compact
    ...     def __call__(self, x):
    ...         return x @ self.param("kernel", nn.initializers.normal(), (x.shape[-1], self.features))
    >>> variables = Dense(4).init(0, x)
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(pytree=False, **kwargs)
        dataclasses.dataclass(eq=False, repr=False)(cls)

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if type(value) is ModuleState:
            raise AttributeError(
                f"{type(self).__name__!r} has no attribute {name!r} yet, but was given variables of it."
            )
        return value

    @property
    def scope(self) -> Scope | None:
        """What ``init`` or ``apply`` gave the module while it runs."""
        return vars(self).get("bridge_scope")

    @property
    def attr_priorities(self) -> dict[str, AttrPriority]:
        """The attributes that are to come before or after the others in the graph."""
        return vars(self).setdefault("bridge_priorities", {})  # type: ignore[no-any-return]

    def set_attr_priority(self, name: str, value: AttrPriority) -> None:
        """Have an attribute come before those of a higher number; those of the same come by name."""
        self.attr_priorities[name] = value

    def _pytree__rank(self, name: str) -> int:
        return vars(self).get("bridge_priorities", {}).get(name, AttrPriority.DEFAULT)  # type: ignore[no-any-return]

    @property
    def is_bound(self) -> bool:
        """Whether the module runs inside ``init`` or ``apply``."""
        return self.scope is not None

    def _bind(self, scope: Scope) -> None:
        vars(self)["bridge_scope"] = scope.copy()
        setup = getattr(self, "setup", None)
        if setup is not None:
            with _Running(self):  # names are those of the attributes
                setup()

    def _setattr(self, name: str, value: Any) -> None:
        scope = self.scope
        if scope is not None:
            given = vars(self).get(name)
            if type(given) is ModuleState:
                update(value, given)
            _bind_all(value, scope)
        super()._setattr(name, value)

    def is_initializing(self) -> bool:
        """Whether ``init`` runs."""
        return self.scope is not None and self.scope.initializing

    def make_rng(self, name: str = "default") -> jax.Array:
        """The next key of a stream; ValueError outside of ``init`` and ``apply``."""
        if self.scope is None:
            raise ValueError(f"{type(self).__name__} has no random streams yet: call its `init` or `apply`.")
        return self.scope.rngs[name]()

    def param(self, name: str, init_fn: Callable[..., Any], *init_args: Any, unbox: bool = True, **kwargs: Any) -> Any:
        """The parameter ``name``, an ``nnx.Param``; ``init_fn(key, *args)`` makes it if it was not given to ``apply``.

        Raises:
            ValueError: the module is not bound, or the attribute is a variable of another type.
        """
        found = self.variable(
            "params", name, lambda: init_fn(self.make_rng("params"), *init_args, **kwargs), unbox=unbox
        )
        if not isinstance(found, Param):
            raise ValueError(f"Expected {name!r} to be a Param, got {type(found).__name__}")
        return found

    def variable(
        self,
        col: str,
        name: str,
        init_fn: Callable[..., Any] | None = None,
        *init_args: Any,
        unbox: bool = True,
        **init_kwargs: Any,
    ) -> Variable[Any]:
        """The variable ``name`` of the collection ``col``; ``init_fn(*args)`` makes it if it does not exist.

        Raises:
            ValueError: the module is not bound, or the variable is missing and there is nothing to make it.
        """
        if self.scope is None:
            raise ValueError(
                "Variables must be initialized in `setup()` or in a method wrapped in `@compact`, while `init` or "
                f"`apply` runs; {name!r} of {type(self).__name__} was not."
            )
        current = vars(self).get(name)
        if isinstance(current, Variable):
            return current
        if init_fn is None:
            raise ValueError(f"The variable {name!r} of {col!r} is not among those given to apply, and has no init_fn.")
        made = to_nnx_var(col, init_fn(*init_args, **init_kwargs))
        setattr(self, name, made if unbox else to_nnx_var(col, unbox_value(made.get_raw_value())))
        found: Variable[Any] = vars(self)[name]
        return found

    @property
    def variables(self) -> FrozenDict[str, Any]:
        """The variables of the module and those within, by collection, as ``apply`` takes them."""
        return FrozenDict(self._linen_variables())

    def _linen_variables(self) -> dict[str, Any]:
        flat = to_flat_state(state(self, Not(RngState), graph=True))
        return nnx_attrs_to_linen_vars(unflatten_dict({path: v for path, v in flat if isinstance(v, Variable)}))

    def init(self, rngs: Any = None, *args: Any, method: Any = "__call__", **kwargs: Any) -> dict[str, Any]:
        """The variables that a call makes, by collection; ``rngs`` is a seed, a key, a dict of these or ``Rngs``."""
        return self.init_with_output(rngs, *args, method=method, **kwargs)[1]

    def init_with_output(
        self, rngs: Any = None, *args: Any, method: Any = "__call__", mutable: CollectionFilter = True, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """As ``init``, with the call's result."""
        return self._run({}, rngs, mutable or True, True, method, args, kwargs)

    def apply(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        rngs: Any = None,
        method: Any = "__call__",
        mutable: CollectionFilter = False,
        **kwargs: Any,
    ) -> Any:
        """Call the module with these variables; with ``mutable``, ``(result, all variables after the call)``."""
        out, changed = self._run(variables, rngs, mutable, False, method, args, kwargs)
        return out if mutable is False else (out, changed)

    def _run(
        self,
        variables: Mapping[str, Any],
        rngs: Any,
        mutable: CollectionFilter,
        initializing: bool,
        method: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, dict[str, Any]]:
        streams = rngs if isinstance(rngs, Rngs) else Rngs(**rngs) if isinstance(rngs, Mapping) else Rngs(rngs)
        root = clone(self, graph=True)
        for name, value in linen_vars_to_nnx_attrs(variables).items():
            _give(root, name, value)
        scope = Scope(streams, mutable, initializing)
        _bind_all(root, scope)
        with _Running(root):
            out = _unbound(method, type(root))(root, *args, **kwargs)
        return out, root._linen_variables()


def _bind_all(value: Any, scope: Scope) -> None:
    """Bind the modules in a value that are not yet, parents first."""
    for _, module in reversed(list(iter_graph(value, graph=True))):
        if isinstance(module, Module) and not module.is_bound:
            module._bind(scope)


def _give(module: Module, name: str, value: Any) -> None:
    """Assign a variable, or the variables of a submodule, which may be made later."""
    current = vars(module).get(name)
    if isinstance(value, Variable):
        module._setattr(name, value)
    elif current is None:
        vars(module)[name] = ModuleState(value)
    elif isinstance(current, Module):
        for inner, part in value.items():
            _give(current, inner, part)
    else:
        update(current, value)


def _unbound(method: Any, cls: type[Module]) -> Callable[..., Any]:
    """The function of a method that is given by name, as bound method or as function."""
    found: Any = inspect.getattr_static(cls, method, None) if isinstance(method, str) else method
    if isinstance(method, str) and not callable(found):
        return lambda module, *args, **kwargs: getattr(module, method)(*args, **kwargs)  # a submodule
    if inspect.ismethod(found) and isinstance(found.__self__, Module):
        found = found.__func__
    if not callable(found) or not inspect.signature(found).parameters:
        raise errors.ApplyModuleInvalidMethodError(found)
    function: Callable[..., Any] = found
    return function
