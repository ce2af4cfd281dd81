"""Lifted ``jit``, and ``fold_rngs``, which treats random keys as ``jit`` does and compiles nothing."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import jax

from distaff.frontend.core.filters import CollectionFilter, DenyList
from distaff.frontend.core.lift.pack import Groups, pack
from distaff.frontend.core.rng import LazyRng


class Calls(threading.local):
    """What belongs to each call that runs in this thread; the innermost is the last.

    A function that is traced once for many calls finds here what must not be kept with the trace.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []

    @contextlib.contextmanager
    def running(self, call: Any) -> Iterator[None]:
        """``call`` is the innermost one inside the ``with`` block."""
        self.stack.append(call)
        try:
            yield
        finally:
            self.stack.pop()


def _hashable(filter_like: CollectionFilter) -> Hashable:
    if isinstance(filter_like, DenyList):
        return "all but", _hashable(filter_like.deny)
    return filter_like if isinstance(filter_like, bool | str) else tuple(sorted(filter_like))


def _without_paths(rng_groups: Groups) -> Groups:
    """The keys before any name is folded in, so that one compiled program serves every place in the tree."""

    def clear(rng: Any) -> Any:
        return rng.clear_suffix() if isinstance(rng, LazyRng) else rng

    return jax.tree.map(clear, rng_groups, is_leaf=lambda x: isinstance(x, LazyRng))  # type: ignore[no-any-return]


def _counts(scopes: Any) -> list[dict[tuple[str, ...], int]]:
    return [scope.key_counters.flat() for scope in jax.tree.leaves(scopes)]


def jit(
    fn: Callable[..., Any],
    variables: CollectionFilter = True,
    rngs: CollectionFilter = True,
    static_argnums: int | Iterable[int] = (),
    static_argnames: str | Iterable[str] = (),
    donate_argnums: int | Iterable[int] = (),
    device: Any = None,
    backend: str | None = None,
) -> Callable[..., Any]:
    """Lifted ``jax.jit`` of ``fn(scope, key, *args, **kwargs)``.

    The result is called ``(scope, key, *args, **kwargs)``: ``key`` is any hashable value that says what ``fn`` depends
    on besides its arguments, the variables and which of them are mutable. It is traced once for each.

    Args:
        variables, rngs: the collections and random streams that are seen inside.
        static_argnums, donate_argnums: arguments, counted with the scope as 0 and without ``key``.
        static_argnames, device, backend: as for ``jax.jit``.
    """
    static, donated = (
        tuple(number + 2 for number in ((numbers,) if isinstance(numbers, int) else numbers) if number > 0)
        for numbers in (static_argnums, donate_argnums)
    )
    options: dict[str, Any] = {
        name: value for name, value in (("device", device), ("backend", backend)) if value is not None
    }
    calls = Calls()
    draws: dict[Hashable, list[dict[tuple[str, ...], int]]] = {}

    def pure(about: tuple[Hashable, Hashable], variables: Groups, rngs: Groups, *args: Any, **kwargs: Any) -> Any:
        scope_fn, repack_fn = calls.stack[-1]
        scope = scope_fn(variables, rngs)
        before = _counts(scope)
        output = fn(scope, about[1], *args, **kwargs)
        draws[about] = [
            {path: count - old.get(path, 0) for path, count in new.items()}
            for old, new in zip(before, _counts(scope), strict=True)
        ]
        return output, repack_fn(scope)

    compiled = jax.jit(
        pure,
        static_argnums=(0, *static),
        static_argnames=static_argnames,
        donate_argnums=donated,
        **options,
    )

    def run(
        scope_fn: Callable[..., Any],
        repack_fn: Callable[..., Any],
        variables: Groups,
        rngs: Groups,
        key: Hashable,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        scopes = jax.tree.leaves(scope_fn(variables, rngs))
        about = (tuple(_hashable(scope.mutable) for scope in scopes), key)
        before = _counts(scopes)
        with calls.running((scope_fn, repack_fn)):
            result = compiled(about, variables, _without_paths(rngs), *args, **kwargs)
        # A call of compiled code draws the keys that its trace drew.
        for scope, old, drawn in zip(scopes, before, draws[about], strict=True):
            scope.key_counters.set_flat({path: old.get(path, 0) + count for path, count in drawn.items()})
        return result

    return pack(run, (variables,), (variables,), (rngs,), name="jit", enable_kwargs=True)


def fold_rngs(
    fn: Callable[..., Any], variables: CollectionFilter = True, rngs: CollectionFilter = True
) -> Callable[..., Any]:
    """``fn(scope, key, *args, **kwargs)`` with the keys that it would see under ``jit``, as ``(scope, key, ...)``."""

    def run(
        scope_fn: Callable[..., Any],
        repack_fn: Callable[..., Any],
        variables: Groups,
        rngs: Groups,
        key: Hashable,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        scope = scope_fn(variables, _without_paths(rngs))
        output = fn(scope, key, *args, **kwargs)
        return output, repack_fn(scope)

    return pack(run, (variables,), (variables,), (rngs,), name="fold_rngs", enable_kwargs=True)
