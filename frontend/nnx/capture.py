"""``capture``: take what modules ``sow`` and ``perturb`` out of a call instead of storing it in the modules."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from distaff.frontend.nnx.filters import PathParts
from distaff.frontend.nnx.pytrees import Pytree, data
from distaff.frontend.nnx.state import FlatState, State, filter_flat, iter_flat
from distaff.frontend.nnx.traversal import iter_graph
from distaff.frontend.nnx.variables import Variable

CAPTURES = "__captures__"  # the attribute in which a module has a variable of each type, with a dict by name


def captured_in(module: Any) -> tuple[Variable[Any], ...] | None:
    """Where ``sow`` and ``perturb`` of a module store values while a call on it is captured; None otherwise.

    These are variables of the module, so that transforms take them along like others.
    """
    return module.__dict__.get(CAPTURES)  # type: ignore[no-any-return]


def _modules(module: Any) -> list[tuple[PathParts, Any]]:
    return [(path, node) for path, node in iter_graph(module, graph=True) if isinstance(node, Pytree)]


def _begin(module: Any, types: tuple[type[Variable[Any]], ...], init: Mapping[Any, Any] | None) -> None:
    """Give the modules variables to store values in."""
    nodes = dict(_modules(module))
    given: dict[PathParts, dict[type[Variable[Any]], dict[Any, Any]]] = {path: {} for path in nodes}
    for path, variable in iter_flat(init or {}):
        if path[:-1] not in given:
            raise ValueError(f"`init` has {path}, and the captured module has nothing at {path[:-1]}.")
        given[path[:-1]].setdefault(type(variable), {})[path[-1]] = variable.get_value()
    for path, node in nodes.items():
        values = {**{cls: {} for cls in types}, **given[path]}
        setattr(node, CAPTURES, data(tuple(cls(value) for cls, value in values.items())))


def _end(module: Any, types: tuple[type[Variable[Any]], ...]) -> tuple[State, ...]:
    """Take the variables away again: for each type, what was stored."""
    stored: list[tuple[PathParts, Any]] = []
    for path, node in _modules(module):
        for variable in captured_in(node) or ():
            if type(variable) in types:
                stored += (((*path, name), type(variable)(value)) for name, value in variable.get_value().items())
        if CAPTURES in node.__dict__:
            delattr(node, CAPTURES)
    return tuple(group.to_nested_state() for group in filter_flat(FlatState(stored, sort=True), types))


@contextlib.contextmanager
def wrapped_methods(nodes: Iterable[Any], wrap: Callable[[Any, str], Any]) -> Iterator[None]:
    """Have the methods that the classes of some nodes define (``__call__`` and public ones) replaced in a block.

    Args:
        nodes: of whose classes.
        wrap: ``(method, name) -> method``.
    """
    changed: list[tuple[type, str, Any]] = []
    classes = dict.fromkeys(cls for node in nodes for cls in type(node).__mro__)
    for cls in classes:
        if cls.__module__ in _BASE_MODULES or not issubclass(cls, Pytree):
            continue
        for name, method in list(vars(cls).items()):
            if inspect.isfunction(method) and (name == "__call__" or not name.startswith("_")):
                changed.append((cls, name, method))
                type.__setattr__(cls, name, functools.wraps(method)(wrap(method, name)))
    try:
        yield
    finally:
        for cls, name, method in changed:
            type.__setattr__(cls, name, method)


_BASE_MODULES = frozenset(f"distaff.frontend.nnx.{name}" for name in ("module", "pytrees", "containers"))


def _sowing(variable_type: type[Variable[Any]]) -> Callable[[Any, str], Any]:
    """For ``wrapped_methods``: methods of captured modules sow what they return, under their own names."""

    def wrap(method: Any, name: str) -> Any:
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            out = method(self, *args, **kwargs)
            if captured_in(self) is not None:
                self.sow(variable_type, name, out)
            return out

        return wrapped

    return wrap


def capture(
    fn: Any,
    *var_types: type[Variable[Any]],
    init: State | None = None,
    method_outputs: type[Variable[Any]] | None = None,
) -> Any:
    """A function that also returns what modules stored with ``sow`` and ``perturb``, and leaves nothing of it in them.

    >>> y, intermediates = nnx.capture(model, nnx.Intermediate)(x)

    Args:
        fn: a module, a method of one, or a function whose first argument is a module. A variable type instead makes
            this a decorator.
        var_types: what to return: one ``State`` for each, of the variables of that type that no type before matches.
        init: values to start from, as a capture of ``nnx.Perturbation`` gave them; they are not returned again.
        method_outputs: store what each method of the modules returns, under its name, in variables of this type.

    Returns:
        The function; it returns its result, or with ``var_types`` a tuple of it and the states.
    """
    if isinstance(fn, type) and issubclass(fn, Variable):
        types = (fn, *var_types)
        return lambda function: capture(function, *types, init=init, method_outputs=method_outputs)
    own = fn if isinstance(fn, Pytree) else getattr(fn, "__self__", None)

    @functools.wraps(fn if not isinstance(fn, Pytree) else type(fn).__call__)
    def captured(*args: Any, **kwargs: Any) -> Any:
        module = own if isinstance(own, Pytree) else args[0] if args else None
        nodes = [] if method_outputs is None else [node for _, node in _modules(module)]
        _begin(module, var_types, init)
        try:
            with wrapped_methods(nodes, _sowing(method_outputs or Variable)):
                out = fn(*args, **kwargs)
        finally:
            states = _end(module, var_types)
        return (out, *states) if var_types else out

    return captured
