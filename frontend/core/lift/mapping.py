"""Lifted views of variables: ``map_variables`` and ``swap_collection``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax

from distaff.frontend.core.filters import CollectionFilter, is_filter_empty, subtract_filters
from distaff.frontend.core.frozen_dict import unfreeze
from distaff.frontend.core.lift.pack import Groups, pack

T = TypeVar("T")


def id_fn(x: T) -> T:
    """``x``."""
    return x


def map_variables(
    fn: Callable[..., Any],
    mapped_collections: CollectionFilter,
    map_in_fn: Callable[[Any], Any] = id_fn,
    map_out_fn: Callable[[Any], Any] = id_fn,
    init: bool = False,
    mutable: bool = False,
    rngs: CollectionFilter = True,
    variables: CollectionFilter = True,
) -> Callable[..., Any]:
    """``fn(scope, *args, **kwargs)`` with another view of some collections.

    Args:
        mapped_collections: the collections to map.
        map_in_fn: the collections outside to those that ``fn`` sees: dicts ``{collection: {...}}``.
        map_out_fn: the inverse, for variables that ``fn`` makes (``init``) or changes (``mutable``).
        init: run ``fn`` once to make the variables, before it runs on the view of them.
        mutable: let ``fn`` change the mapped collections.
        rngs, variables: the random streams and the other collections that are seen inside.
    """
    mapped_out = mutable or init
    # Without a way back, what is seen of the mapped collections cannot be changed.
    changeable: CollectionFilter = True if mapped_out else subtract_filters(True, mapped_collections)

    def run(
        scope_fn: Callable[..., Any],
        repack_fn: Callable[..., Any],
        groups: Groups,
        rngs: Groups,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        mapped, others = groups
        if init:
            scope = scope_fn((mapped, others), rngs)
            if any(not is_filter_empty(inner.mutable) for inner in jax.tree.leaves(scope)):
                fn(scope, *args, **kwargs)
                made, _ = repack_fn(scope)
                mapped = tuple(map_out_fn(collections) for collections in made)
        mapped = tuple(map_in_fn(unfreeze(collections)) for collections in mapped)
        scope = scope_fn((mapped, others), rngs, mutable_filter=changeable)
        output = fn(scope, *args, **kwargs)
        made, changed = repack_fn(scope)
        return output, (tuple(map_out_fn(collections) for collections in made) if mapped_out else made, changed)

    out_filters = (
        (mapped_collections, variables) if mapped_out else (False, subtract_filters(variables, mapped_collections))
    )
    return pack(run, (mapped_collections, variables), out_filters, (rngs,), name="map_variables", enable_kwargs=True)


def swap_collection(fn: Callable[..., Any], col_a: str, col_b: str) -> Callable[..., Any]:
    """``fn(scope, ...)`` with two collections under each other's names."""

    def swap(collections: dict[str, Any]) -> dict[str, Any]:
        a, b = collections.get(col_a, {}), collections.get(col_b, {})
        return {**collections, col_a: b, col_b: a}

    return map_variables(fn, (col_a, col_b), swap, swap, mutable=True)
