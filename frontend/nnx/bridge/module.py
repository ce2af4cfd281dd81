"""``bridge.Module``: modules of NNX written as those of Linen, with ``init``, ``apply``, ``setup``, ``compact``."""

from __future__ import annotations

import copy
import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from distaff.frontend.core.filters import CollectionFilter, in_filter
from distaff.frontend.core.meta import unbox as unbox_value
from distaff.frontend.nnx.bridge.variables import nnx_attrs_to_linen_vars, to_nnx_var
from distaff.frontend.nnx.filters import Not
from distaff.frontend.nnx.graph_functions import state
from distaff.frontend.nnx.module import Module as NNXModule
from distaff.frontend.nnx.pytrees import PytreeMeta
from distaff.frontend.nnx.rngs import Rngs, RngState
from distaff.frontend.nnx.state import to_flat_state
from distaff.frontend.nnx.variables import Variable
from distaff.frontend.traverse_util import flatten_dict, unflatten_dict

F = TypeVar("F", bound=Callable[..., Any])


@dataclasses.dataclass(eq=False)
class Scope:
    """What one ``init`` or ``apply`` gives its modules: values by (collection, *path), streams, what may change."""

    values: dict[tuple[Any, ...], Any]
    rngs: Rngs
    mutable: CollectionFilter
    initializing: bool


@dataclasses.dataclass
class _Frame:
    module: Module
    counts: dict[str, int] = dataclasses.field(default_factory=dict)


class _Stack(threading.local):
    def __init__(self) -> None:
        self.frames: list[_Frame] = []


_stack = _Stack()


def current_module() -> Module | None:
    """The module whose compact method runs, if any."""
    return _stack.frames[-1].module if _stack.frames else None


def compact(method: F) -> F:
    """Mark a method that declares submodules and variables where it uses them."""

    @functools.wraps(method)
    def run(self: Module, *args: Any, **kwargs: Any) -> Any:
        if not self.is_bound:
            raise ValueError(f"{type(self).__name__} has no variables yet: call its `init` or `apply`.")
        _stack.frames.append(_Frame(self))
        try:
            return method(self, *args, **kwargs)
        finally:
            _stack.frames.pop()

    return run  # type: ignore[return-value]


class _ModuleMeta(PytreeMeta):
    def __call__(cls, *args: Any, name: str | None = None, **kwargs: Any) -> Any:
        """A new module; in a compact method it becomes a submodule, the same one at each call."""
        module = super().__call__(*args, **kwargs)
        if not _stack.frames:
            return module
        frame = _stack.frames[-1]
        if name is None:
            number = frame.counts.get(cls.__name__, 0)
            frame.counts[cls.__name__] = number + 1
            name = f"{cls.__name__}_{number}"
        return frame.module.adopt(name, module)


class Module(NNXModule, metaclass=_ModuleMeta):
    """Base class of modules with Linen's way of writing: annotated fields, ``setup`` or ``compact`` methods.

    >>> class Dense(bridge.Module):
    ...     features: int
    ...     @bridge.compact
    ...     def __call__(self, x):
    ...         return x @ self.param("kernel", nn.initializers.normal(), (x.shape[-1], self.features))
    >>> variables = Dense(4).init(0, x)
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(eq=False, repr=False)(cls)

    @property
    def is_bound(self) -> bool:
        """Whether the module runs inside ``init`` or ``apply``."""
        return "bridge_scope" in vars(self)

    def _bind(self, scope: Scope, path: tuple[str, ...]) -> None:
        vars(self).update(bridge_scope=scope, bridge_path=path)
        for name, value in list(vars(self).items()):
            if isinstance(value, Module):
                value._bind(scope, (*path, name))
        setup = getattr(self, "setup", None)
        if setup is not None:
            frames, _stack.frames = _stack.frames, []  # names are those of the attributes
            try:
                setup()
            finally:
                _stack.frames = frames

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, Module) and self.is_bound and not value.is_bound:
            value._bind(vars(self)["bridge_scope"], (*vars(self)["bridge_path"], name))

    def adopt(self, name: str, module: Any) -> Any:
        """Make ``module`` the submodule ``name``, or return the one of that name from an earlier call."""
        current = vars(self).get(name)
        if current is None:
            setattr(self, name, module)
            return module
        return current

    def is_initializing(self) -> bool:
        """Whether ``init`` runs."""
        return self.is_bound and vars(self)["bridge_scope"].initializing

    def make_rng(self, name: str = "default") -> jax.Array:
        """The next key of a stream."""
        return vars(self)["bridge_scope"].rngs[name]()  # type: ignore[no-any-return]

    def param(self, name: str, init_fn: Callable[..., Any], *init_args: Any, unbox: bool = True, **kwargs: Any) -> Any:
        """The parameter ``name``, an ``nnx.Param``; ``init_fn(key, *args)`` makes it in ``init``."""
        return self.variable(
            "params", name, lambda: init_fn(self.make_rng("params"), *init_args, **kwargs), unbox=unbox
        )

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
            ValueError: the module is not bound, or the variable is missing and may not be made.
        """
        if not self.is_bound:
            raise ValueError("Variables must be initialized in `setup()` or in a method wrapped in `@compact`.")
        current = vars(self).get(name)
        if isinstance(current, Variable):
            return current
        scope: Scope = vars(self)["bridge_scope"]
        path = (col, *vars(self)["bridge_path"], name)
        if path in scope.values:
            value = scope.values[path]
        elif init_fn is not None and (scope.initializing or in_filter(scope.mutable, col)):
            value = init_fn(*init_args, **init_kwargs)
        else:
            raise ValueError(f"The variable {'/'.join(path[1:])!r} of {col!r} is not among those given to apply.")
        made = to_nnx_var(col, value)
        setattr(self, name, made if unbox else to_nnx_var(col, unbox_value(value)))
        return vars(self)[name]  # type: ignore[no-any-return]

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
        root = copy.deepcopy(self)
        root._bind(Scope(flatten_dict(dict(variables)), streams, mutable, initializing), ())
        call = getattr(root, method) if isinstance(method, str) else functools.partial(method, root)
        out = call(*args, **kwargs)
        held = {path: v for path, v in to_flat_state(state(root, Not(RngState))) if isinstance(v, Variable)}
        return out, nnx_attrs_to_linen_vars(unflatten_dict(held))
