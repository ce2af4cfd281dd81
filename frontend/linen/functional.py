"""``init`` and ``apply`` as functions of functions: a function of a bound module as a pure function of variables."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from distaff.frontend import core
from distaff.frontend.core.filters import CollectionFilter, DenyList, union_filters
from distaff.frontend.core.scope import Scope
from distaff.frontend.linen.context import CaptureFilter, context

if TYPE_CHECKING:
    from distaff.frontend.linen.module import Module

# What init makes and returns by default.
ALL_BUT_INTERMEDIATES = DenyList("intermediates")


def _capture_calls(module: Module, method_name: str) -> bool:
    return method_name == "__call__"


def _scope_function(
    fn: Callable[..., Any], module: Module, capture_intermediates: bool | CaptureFilter
) -> Callable[..., Any]:
    """``fn`` as a function of a scope, to which a clone of the module is bound."""
    capture = _capture_calls if capture_intermediates is True else capture_intermediates or None

    def run(scope: Scope, *args: Any, **kwargs: Any) -> Any:
        context.capture_stack.append(capture)
        try:
            return fn(module.clone(parent=scope, _deep_clone=True), *args, **kwargs)
        finally:
            context.capture_stack.pop()

    return run


def apply(
    fn: Callable[..., Any],
    module: Module,
    mutable: CollectionFilter = False,
    capture_intermediates: bool | CaptureFilter = False,
) -> Callable[..., Any]:
    """The pure function ``(variables, *args, rngs=None, **kwargs)`` that runs ``fn`` on the module with the variables.

    Arguments and result are as for ``Module.apply``.
    """
    if capture_intermediates:
        mutable = union_filters(mutable, "intermediates")
    return core.apply(_scope_function(fn, module, capture_intermediates), mutable=mutable)


def init_with_output(
    fn: Callable[..., Any],
    module: Module,
    mutable: CollectionFilter = ALL_BUT_INTERMEDIATES,
    capture_intermediates: bool | CaptureFilter = False,
) -> Callable[..., Any]:
    """The pure function ``(rngs, *args, **kwargs) -> (output, variables)`` of ``fn`` on the module."""
    if capture_intermediates:
        mutable = union_filters(mutable, "intermediates")
    return core.init(_scope_function(fn, module, capture_intermediates), mutable=mutable)


def init(
    fn: Callable[..., Any],
    module: Module,
    mutable: CollectionFilter = ALL_BUT_INTERMEDIATES,
    capture_intermediates: bool | CaptureFilter = False,
) -> Callable[..., Any]:
    """The pure function ``(rngs, *args, **kwargs) -> variables`` of ``fn`` on the module."""
    run = init_with_output(fn, module, mutable, capture_intermediates)
    return lambda *args, **kwargs: run(*args, **kwargs)[1]
