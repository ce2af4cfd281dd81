"""``Module``, the base class of layers and models."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax.numpy as jnp

from distaff.frontend.nnx.capture import capture as capture
from distaff.frontend.nnx.capture import captured_in
from distaff.frontend.nnx.filters import Filter, PathParts, to_predicate
from distaff.frontend.nnx.graph_functions import clone
from distaff.frontend.nnx.pytrees import Pytree, PytreeMeta
from distaff.frontend.nnx.traversal import iter_children, iter_graph
from distaff.frontend.nnx.variable_kinds import Intermediate, Perturbation, variable_type_from_name
from distaff.frontend.nnx.variables import Variable

A = TypeVar("A")
ModuleMeta = PytreeMeta


def _appended(xs: Any, x: Any) -> Any:
    return (*xs, x)


class Module(Pytree):
    """Base class of layers and models: assign variables and modules in ``__init__``, write methods as you like."""

    def sow(
        self,
        variable_type: type[Variable[Any]] | str,
        name: str,
        value: Any,
        reduce_fn: Callable[[Any, Any], Any] = _appended,
        init_fn: Callable[[], Any] = tuple,
    ) -> bool:
        """Store a value in the attribute ``name``, to be taken out with ``nnx.pop`` or ``nnx.capture``.

        Args:
            variable_type: the type (or its name) of the variable that holds the values.
            name: the attribute; made if it does not exist.
            value: what to store.
            reduce_fn: ``(stored, value) -> stored``; by default values are collected in a tuple.
            init_fn: what is stored before the first value.

        Returns:
            Whether the value was stored.

        Raises:
            ValueError: the attribute is no variable, or one of another type.
        """
        cls = _variable_type(variable_type)
        captured = captured_in(self)
        if captured is not None:
            return _store(captured, cls, name, value, reduce_fn, init_fn)
        current = self._sown(cls, name)
        if current is None:
            setattr(self, name, cls(reduce_fn(init_fn(), value)))
        else:
            current.set_value(reduce_fn(current.get_value(), value))
        return True

    def perturb(self, name: str, value: Any, variable_type: type[Variable[Any]] | str = Perturbation) -> Any:
        """Add a perturbation (zero at first) to a value, so that the gradient at the perturbation is that of the value.

        Args:
            name: the attribute that holds the perturbation; made if it does not exist.
            value: an array.
            variable_type: the type (or its name) of that variable.

        Raises:
            ValueError: the attribute is no variable, or one of another type.
        """
        cls = _variable_type(variable_type)
        captured = captured_in(self)
        if captured is not None:
            if _store(captured, cls, name, value, lambda old, new: old, lambda: jnp.zeros_like(value)):
                return next(v for v in captured if type(v) is cls)[name] + value
            return value
        current = self._sown(cls, name)
        if current is None:
            current = cls(jnp.zeros_like(value))
            setattr(self, name, current)
        return current.get_value() + value

    def _sown(self, cls: type[Variable[Any]], name: str) -> Variable[Any] | None:
        current: Any = self.__dict__.get(name)
        if current is None:
            return None
        if not isinstance(current, Variable):
            raise ValueError(f"Expected {name!r} to be a Variable, got {type(current).__name__}; use another name.")
        if type(current) is not cls:
            raise ValueError(f"Expected {name!r} to be of type {cls.__name__!r}, got {type(current).__name__!r}.")
        return current

    def iter_modules(self) -> Iterator[tuple[PathParts, Module]]:
        """As ``nnx.iter_modules``."""
        return iter_modules(self)

    def iter_children(self) -> Iterator[tuple[Any, Module]]:
        """As ``nnx.iter_module_children``."""
        return iter_module_children(self)

    def set_attributes(
        self, *filters: Filter, raise_if_not_found: bool = True, graph: bool | None = None, **attributes: Any
    ) -> None:
        """Assign attributes of this module and all within, wherever there are attributes of these names.

        Args:
            filters: the modules to change (default: all); a module is changed if any matches.
            raise_if_not_found: raise an error if an attribute exists nowhere.
            graph: as for ``nnx.split``.
            attributes: names and values.

        Raises:
            ValueError: no module has one of the attributes.
        """
        _set_attributes(self, filters or (True,), raise_if_not_found, graph, attributes)

    def train(self, **attributes: Any) -> None:
        """Set ``deterministic=False`` and ``use_running_average=False``, and other attributes, where they exist."""
        self._set_mode(False, attributes)

    def eval(self, **attributes: Any) -> None:
        """Set ``deterministic=True`` and ``use_running_average=True``, and other attributes, where they exist."""
        self._set_mode(True, attributes)

    def _set_mode(self, value: bool, attributes: dict[str, Any]) -> None:
        modes = {"deterministic": value, "use_running_average": value}
        self.set_attributes(**{**modes, **attributes}, raise_if_not_found=False)


def _store(
    captured: Iterable[Variable[Any]],
    cls: type[Variable[Any]],
    name: str,
    value: Any,
    reduce_fn: Callable[[Any, Any], Any],
    init_fn: Callable[[], Any],
) -> bool:
    """Add a value to the captured ones of a type; False if that type is not captured."""
    for variable in captured:
        if type(variable) is cls:
            before = variable[name] if name in variable else init_fn()
            variable[name] = reduce_fn(before, value)
            return True
    return False


def _variable_type(variable_type: type[Variable[Any]] | str) -> type[Variable[Any]]:
    if isinstance(variable_type, str):
        return variable_type_from_name(variable_type, base=Intermediate, allow_register=True)
    return variable_type


def _set_attributes(
    node: Any, filters: tuple[Filter, ...], raise_if_not_found: bool, graph: bool | None, attributes: dict[str, Any]
) -> None:
    predicates = [to_predicate(f) for f in filters]
    missing = set(attributes)
    for path, module in list(iter_modules(node, graph=graph)):
        if any(matches(path, module) for matches in predicates):
            for name, value in attributes.items():
                if hasattr(module, name):
                    missing.discard(name)
                    if getattr(module, name) is not value:
                        setattr(module, name, value)
    if missing and raise_if_not_found:
        raise ValueError(f"Could not find at least one instance of the following attributes: {sorted(missing)}")


def iter_modules(module: Any, /, *, graph: bool | None = None) -> Iterator[tuple[PathParts, Module]]:
    """Paths and modules of all within a module, children first, itself last; each once."""
    for path, value in iter_graph(module, graph=graph):
        if isinstance(value, Module):
            yield path, value


def iter_module_children(module: Any, /, *, graph: bool | None = None) -> Iterator[tuple[Any, Module]]:
    """Keys and values of the direct children that are modules."""
    for key, value in iter_children(module, graph=graph):
        if isinstance(value, Module):
            yield key, value


def with_attributes(
    node: A, /, *, only: Filter = ..., raise_if_not_found: bool = True, graph: bool | None = None, **attributes: Any
) -> A:
    """A copy of an object with attributes assigned as by ``Module.set_attributes``; it shares the variables.

    Args:
        node: stays as it is.
        only: the modules to change.
        raise_if_not_found: raise an error if an attribute exists nowhere.
        graph: as for ``nnx.split``.
        attributes: names and values.

    Raises:
        ValueError: no module has one of the attributes.
    """
    copied: A = clone(node, variables=False, graph=graph)
    _set_attributes(copied, (only,), raise_if_not_found, graph, attributes)
    return copied


def view(
    node: A, /, *, only: Filter = ..., raise_if_not_found: bool = True, graph: bool | None = None, **kwargs: Any
) -> A:
    """A copy of an object, which shares the variables, with ``set_view`` called on its modules.

    Each module's ``set_view`` is given those settings that it has arguments for.

    Raises:
        ValueError: no module took one of the settings.
    """
    copied: A = clone(node, variables=False, graph=graph)
    matches = to_predicate(only)
    unused = set(kwargs)
    for path, module in list(iter_modules(copied, graph=graph)):
        if hasattr(module, "set_view") and matches(path, module):
            parameters = inspect.signature(module.set_view).parameters
            takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
            taken = {name: value for name, value in kwargs.items() if takes_all or name in parameters}
            module.set_view(**taken)
            unused -= taken.keys()
    if unused and raise_if_not_found:
        raise ValueError(f"Unused keys found in nnx.view: {sorted(unused)}")
    return copied


def view_info(node: Any, /, *, only: Filter = ..., graph: bool | None = None) -> str:
    """The settings that ``nnx.view`` takes for the modules of an object, as text."""
    matches = to_predicate(only)
    classes = {
        type(module)
        for path, module in iter_modules(node, graph=graph)
        if hasattr(module, "set_view") and matches(path, module)
    }
    return "\n".join(_view_text(cls) for cls in sorted(classes, key=lambda cls: cls.__qualname__))


def _view_text(cls: type[Any]) -> str:
    lines = [f"{cls.__qualname__}:"]
    described = _described_arguments(inspect.getdoc(cls.set_view) or "")
    for name, parameter in inspect.signature(cls.set_view).parameters.items():
        if name != "self" and parameter.kind is not parameter.VAR_KEYWORD:
            lines.append(f"  {parameter}")
            lines += [f"    {line}" for line in described.get(name, [])]
    return "\n".join(lines)


def _described_arguments(doc: str) -> dict[str, list[str]]:
    """The section ``Args:`` of a docstring: name to lines."""
    described: dict[str, list[str]] = {}
    name = ""
    for line in doc.partition("Args:")[2].splitlines():
        text = line.strip()
        if text.startswith(("Returns:", "Raises:")):
            break
        indent = len(line) - len(line.lstrip())
        if text and indent <= 4 and ":" in text:
            name, _, rest = text.partition(":")
            described[name] = [rest.strip()]
        elif text and name:
            described[name].append(text)
    return described
