"""Modules of Linen as modules of NNX (``ToNNX``), and the other way round (``ToLinen``)."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import jax

from distaff.frontend import linen
from distaff.frontend.core import FrozenDict
from distaff.frontend.core.filters import CollectionFilter
from distaff.frontend.linen.context import context
from distaff.frontend.nnx.bridge.module import current_module
from distaff.frontend.nnx.bridge.variables import (
    linen_vars_to_nnx_attrs,
    nnx_attrs_to_linen_vars,
    to_linen_var,
    to_nnx_var,
)
from distaff.frontend.nnx.filters import Not
from distaff.frontend.nnx.graph_functions import merge, split, state, update
from distaff.frontend.nnx.graphdef import GraphDef
from distaff.frontend.nnx.kinds import has_data
from distaff.frontend.nnx.module import Module
from distaff.frontend.nnx.pytrees import data
from distaff.frontend.nnx.rngs import Rngs, RngState
from distaff.frontend.nnx.state import State, to_flat_state
from distaff.frontend.nnx.transforms.abstract import eval_shape
from distaff.frontend.nnx.traversal import iter_graph
from distaff.frontend.nnx.variable_kinds import variable_name_from_type
from distaff.frontend.nnx.variables import Variable

M = TypeVar("M", bound=Module)
Method = Callable[..., Any] | str | None


@dataclasses.dataclass
class Functional(Generic[M]):
    """A module to be used as in Haiku: ``init`` makes its state, ``apply(state)`` is the function of it."""

    module_type: Callable[..., M]
    graphdef: GraphDef[M] | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def init(self, *, rngs: Rngs | None = None) -> State:
        """The state of a new module."""
        named = {} if rngs is None else {"rngs": rngs}
        self.graphdef, made = split(self.module_type(*self.args, **self.kwargs, **named))
        return made  # type: ignore[no-any-return]

    def apply(self, *states: Any) -> Any:
        """As ``GraphDef.apply``: call the result, or methods of it, for ``(output, (graphdef, state))``."""
        if self.graphdef is None:
            raise ValueError(f"There is no {self.module_type} yet: call `init` before `apply`.")
        return self.graphdef.apply(*states)


def functional(cls: Callable[..., M]) -> Callable[..., Functional[M]]:
    """A class of modules as a maker of ``Functional``, with the arguments of the class but for ``rngs``."""
    return lambda *args, **kwargs: Functional(cls, None, args, kwargs)


def set_initializing(module: Any, initializing: bool) -> None:
    """Have the ``ToNNX`` modules in a module make their variables when they are called, or no longer."""
    for _, value in iter_graph(module, graph=True):
        if isinstance(value, ToNNX):
            vars(value)["to_nnx__initializing"] = initializing


def lazy_init(fn: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a module (or a method of one) so that the ``ToNNX`` modules in it make their variables.

    Returns:
        ``fn``.

    Raises:
        ValueError: ``fn`` is neither a module nor a method of one.
    """
    module = fn if isinstance(fn, Module) else getattr(fn, "__self__", None)
    if not isinstance(module, Module) or not callable(fn):
        raise ValueError(f"{fn} needs to be a module of NNX, or a method of one.")
    set_initializing(module, True)
    try:
        fn(*args, **kwargs)
    finally:
        set_initializing(module, False)
    return fn


