"""``capture``: take what modules ``sow`` and ``perturb`` out of a call instead of storing it in the modules."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from distaff.frontend.nnx.filters import PathParts
from distaff.frontend.nnx.pytrees import Pytree
from distaff.frontend.nnx.state import FlatState, State, filter_flat, iter_flat
from distaff.frontend.nnx.traversal import iter_graph
from distaff.frontend.nnx.variables import Variable

Store = dict[str, Variable[Any]]


class _Captures(threading.local):
    def __init__(self) -> None:
        self.running: list[_Capture] = []


_captures = _Captures()


class _Capture:
    """One call: for each node of the module, by its id, the path and what was stored under which name."""

    def __init__(self, module: Any, init: Mapping[Any, Any] | None) -> None:
        self.nodes = [(path, node) for path, node in iter_graph(module, graph=True) if isinstance(node, Pytree)]
        self.stores: dict[int, Store] = {id(node): {} for _, node in self.nodes}
        self._given: set[PathParts] = set()
        at = {path: self.stores[id(node)] for path, node in self.nodes}
        for path, variable in iter_flat(init or {}):
            if path[:-1] not in at:
                raise ValueError(f"`init` has {path}, and the captured module has nothing at {path[:-1]}.")
            at[path[:-1]][path[-1]] = variable.copy()
            self._given.add(path)

    def states(self, types: tuple[type[Variable[Any]], ...]) -> tuple[State, ...]:
        """For each type, what was stored of it."""
        found = (((*path, name), value) for path, node in self.nodes for name, value in self.stores[id(node)].items())
        wanted = ((path, value) for path, value in found if path not in self._given and type(value) in types)
        flat = FlatState(wanted, sort=True)
        return tuple(group.to_nested_state() for group in filter_flat(flat, types))


def captured_store(module: Any) -> Store | None:
    """Where ``sow`` and ``perturb`` of a module store values while a call on it is captured; None otherwise."""
    for capture in reversed(_captures.running):
        if id(module) in capture.stores:
            return capture.stores[id(module)]
    return None


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


def _sowing(capture: _Capture, variable_type: type[Variable[Any]]) -> Callable[[Any, str], Any]:
    """For ``wrapped_methods``: methods of captured modules sow what they return, under their own names."""

    def wrap(method: Any, name: str) -> Any:
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            out = method(self, *args, **kwargs)
            if id(self) in capture.stores:
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
        running = _Capture(own if isinstance(own, Pytree) else args[0] if args else None, init)
        _captures.running.append(running)
        nodes = [node for _, node in running.nodes] if method_outputs is not None else []
        sown = wrapped_methods(nodes, _sowing(running, method_outputs or Variable))
        try:
            with sown:
                out = fn(*args, **kwargs)
        finally:
            _captures.running.remove(running)
        return (out, *running.states(var_types)) if var_types else out

    return captured
