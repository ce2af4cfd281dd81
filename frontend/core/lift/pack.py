"""Carrying scopes across the boundary of a JAX transform: the machinery under every lifted transform.

A JAX transform sees pure functions of trees. ``pack`` takes the variables and random keys out of scopes in groups, one
for each filter, so that the transform can treat each group its own way; inside, they become scopes again; what was
assigned to them there is handed out and stored in the scopes outside.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import jax

from distaff.frontend.core.filters import (
    CollectionFilter,
    group_collections,
    in_filter,
    intersect_filters,
    union_filters,
)
from distaff.frontend.core.frozen_dict import unfreeze
from distaff.frontend.core.scope import Scope

T = TypeVar("T")
# For each filter, for each scope, the collections (or keys) that the filter matches.
Groups: TypeAlias = tuple[tuple[dict[str, Any], ...], ...]
# Where a scope is: the index of the scope that it is below (or is), and the names from there.
Place: TypeAlias = tuple[int, tuple[str, ...]]


def outermost_scopes(scopes: Sequence[Scope]) -> tuple[list[Scope], list[Place]]:
    """The scopes that are below no other one, each once, and the place of each of ``scopes`` below them."""
    given = set(scopes)
    roots: dict[Scope, int] = {}
    places = []
    for scope in scopes:
        root, names = scope, 0
        ancestor, depth = scope.parent, 1
        while ancestor is not None:
            if ancestor in given:
                root, names = ancestor, depth
            ancestor, depth = ancestor.parent, depth + 1
        path = scope.path[len(scope.path) - names :]
        places.append((roots.setdefault(root, len(roots)), path))
    return list(roots), places


def scopes_at(roots: Sequence[Scope], places: Sequence[Place]) -> list[Scope]:
    """The scopes at ``places`` below ``roots``: the inverse of ``outermost_scopes``."""
    scopes = []
    for root, path in places:
        scope = roots[root]
        for name in path:
            scope = scope.push(name, reuse=True)
        scopes.append(scope)
    return scopes


def _by_filter(by_scope: Sequence[tuple[dict[str, Any], ...]]) -> Groups:
    return tuple(zip(*by_scope, strict=True))


class Boundary:
    """Scopes on their way through a transform.

    ``variable_groups`` and ``rng_groups`` are what the transform takes in, ``enter`` makes scopes of them inside,
    ``leave`` the groups that the transform hands out, and ``publish`` stores those in the scopes outside.
    """

    def __init__(
        self,
        scope_tree: Any,
        in_filters: Sequence[CollectionFilter],
        out_filters: Sequence[CollectionFilter],
        rng_filters: Sequence[CollectionFilter],
        name: str,
    ) -> None:
        scopes: list[Scope] = jax.tree.leaves(scope_tree)
        self._tree: Any = jax.tree.structure(scope_tree)
        self._scopes, self._places = outermost_scopes(scopes)
        self._out_filters = out_filters
        self._mutable: CollectionFilter = False
        for out_filter in out_filters:
            self._mutable = union_filters(self._mutable, out_filter)
        self._name = name
        self.variable_groups = _by_filter([group_collections(scope.variables(), in_filters) for scope in self._scopes])
        self.rng_groups = _by_filter([group_collections(scope.rngs, rng_filters) for scope in self._scopes])

    def enter(self, variable_groups: Groups, rng_groups: Groups, mutable_filter: CollectionFilter = True) -> Any:
        """The scopes inside, over copies of these variables; only collections that may leave are mutable."""
        inside = []
        for index, scope in enumerate(self._scopes):
            mutable = intersect_filters(intersect_filters(scope.mutable, self._mutable), mutable_filter)
            variables = {col: values for group in variable_groups for col, values in group[index].items()}
            inner = Scope(
                {col: unfreeze(values) if in_filter(mutable, col) else values for col, values in variables.items()},
                {stream: rng for group in rng_groups for stream, rng in group[index].items()},
                scope.name,
                mutable,
                path=scope.path,
                debug_path=self._debug_path(scope),
                flags=scope.flags,
            )
            inner.key_counters = scope.key_counters
            inside.append(inner)
        return self._tree.unflatten(scopes_at(inside, self._places))

    def _debug_path(self, scope: Scope) -> tuple[str, ...]:
        """The scope's path with the transform's name around the last part."""
        *above, last = scope.debug_path or ("",)
        return (*above, f"{self._name}({last})")

    def leave(self, scope_tree: Any) -> Groups:
        """The mutable variables of the scopes inside, by out filter; the scopes become invalid."""
        by_scope = []
        for scope in dict.fromkeys(scope.root for scope in self._tree.flatten_up_to(scope_tree)):
            scope.invalidate()
            mutable = {col: values for col, values in scope.variables().items() if in_filter(scope.mutable, col)}
            by_scope.append(group_collections(mutable, self._out_filters))
        return _by_filter(by_scope)

    def publish(self, variable_groups: Groups) -> None:
        """Store the variables that ``leave`` gave in the scopes outside."""
        for group in variable_groups:
            for scope, collections in zip(self._scopes, group, strict=True):
                for col, values in collections.items():
                    # Some transforms, as scan does, hand immutable collections out too.
                    if scope.is_mutable_collection(col):
                        for name, value in values.items():
                            scope.put_variable(col, name, value)


def pack(
    fn: Callable[..., Any],
    in_variable_filters: Sequence[CollectionFilter],
    out_variable_filters: Sequence[CollectionFilter],
    rng_filters: Sequence[CollectionFilter],
    name: str = "transform",
    enable_kwargs: bool = False,
) -> Callable[..., Any]:
    """Make a function of a scope (or a tree of scopes) of one of groups of variables.

    Args:
        fn: ``fn(scope_fn, repack_fn, variable_groups, rng_groups, *args) -> (output, groups)``;
            ``scope_fn(variable_groups, rng_groups, mutable_filter=True)`` makes scopes, to be used inside a transform,
            and ``repack_fn(scopes)`` gives what was stored in them, to be returned from it.
        in_variable_filters: which collections are in each of ``variable_groups``; each goes to the first that matches.
        out_variable_filters: which collections are in each of the groups that come back; others are immutable.
        rng_filters: which random streams are in each of ``rng_groups``.
        name: the transform's, for messages.
        enable_kwargs: whether keyword arguments are passed on; otherwise they are left out with a RuntimeWarning.
    """

    @functools.wraps(fn)
    def call(scope_tree: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs and not enable_kwargs:
            warnings.warn(
                f"{name} takes no keyword arguments; ignored: {', '.join(kwargs)}. Pass them by position.",
                RuntimeWarning,
                stacklevel=2,
            )
            kwargs = {}
        boundary = Boundary(scope_tree, in_variable_filters, out_variable_filters, rng_filters, name)
        output, groups = fn(
            boundary.enter, boundary.leave, boundary.variable_groups, boundary.rng_groups, *args, **kwargs
        )
        boundary.publish(groups)
        return output

    return call