class ToNNX(Module):
    """A module of Linen as one of NNX, with its variables as attributes.

    >>> model = nnx.bridge.ToNNX(nn.Dense(64), rngs=nnx.Rngs(0)).lazy_init(x)
    >>> model(x)
    >>> model.kernel  # an nnx.Param
    """

    def __init__(self, module: linen.Module, rngs: Rngs | jax.Array | None = None) -> None:
        """Wrap ``module``; ``rngs`` are its streams, or the key of ``params``."""
        self.to_nnx__module = module
        self.to_nnx__rngs = rngs.fork() if isinstance(rngs, Rngs) else Rngs(params=rngs) if rngs is not None else None

    @property
    def rngs(self) -> Rngs | None:
        """The streams."""
        return vars(self)["to_nnx__rngs"]  # type: ignore[no-any-return]

    @property
    def module(self) -> linen.Module:
        """The module of Linen."""
        return vars(self)["to_nnx__module"]  # type: ignore[no-any-return]

    def lazy_init(self, *args: Any, **kwargs: Any) -> ToNNX:
        """As ``nnx.bridge.lazy_init``: make the variables by a call with these arguments."""
        lazy_init(self, *args, **kwargs)
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "to_nnx__module" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        attribute = getattr(type(self.module), name, None)
        if attribute is None or not callable(attribute):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return _as_method(self, functools.partial(self, method=attribute))

    def _setattr(self, name: str, value: Any) -> None:
        contained = isinstance(value, dict) and has_data(value)  # the variables of a submodule
        super()._setattr(name, data(value) if contained else value)

    def _variables(self) -> dict[str, Any]:
        attributes = {k: v for k, v in vars(self).items() if not k.startswith(("to_nnx__", "_pytree__"))}
        held = {k: v for k, v in attributes.items() if isinstance(v, Variable | dict)}
        return nnx_attrs_to_linen_vars(held)

    def __call__(
        self,
        *args: Any,
        rngs: Rngs | Mapping[str, jax.Array] | jax.Array | None = None,
        method: Method = None,
        mutable: CollectionFilter | None = None,
        **kwargs: Any,
    ) -> Any:
        """Apply the module; variables that it may change are assigned.

        Args:
            rngs: keys for this call (default: new ones of this object's streams).
            method: another method, or its name.
            mutable: which collections the module may change (default: those that the ``bridge.Module`` or the module
                of Linen that runs may change; none outside of these).
        """
        keys = self._keys(rngs)
        if vars(self).get("to_nnx__initializing"):
            out, updates = self.module.init_with_output(keys, *args, method=method, **kwargs)
            names = None
        else:
            variables = self._variables()
            mutable = _mutable_around() if mutable is None else mutable
            if mutable is False:
                return self.module.apply(variables, *args, rngs=keys, method=method, **kwargs)
            out, updates = self.module.apply(variables, *args, rngs=keys, method=method, mutable=mutable, **kwargs)
            names = variables
        self._assign(updates, names)
        return out

    def _keys(self, rngs: Any) -> dict[str, jax.Array]:
        streams = self.rngs if rngs is None else rngs
        if isinstance(streams, Rngs):
            keys = {name: stream() for name, stream in streams.items()}
            if "params" not in keys and "default" in keys:
                keys["params"] = keys.pop("default")
            return keys
        if isinstance(streams, Mapping):
            return dict(streams)
        return {} if streams is None else {"params": streams}

    def _assign(self, updates: Mapping[str, Any], known: Mapping[str, Any] | None) -> None:
        for name, value in linen_vars_to_nnx_attrs(updates).items():
            current = vars(self).get(name)
            if known is None or current is None:
                setattr(self, name, value)
            else:
                _merge_into(current, value)


def _mutable_around() -> CollectionFilter:
    """The collections that the module around a call may change."""
    around = current_module() or current_linen_module()
    return False if around is None or around.scope is None else around.scope.mutable


def _as_method(module: Any, function: Any) -> Any:
    """A function that looks like a method of a module."""
    function.__self__ = module
    return function


def _merge_into(current: Any, new: Any) -> None:
    """Assign new variables to those of the same place; add the others."""
    if isinstance(current, Variable):
        current.update_from_state(new)
        return
    for name, value in new.items():
        if name in current:
            _merge_into(current[name], value)
        else:
            current[name] = value


def current_linen_module() -> linen.Module | None:
    """The module of Linen that is running, if any."""
    return context.module_stack[-1]


