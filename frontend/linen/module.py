"""``Module``: configuration as a dataclass, submodules and variables by name, pure ``init`` and ``apply``.

A module is its configuration until it is *bound* to a scope, by ``init``, ``apply`` or ``bind`` for the root module,
and by its parent for a submodule. Modules given as fields belong to nobody: a parent takes clones of them, and keeps
one clone for one original, so that sharing by reference is sharing of parameters.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from distaff.frontend import core, errors
from distaff.frontend.configurations import config
from distaff.frontend.core.filters import CollectionFilter
from distaff.frontend.core.functional import lazy_variables
from distaff.frontend.core.rng import LazyRng, PRNGKey, is_valid_rng
from distaff.frontend.core.scope import Scope
from distaff.frontend.ids import FlaxId, uuid
from distaff.frontend.layers.fields import merge_param as merge_param
from distaff.frontend.linen import class_transform
from distaff.frontend.linen.attributes import PLAIN_TYPES, attribute_text, map_modules
from distaff.frontend.linen.class_transform import compact as compact
from distaff.frontend.linen.class_transform import compact_name_scope as compact_name_scope
from distaff.frontend.linen.class_transform import nowrap as nowrap
from distaff.frontend.linen.context import CaptureFilter, context
from distaff.frontend.linen.context import InterceptorContext as InterceptorContext
from distaff.frontend.linen.context import disable_named_call as disable_named_call
from distaff.frontend.linen.context import enable_named_call as enable_named_call
from distaff.frontend.linen.context import intercept_methods as intercept_methods
from distaff.frontend.linen.context import override_named_call as override_named_call
from distaff.frontend.linen.functional import ALL_BUT_INTERMEDIATES, apply, init_with_output
from distaff.frontend.linen.functional import init as init
from distaff.frontend.linen.module_base import ModuleBase, ModuleState, SetupState
from distaff.frontend.linen.sharing import share_scope as share_scope


class _Unspecified(enum.Enum):
    """The default of ``parent``: the module whose method is running, if any."""

    PARENT = "the running module"


class _ParentReference:
    """Holds the parent weakly: a strong reference would be a cycle, and keep variables alive until it is collected."""

    def __get__(self, module: Module | None, owner: type[Module]) -> Any:
        if module is None:
            return _Unspecified.PARENT
        parent = module.__dict__.get("_parent")
        return parent() if isinstance(parent, weakref.ref) else parent

    def __set__(self, module: Module, parent: Any) -> None:
        module.__dict__["_parent"] = weakref.ref(parent) if isinstance(parent, ModuleBase) else parent


class Module(ModuleBase):
    """Base of all modules; subclasses are dataclasses whose fields are their configuration.

    Submodules are created in ``setup`` and assigned to attributes, or where they are used, in a method marked
    ``@nn.compact``. Parameters live outside, in the tree of dicts that ``init`` returns and ``apply`` takes:

    >>> class MLP(nn.Module):
    ...     features: int
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return nn.Dense(self.features)(nn.relu(nn.Dense(4 * self.features)(x)))
    >>> variables = MLP(8).init(jax.random.key(0), x)
    >>> y = MLP(8).apply(variables, x)

    Args:
        parent: the module or scope that this one belongs to; None for one that is to be bound later.
        name: its name in its parent; by default the attribute's, or the class's with a number.
    """

    if TYPE_CHECKING:
        parent: Any = dataclasses.field(default=None, kw_only=True)
        name: str | None = dataclasses.field(default=None, kw_only=True)
    _config_fields: ClassVar[tuple[str, ...]] = ()
    _compact_name_scope_methods: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, kw_only: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        names = list(cls.__dict__)
        class_transform.make_dataclass(cls, kw_only)
        class_transform.wrap_methods(cls, names)

    def setup(self) -> None:
        """Create submodules and variables and assign them to attributes; override it.

        Called once, when the module is bound, before its first method runs or its first missing attribute is read.
        """

    # Construction and attachment.

    def __post_init__(self) -> None:
        self.__dict__["_id"] = uuid()
        state = self.__dict__["_state"] = ModuleState()
        if self.parent is _Unspecified.PARENT:
            self.parent = context.module_stack[-1]
        parent = self.parent
        if parent is None:
            return
        if isinstance(parent, Module):
            if parent._state.in_setup and self.name is None:
                return  # named when it is assigned to an attribute
            self._attach(parent)
        elif isinstance(parent, Scope):
            self.__dict__["scope"] = parent
        else:
            raise ValueError(f"parent must be a module, a scope or None, got {parent!r}.")
        for field in self._config_fields:
            value = self.__dict__.get(field)
            if type(value) not in PLAIN_TYPES:
                self._register_submodules(field, value)
        state.is_initialized = True

    def _attach(self, parent: Module) -> None:
        """Take a name and a scope below ``parent``."""
        cls = type(self).__name__
        if not parent._initialization_allowed:
            raise errors.AssignSubModuleError(cls)
        if self.name is None:
            number = parent._state.autoname_cursor.get(cls, 0)
            parent._state.autoname_cursor[cls] = number + 1
            self.name = f"{cls}_{number}"
        scope = parent._bound("create submodules")
        repeats = parent._state.in_setup and parent._state.setup_called is SetupState.TRANSFORMED
        if not repeats and scope.name_reserved(self.name):
            raise errors.NameInUseError("submodule", self.name, type(parent).__name__)
        parent._state.children[self.name] = self
        self.__dict__["scope"] = scope.push(self.name, reuse=repeats)

    def _register_submodules(self, name: str, value: Any) -> None:
        """Assign an attribute, adopting the modules in it that belong to nobody yet."""
        adopted_here: list[Module] = []
        adopted = self._bound("register submodules").root.adopted
        keep_names = getattr(type(self), "preserve_adopted_names", config.flax_preserve_adopted_names)

        def adopt(suffix: str, module: Module) -> Module:
            own_name = module.name if keep_names else None
            if module.parent is None:
                original = module._id
                clone = adopted.get(original)
                module = adopted[original] = module.clone(name=None) if clone is None else clone
            if module.name is None:
                object.__setattr__(module, "parent", self)
                object.__setattr__(module, "name", own_name or f"{name}{suffix}")
                adopted_here.append(module)
            return module

        object.__setattr__(self, name, map_modules(adopt, value))
        for module in adopted_here:
            module.__post_init__()

    def _try_setup(self) -> None:
        """Run ``setup`` if the module is bound and it has not run."""
        state = self._state
        if self.scope is None or state.in_setup or state.setup_called is SetupState.DONE:
            return
        try:
            state.in_setup = True
            self.setup()
            if self._compact_name_scope_methods:
                self._make_name_scopes()
        finally:
            state.in_setup = False
            state.setup_called = SetupState.DONE

    def _make_name_scopes(self) -> None:
        """Make the submodules that the methods marked ``compact_name_scope`` run in."""
        methods = {name: getattr(type(self), name).__wrapped__ for name in self._compact_name_scope_methods}
        object.__setattr__(self, "_name_scopes", {})
        for name, method in methods.items():
            self._name_scopes[name] = _NameScope(method, weakref.ref(self), name=name, parent=self)

    # Attributes.

    def __setattr__(self, name: str, value: Any) -> None:
        state = self.__dict__.get("_state")
        if state is None or not (state.is_initialized or state.in_setup):
            object.__setattr__(self, name, value)
        elif state.in_setup:
            if name in self._config_fields or name in ("parent", "name"):
                raise errors.SetAttributeInModuleSetupError()
            self._register_submodules(name, value)
        elif name.startswith("__"):
            object.__setattr__(self, name, value)
        else:
            raise errors.SetAttributeFrozenModuleError(type(self).__name__, name, value)

    def __getattr__(self, name: str) -> Any:
        """Attributes that ``setup`` defines, on first use."""
        if not name.startswith("__") and "_state" in self.__dict__:
            self._try_setup()
            if name in self.__dict__:
                return self.__dict__[name]
            self._blame_property(name)
        cls = type(self).__name__
        hint = (
            ""
            if self.scope
            else f" If \"{name}\" is defined in '.setup()', it exists only inside init, apply and bind."
        )
        raise AttributeError(f'"{cls}" object has no attribute "{name}".{hint}', name=name, obj=self)

    def _blame_property(self, name: str) -> None:
        """If ``name`` is a property, then reading it failed with an AttributeError of its own: show that one."""
        descriptor = inspect.getattr_static(type(self), name, None)
        if hasattr(type(descriptor), "__get__"):
            try:
                descriptor.__get__(self, type(self))
            except AttributeError as error:
                raise errors.DescriptorAttributeError(name, type(self).__name__) from error

    def __dir__(self) -> list[str]:
        self._try_setup()
        return list(object.__dir__(self))

    def __repr__(self) -> str:
        fields = {f.name for f in dataclasses.fields(self) if f.repr and f.name not in ("parent", "name")}
        shown = [name for name in type(self).__dataclass_fields__ if name in fields]
        lines = ["# attributes"] if shown else []
        lines += [f"{name} = {attribute_text(self.__dict__.get(name))}" for name in shown]
        state = self.__dict__.get("_state") or ModuleState()
        children = {name: child for name, child in state.children.items() if isinstance(child, Module)}
        lines += ["# children"] if children else []
        lines += [f"{name} = {child!r}" for name, child in children.items()]
        body = "".join(f"    {line}\n" for line in "\n".join(lines).splitlines())
        return f"{type(self).__name__}(\n{body})" if body else f"{type(self).__name__}()"

    # Copies.

    def clone(
        self,
        *,
        parent: Module | Scope | _Unspecified | None = None,
        _deep_clone: bool | dict[FlaxId, Module] = False,
        _reset_names: bool = False,
        **updates: Any,
    ) -> Self:
        """A module with the same configuration, updated by ``updates``, that belongs to ``parent``.

        With ``_deep_clone`` submodules in fields are cloned too (shared ones once), and with ``_reset_names`` lose
        their names.
        """
        attributes: dict[str, Any] = {name: getattr(self, name) for name in self._config_fields}
        attributes.update(name=self.name, parent=parent)
        attributes.update(updates)
        if _deep_clone is not False:
            clones: dict[FlaxId, Module] = {} if _deep_clone is True else _deep_clone
            renamed: dict[str, Any] = {"name": None} if _reset_names else {}

            def clone(suffix: str, module: Module) -> Module:
                if module._id not in clones:
                    clones[module._id] = module.clone(_deep_clone=clones, _reset_names=_reset_names, **renamed)
                return clones[module._id]

            for name, value in attributes.items():
                if name != "parent":
                    attributes[name] = map_modules(clone, value)
        return type(self)(**attributes)

    def copy(
        self,
        *,
        parent: Module | Scope | _Unspecified | None = _Unspecified.PARENT,
        name: str | None = None,
        **updates: Any,
    ) -> Self:
        """A copy with some fields changed; unlike ``clone`` it belongs to the running module and has a new name."""
        return self.clone(parent=parent, name=name, _deep_clone=True, **updates)

    def bind(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        rngs: Mapping[str, PRNGKey | LazyRng] | None = None,
        mutable: CollectionFilter = False,
    ) -> Self:
        """A copy that holds ``variables``, for interactive use: its methods can be called directly."""
        _check_module(self)
        return self.clone(parent=core.bind(variables, rngs=rngs, mutable=mutable), _deep_clone=True)

    def unbind(self) -> tuple[Self, dict[str, Any]]:
        """The inverse of ``bind``, for submodules of a bound module too: an unbound copy and its variables."""
        _check_module(self)
        if self.scope is None:
            raise errors.CallUnbindOnUnboundModuleError()
        variables = self.variables
        return self.clone(_deep_clone=True, _reset_names=True, name=None), variables

    # Pure functions of variables.

    def apply(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        rngs: PRNGKey | Mapping[str, PRNGKey | LazyRng] | None = None,
        method: Callable[..., Any] | str | None = None,
        mutable: CollectionFilter = False,
        capture_intermediates: bool | CaptureFilter = False,
        **kwargs: Any,
    ) -> Any:
        """Run a method with the given variables.

        Args:
            variables: the collections, as ``init`` returns them.
            rngs: a key for the stream ``params``, or a key for each named stream.
            method: a method, its name, or a function of the bound module; by default ``__call__``.
            mutable: the collections that may be assigned to; a filter.
            capture_intermediates: sow the output of every submodule's ``__call__`` (or of the methods for which
                ``capture_intermediates(module, method_name)`` is true) into the collection ``intermediates``.

        Returns:
            The output, or if ``mutable`` is not False, the output and the mutable collections.
        """
        _check_module(self)
        fn = self._resolve_method(method)
        run = apply(fn, self, mutable=mutable, capture_intermediates=capture_intermediates)
        return run(variables, *args, **kwargs, rngs=self._checked_rngs(rngs))

    def init_with_output(
        self,
        rngs: PRNGKey | Mapping[str, PRNGKey | LazyRng],
        *args: Any,
        method: Callable[..., Any] | str | None = None,
        mutable: CollectionFilter = ALL_BUT_INTERMEDIATES,
        capture_intermediates: bool | CaptureFilter = False,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """As ``init``, and the output of the method: ``(output, variables)``."""
        _check_module(self)
        fn = self._resolve_method(method)
        run = init_with_output(fn, self, mutable=mutable, capture_intermediates=capture_intermediates)
        return run(self._checked_rngs(rngs, required=True), *args, **kwargs)  # type: ignore[no-any-return]

    def init(
        self,
        rngs: PRNGKey | Mapping[str, PRNGKey | LazyRng],
        *args: Any,
        method: Callable[..., Any] | str | None = None,
        mutable: CollectionFilter = ALL_BUT_INTERMEDIATES,
        capture_intermediates: bool | CaptureFilter = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Run a method to make the variables that it declares.

        Args:
            rngs: a key for the stream ``params``, or a key for each named stream.
            *args: an example of the method's inputs; under ``jax.eval_shape`` only their shapes.
            method, capture_intermediates: as for ``apply``.
            mutable: the collections to make and return; a filter.

        Returns:
            The collections: ``{"params": {...}, ...}``.
        """
        _check_module(self)
        return self.init_with_output(
            rngs, *args, method=method, mutable=mutable, capture_intermediates=capture_intermediates, **kwargs
        )[1]

    def lazy_init(
        self,
        rngs: PRNGKey | Mapping[str, PRNGKey | LazyRng],
        *args: Any,
        method: Callable[..., Any] | str | None = None,
        mutable: CollectionFilter = ALL_BUT_INTERMEDIATES,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As ``init``, with ``jax.ShapeDtypeStruct`` for inputs of which only the shape matters; computes nothing else.

        >>> variables = nn.Dense(4).lazy_init(jax.random.key(0), jax.ShapeDtypeStruct((1, 8), jnp.float32))

        Raises:
            LazyInitError: the value of a variable depends on such an input.
        """
        _check_module(self)

        def make(rngs: Any, *args: Any, **kwargs: Any) -> Any:
            return self.init(rngs, *args, method=method, mutable=mutable, **kwargs)

        return lazy_variables(make)(rngs, *args, **kwargs)  # type: ignore[no-any-return]

    def tabulate(
        self,
        rngs: PRNGKey | Mapping[str, PRNGKey],
        *args: Any,
        depth: int | None = None,
        show_repeated: bool = False,
        mutable: CollectionFilter = ALL_BUT_INTERMEDIATES,
        console_kwargs: Mapping[str, Any] | None = None,
        table_kwargs: Mapping[str, Any] | None = None,
        column_kwargs: Mapping[str, Any] | None = None,
        compute_flops: bool = False,
        compute_vjp_flops: bool = False,
        **kwargs: Any,
    ) -> str:
        """A table of the submodules that ``init(rngs, *args, **kwargs)`` calls, as text; see ``nn.tabulate``."""
        from distaff.frontend.linen import summary

        table = summary.tabulate(
            self,
            rngs,
            depth,
            show_repeated,
            mutable,
            console_kwargs,
            table_kwargs,
            column_kwargs,
            compute_flops,
            compute_vjp_flops,
        )
        return table(*args, **kwargs)

    def module_paths(
        self,
        rngs: PRNGKey | Mapping[str, PRNGKey],
        *args: Any,
        show_repeated: bool = False,
        mutable: CollectionFilter = ALL_BUT_INTERMEDIATES,
        **kwargs: Any,
    ) -> dict[str, Module]:
        """Unbound copies of the modules that ``init(rngs, *args, **kwargs)`` calls, by path: ``"encoder/Dense_0"``."""
        from distaff.frontend.linen import summary

        table = summary.module_table(self, rngs, *args, show_repeated=show_repeated, mutable=mutable, **kwargs)
        return {"/".join(row.path): row.module_copy for row in table}

    def _resolve_method(self, method: Callable[..., Any] | str | None) -> Callable[..., Any]:
        """The function of a bound module that ``method`` stands for."""
        if method is None:
            return type(self).__call__ if callable(self) else self.__getattr__("__call__")
        if isinstance(method, str):
            attribute = getattr(self, method)
            if not callable(attribute):
                raise TypeError(f"'{type(self).__name__}.{method}' must be a callable, got {type(attribute)}.")
            if isinstance(attribute, Module):
                name = method
                return lambda module, *args, **kwargs: getattr(module, name)(*args, **kwargs)
            method = attribute
        return unbound_function(method)

    def _checked_rngs(self, rngs: Any, required: bool = False) -> Any:
        if isinstance(rngs, Mapping) or (rngs is None and not required):
            return rngs
        if not is_valid_rng(rngs):
            raise errors.InvalidRngError(
                f"RNGs should be of shape (2,) or PRNGKey in Module {type(self).__name__}, but rngs are: {rngs}. Pass "
                'jax.random.key(0), or a dict such as {"params": jax.random.key(0), "dropout": jax.random.key(1)}.'
            )
        return {"params": rngs}


# Module is the first dataclass of its family; its subclasses inherit these two fields.
Module.__annotations__ = {"parent": Any, "name": str | None}
Module.parent = dataclasses.field(default=_Unspecified.PARENT, kw_only=True, repr=False)
Module.name = dataclasses.field(default=None, kw_only=True)
dataclasses.dataclass(repr=False, unsafe_hash=True)(Module)
Module.parent = _ParentReference()


class _NameScope(Module):
    """The level of the tree below which a ``compact_name_scope`` method creates submodules."""

    method: Callable[..., Any]
    owner: weakref.ref[Module]

    @class_transform.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.method(self.owner(), *args, **kwargs)


def unbound_function(method: Any) -> Callable[..., Any]:
    """A function with the module as first argument, for a bound method or a function; ApplyModuleInvalidMethodError."""
    if inspect.ismethod(method) and isinstance(method.__self__, Module):
        method = method.__func__
    if not callable(method) or not inspect.signature(method).parameters:
        raise errors.ApplyModuleInvalidMethodError(method)
    return method  # type: ignore[no-any-return]


def _check_module(module: Any) -> None:
    if not isinstance(module, Module):
        raise errors.InvalidInstanceModuleError()
    if "_state" not in module.__dict__:
        raise errors.IncorrectPostInitOverrideError()
