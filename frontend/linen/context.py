"""What surrounds a module call in this thread: the modules being run, interceptors, capturing, profiler names."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from distaff.frontend.configurations import config

if TYPE_CHECKING:
    from distaff.frontend.linen.module import Module

CaptureFilter: TypeAlias = Callable[["Module", str], bool]


class _Context(threading.local):
    """Per-thread stacks; the innermost entry is the last."""

    def __init__(self) -> None:
        self.module_stack: list[Module | None] = [None]
        self.capture_stack: list[CaptureFilter | None] = [None]
        self.interceptors: list[Interceptor] = []
        self.named_calls: bool = config.flax_profile


context = _Context()


@dataclasses.dataclass(frozen=True)
class InterceptorContext:
    """What an interceptor is told: the module, the method's name, and the method without any interceptor."""

    module: Module
    method_name: str
    orig_method: Callable[..., Any]


Interceptor: TypeAlias = Callable[
    [Callable[..., Any], tuple[Any, ...], dict[str, Any], InterceptorContext],
    Any,
]


@contextlib.contextmanager
def intercept_methods(interceptor: Interceptor) -> Iterator[None]:
    """Call ``interceptor(next_method, args, kwargs, context)`` in place of every module method in the ``with`` block.

    It decides whether, and with what, to call ``next_method``. Interceptors are called in the order of registration.
    Methods marked ``nn.nowrap`` are not intercepted.
    """
    context.interceptors.append(interceptor)
    try:
        yield
    finally:
        context.interceptors.pop()


def intercepted(fun: Callable[..., Any], module: Module, name: str) -> Callable[..., Any]:
    """``fun`` bound to the module, inside the active interceptors."""
    call: Callable[..., Any] = functools.partial(fun, module)
    about = InterceptorContext(module, name, call)

    def wrap(interceptor: Interceptor, inner: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: interceptor(inner, args, kwargs, about)

    for interceptor in reversed(context.interceptors):
        call = wrap(interceptor, call)
    return call


def enable_named_call() -> None:
    """Run module methods under ``jax.named_scope`` with the module's name, for profilers (the default; per thread)."""
    context.named_calls = True


def disable_named_call() -> None:
    """Do not name module calls in this thread."""
    context.named_calls = False


@contextlib.contextmanager
def override_named_call(enable: bool = True) -> Iterator[None]:
    """Enable or disable the naming of module calls inside the ``with`` block."""
    before = context.named_calls
    context.named_calls = enable
    try:
        yield
    finally:
        context.named_calls = before