def linen_rngs_dict(linen_module: linen.Module, add_default: bool = False) -> dict[str, Any]:
    """A new key of each stream that a running module of Linen has.

    Args:
        add_default: add ``default=0`` if there is no stream of that name.
    """
    assert linen_module.scope is not None, "linen_rngs_dict must be called inside a running module of Linen."
    keys: dict[str, Any] = {name: linen_module.make_rng(name) for name in linen_module.scope.rngs}
    if add_default and "default" not in keys:
        keys["default"] = 0
    return keys


class ToLinen(linen.Module):
    """A module of NNX as one of Linen, which makes it at ``init`` and again, of its variables, at each ``apply``.

    >>> model = nnx.bridge.to_linen(nnx.Linear, 32, 64)
    >>> variables = model.init(jax.random.key(0), x)

    Attributes:
        nnx_class: the class of the module (not an instance), or a function that makes one.
        args, kwargs: what it is called with.
        skip_rng: it takes no ``rngs``.
        metadata_fn: what Linen is to keep of a variable; None for the value alone.
    """

    nnx_class: Callable[..., Module]
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = FrozenDict({})
    skip_rng: bool = False
    metadata_fn: Callable[[Variable[Any]], Any] | None = to_linen_var

    @linen.compact
    def __call__(self, *args: Any, nnx_method: Method = None, **kwargs: Any) -> Any:
        """Call the module, or with ``nnx_method`` a method of it (a function of the class, or its name)."""
        initializing = self.is_initializing()
        module = self._make() if initializing else self._restore()
        if initializing:  # the values before the call
            self._store(module)
        out = _method_of(module, nnx_method)(module, *args, **kwargs)
        if not initializing:
            self._store(module)
        return out

    def __getattr__(self, name: str) -> Any:
        """An argument that the module is made with, or a method of it as one of this module."""
        fields = self.__dict__
        if not name.startswith("_") and "nnx_class" in fields:
            if name in fields["kwargs"]:
                return fields["kwargs"][name]
            method = getattr(fields["nnx_class"], name, None)
            if callable(method):
                return _as_method(self, functools.partial(self, nnx_method=method))
        return super().__getattr__(name)

    def _create(self, rngs: Rngs | None) -> Module:
        named = {} if self.skip_rng else {"rngs": rngs}
        return self.nnx_class(*self.args, **{**self.kwargs, **named})

    def _make(self) -> Module:
        return self._create(None if self.skip_rng else Rngs(**linen_rngs_dict(self)))

    def _restore(self) -> Module:
        abstract = eval_shape(lambda: self._create(None if self.skip_rng else Rngs(0)))
        definition, streams, others = split(abstract, RngState, ...)
        collections = (State(_as_variables(col, values)) for col, values in self.variables.items())
        held = dict(to_flat_state(State.merge(State({}), *collections)))
        wanted = dict(to_flat_state(others))
        if streams or wanted.keys() - held.keys():  # as in a module that was made with keys of this call
            fresh = self._create(None if self.skip_rng else Rngs(**linen_rngs_dict(self, add_default=True)))
            streams, initial = state(fresh, RngState, ...)
            held = dict(to_flat_state(initial)) | held
        restored = State.from_flat_path({path: _typed(x, held.pop(path)) for path, x in wanted.items()})
        module: Module = merge(definition, restored, streams)
        if held:  # such as what was sown
            unknown = ", ".join(sorted("/".join(map(str, path)) for path in held))
            warnings.warn(f"Found unknown module paths in incoming state: {unknown}", stacklevel=2)
            update(module, State.from_flat_path(held))
        return module

    def _store(self, module: Module) -> None:
        for path, variable in to_flat_state(state(module, Not(RngState))):
            if not isinstance(variable, Variable):
                continue
            col = variable_name_from_type(type(variable), allow_register=True)
            if not self.is_mutable_collection(col):
                continue
            value = variable.get_raw_value() if self.metadata_fn is None else self.metadata_fn(variable)
            self._put(col, path, value)

    def _put(self, col: str, path: Sequence[Any], value: Any) -> None:
        assert self.scope is not None
        if len(path) == 1:
            self.scope.put_variable(col, str(path[0]), value)
            return
        name, *inner = map(str, path)
        held = self.scope.get_variable(col, name, {})
        node = held = _copied(held)
        for key in inner[:-1]:
            node = node.setdefault(key, {})
        node[inner[-1]] = value
        self.scope.put_variable(col, name, held)


