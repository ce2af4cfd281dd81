"""Which implementation of a fused operation serves a call, and why the others do not.

An operation is a folder here and an implementation is a file in it that calls `register` when it is imported; the
files of a folder are imported when the operation is first looked up. So a new platform or format is one new file. A
folder may hold more operations on the same things, named ``folder.operation``. An operation says with `usual_calls`
what a model asks of it, so that `survey` can tell who serves what.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias, TypeVar

Attributes: TypeAlias = Mapping[str, Any]
Function = TypeVar("Function", bound=Callable[..., Any])

_PACKAGE = __name__.rpartition(".")[0]
_implementations: dict[str, dict[str, Implementation]] = {}
_usual_calls: dict[str, Callable[[], Mapping[str, Attributes]]] = {}


class UnknownOperationError(LookupError):
    """There is no folder of that name, or none of its files registers an implementation."""


class NoImplementationError(LookupError):
    """No implementation serves this call on this platform; the message says why each one does not."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute ``operation``; among those that serve a call the highest ``priority`` is chosen.

    ``platforms`` are XLA's names (cpu, cuda, rocm, tpu), None for every platform. ``refuses`` looks at the call's
    static attributes and returns why it cannot serve them, or None if it can.
    """

    operation: str
    name: str
    function: Callable[..., Any]
    platforms: frozenset[str] | None
    priority: int
    refuses: Callable[[Attributes], str | None]

    def objection(self, platform: str, attributes: Attributes) -> str | None:
        """Why this implementation does not serve such a call; None if it does."""
        if self.platforms is not None and platform not in self.platforms:
            return f"is for {', '.join(sorted(self.platforms))}, not {platform}"
        return self.refuses(attributes)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One row of `explain`: an implementation, whether it is the one chosen, and if not, why."""

    implementation: Implementation
    chosen: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class Choice:
    """What `survey` says of one usual call of an operation: every implementation's verdict, highest priority first."""

    operation: str
    call: str
    verdicts: tuple[Verdict, ...]

    @property
    def served_by(self) -> str | None:
        """The name of the implementation that is chosen."""
        return next((verdict.implementation.name for verdict in self.verdicts if verdict.chosen), None)


def register(
    operation: str,
    name: str,
    *,
    platforms: Collection[str] | None = None,
    priority: int = 0,
    refuses: Callable[[Attributes], str | None] = lambda attributes: None,
) -> Callable[[Function], Function]:
    """Decorator: offers a function as implementation ``name`` of ``operation``; see `Implementation` for the rest.

    Raises `ValueError` if the name is taken or another implementation has the same priority on a shared platform:
    a choice must not depend on the order of imports.
    """
    served = None if platforms is None else frozenset(platforms)

    def add(function: Function) -> Function:
        others = _implementations.setdefault(operation, {})
        if name in others:
            raise ValueError(f"{operation} already has an implementation {name!r}")
        for other in others.values():
            shared = served is None or other.platforms is None or served & other.platforms
            if other.priority == priority and shared:
                raise ValueError(f"{operation}: {name!r} and {other.name!r} share platforms and priority {priority}")
        others[name] = Implementation(operation, name, function, served, priority, refuses)
        return function

    return add


def usual_calls(operation: str) -> Callable[[Function], Function]:
    """Decorator of a function that gives the attributes of usual calls of ``operation`` by what they are for."""

    def add(function: Function) -> Function:
        _usual_calls[operation] = function
        return function

    return add


def survey(platform: str) -> tuple[Choice, ...]:
    """Which implementation serves each usual call of every operation on ``platform`` (XLA's name), and why not others.

    Imports the files of all operations.
    """
    for module in pkgutil.iter_modules(importlib.import_module(_PACKAGE).__path__):
        if module.ispkg:
            import_files(module.name)
    return tuple(
        Choice(operation, call, explain(operation, platform, attributes))
        for operation, calls in sorted(_usual_calls.items())
        for call, attributes in calls().items()
    )


def explain(operation: str, platform: str, attributes: Attributes) -> tuple[Verdict, ...]:
    """What every implementation says to such a call, highest priority first; at most one row is chosen.

    Raises `UnknownOperationError`.
    """
    rows: list[Verdict] = []
    chosen: Implementation | None = None
    for candidate in sorted(_candidates(operation), key=lambda i: (-i.priority, i.name)):
        reason = candidate.objection(platform, attributes)
        serves = reason is None and chosen is None
        if serves:
            chosen = candidate
        elif reason is None and chosen is not None:
            reason = f"{chosen.name} has priority {chosen.priority}, above {candidate.priority}"
        rows.append(Verdict(candidate, serves, reason or "serves this call"))
    return tuple(rows)


def choose(operation: str, platform: str, attributes: Attributes) -> Implementation:
    """The implementation that serves such a call; raises `NoImplementationError` or `UnknownOperationError`."""
    rows = explain(operation, platform, attributes)
    for row in rows:
        if row.chosen:
            return row.implementation
    said = "; ".join(f"{row.implementation.name} {row.reason}" for row in rows)
    raise NoImplementationError(f"nothing computes {operation} on {platform} for {dict(attributes)}: {said}")


def _candidates(operation: str) -> Collection[Implementation]:
    import_files(operation)
    if operation not in _implementations:
        raise UnknownOperationError(f"no file of {_PACKAGE}.{operation} registers an implementation of {operation!r}")
    return _implementations[operation].values()


@functools.cache
def import_files(operation: str) -> None:
    """Imports every file in the operation's folder, so that each can register itself.

    Raises `UnknownOperationError`.
    """
    name = f"{_PACKAGE}.{operation.partition('.')[0]}"
    try:
        folder = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UnknownOperationError(f"{_PACKAGE} has no folder {operation!r}") from None
    for module in pkgutil.iter_modules(folder.__path__, prefix=f"{name}."):
        importlib.import_module(module.name)
