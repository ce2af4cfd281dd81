"""Functions of objects as functions of trees of arrays, for transforms of JAX that this package has not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

from distaff.frontend.nnx.contexts import clear_non_graph_nodes, from_tree, to_tree, update_context

_MISSING: Any = object()


def split_inputs(f: Any = _MISSING, *, ctxtag: Hashable = "split_merge_inputs") -> Any:
    """Have a transformed function of JAX take objects; what it transforms is the result of ``merge_inputs``.

    >>> y = split_inputs(jax.jit(merge_inputs(forward)))(model, x)

    What the function does to the objects happens to those given. Without ``f``, a decorator.

    Args:
        f: it returns what a function of ``merge_inputs`` returned: the objects given, changed, and the result.
        ctxtag: the same as that of ``merge_inputs``.
    """
    if f is _MISSING:
        return functools.partial(split_inputs, ctxtag=ctxtag)

    @update_context(ctxtag)
    @functools.wraps(f)
    def split(*args: Any) -> Any:
        _, out = from_tree(f(*to_tree(args, ctxtag=ctxtag)), ctxtag=ctxtag, is_inner=False)
        return out

    return split


def merge_inputs(f: Callable[..., Any] = _MISSING, *, ctxtag: Hashable = "split_merge_inputs") -> Any:
    """A function of objects as one of trees of arrays, for a transform of JAX inside ``split_inputs``.

    It returns a pair: the arguments with None for all that is no object, and the result; for a transform that is told
    of its outputs (``out_axes``), the first is as the arguments are. Without ``f``, a decorator.
    """
    if f is _MISSING:
        return functools.partial(merge_inputs, ctxtag=ctxtag)

    @functools.wraps(f)
    def merge(*trees: Any) -> Any:
        args = from_tree(trees, ctxtag=ctxtag, is_inner=True)
        out = f(*args)
        return to_tree((clear_non_graph_nodes(args), out), ctxtag=ctxtag)

    return merge