def _copied(tree: Any) -> Any:
    return {key: _copied(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree


def _as_variables(col: str, tree: Any) -> Any:
    """Nested dicts of variables."""
    if isinstance(tree, Mapping):
        return {_key(name): _as_variables(col, value) for name, value in tree.items()}
    return to_nnx_var(col, tree)


def _key(name: Any) -> Any:
    return int(name) if isinstance(name, str) and name.isdigit() else name


def _typed(abstract: Any, held: Variable[Any]) -> Any:
    """The held value in a variable of the type and metadata that the module makes it with."""
    if not isinstance(abstract, Variable):
        return held.get_raw_value()
    return abstract.replace(held.get_raw_value())


def _method_of(module: Module, method: Method) -> Callable[..., Any]:
    if method is None:
        return type(module).__call__
    found = getattr(type(module), method, None) if isinstance(method, str) else method
    if not callable(found):
        raise TypeError(f"{type(module).__name__} has no method {method!r}.")
    return found


def to_linen(
    nnx_class: Callable[..., Module],
    *args: Any,
    metadata_fn: Callable[[Variable[Any]], Any] | None = to_linen_var,
    name: str | None = None,
    skip_rng: bool = False,
    abstract_init: bool = True,
    **kwargs: Any,
) -> ToLinen:
    """``ToLinen`` of a class and the arguments to make an instance with.

    Args:
        nnx_class: the class of the module.
        metadata_fn: what Linen is to keep of a variable.
        name: of the module in Linen.
        skip_rng: the class takes no ``rngs``.
        abstract_init: accepted for likeness: at ``apply`` values are made only for modules that hold random streams.
    """
    return ToLinen(
        nnx_class, args=args, kwargs=FrozenDict(kwargs), metadata_fn=metadata_fn, skip_rng=skip_rng, name=name
    )


def to_linen_class(
    base_nnx_class: type[M],
    base_metadata_fn: Callable[[Variable[Any]], Any] | None = to_linen_var,
    base_skip_rng: bool = False,
    **partial_kwargs: Any,
) -> type[ToLinen]:
    """A class of modules of Linen that hold a module of one class of NNX.

    Its arguments are those of ``ToLinen`` (by which the class may be replaced) and, by name, those of the class.

    >>> Linear = to_linen_class(nnx.Linear, use_bias=False)
    >>> model = Linear(in_features=3, out_features=5)
    """

    def __init__(
        self: ToLinen,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        nnx_class: Callable[..., Module] | None = None,
        skip_rng: bool | None = None,
        metadata_fn: Callable[[Variable[Any]], Any] | None = None,
        **named: Any,
    ) -> None:
        of_linen = {name: named.pop(name) for name in ("name", "parent") if name in named}
        ToLinen.__init__(
            self,
            nnx_class or base_nnx_class,
            args,
            FrozenDict({**partial_kwargs, **(kwargs or {}), **named}),
            skip_rng or base_skip_rng,
            metadata_fn or base_metadata_fn,
            **of_linen,
        )

    class ToLinenPartial(ToLinen):
        def __init_subclass__(cls, **options: Any) -> None:
            super().__init_subclass__(**options)
            cls.__init__ = __init__  # type: ignore[method-assign,assignment]

    ToLinenPartial.__init__ = __init__  # type: ignore[method-assign,assignment]
    ToLinenPartial.__name__ = f"{base_nnx_class.__name__}ToLinen"
    return ToLinenPartial
