"""How many floating point operations functions take, as XLA estimates them, without running or compiling them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from distaff.frontend.jax_compat import function_of_equations, inner_jaxprs


def flops(fn: Callable[..., Any], *args: Any) -> int:
    """The operations of ``fn(*args)``; the arguments may be abstract."""
    cost = jax.jit(fn).lower(*args).cost_analysis()
    return int((cost or {}).get("flops", 0))


def vjp_flops(fn: Callable[..., Any], *args: Any) -> int:
    """The operations of ``fn(*args)`` and of its gradient by all arguments."""

    def backward(*args: Any) -> Any:
        outputs, vjp = jax.vjp(fn, *args)
        return vjp(jax.tree.map(_cotangent, outputs))

    return flops(backward, *args)


def _cotangent(x: Any) -> Any:
    """A value of the cotangent type of ``x``."""
    is_inexact = jnp.issubdtype(jnp.result_type(x), np.inexact)
    return jnp.asarray(x) if is_inexact else np.zeros(np.shape(x), jax.dtypes.float0)


# A part of a function that is traced once: its equations bear its name, and its outputs are named.


def named_part(name: str, fn: Callable[[], Any], is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """``fn()``, such that ``part_as_function`` finds in the jaxpr around what it computes.

    Args:
        name: of the part, a word.
        fn: what to compute.
        is_leaf: parts of the output that are not looked into, as for ``jax.tree.map``.
    """
    with jax.named_scope(name):
        out = fn()
        return jax.tree.map(lambda x: checkpoint_name(x, name) if isinstance(x, jax.Array) else x, out, is_leaf=is_leaf)


def part_as_function(jaxpr: Any, name: str) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]] | None:
    """The named part of a jaxpr as a function, with the shapes of its arguments; None if it has no outputs."""
    within = re.compile(rf"\b{name}\b")
    for inner in _all_jaxprs(jaxpr):
        equations = inner.eqns
        outputs = [e.outvars[0] for e in equations if e.primitive.name == "name" and e.params["name"] == name]
        if outputs:
            own = [e for e in equations if within.search(str(e.source_info.name_stack))]
            return function_of_equations(own, outputs)
    return None


def _all_jaxprs(jaxpr: Any) -> Iterator[Any]:
    yield jaxpr
    for equation in jaxpr.eqns:
        for inner in inner_jaxprs(equation):
            yield from _all_jaxprs(inner)
