"""Evaluation of a function as far as it does not depend on its inputs.

The function is traced to a jaxpr; the outputs that no input reaches are computed, in one compiled program from which
XLA drops all else. Lazy initialisation uses it: parameters depend on the shapes of a model's inputs, not on values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Primitives that run one jaxpr on exactly their operands, once.
_CALLS = {"jit", "pjit", "checkpoint", "remat", "remat2", "custom_jvp_call", "custom_vjp_call", "closed_call"}
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def known_outputs(fn: Callable[..., Any], inputs: Sequence[jax.ShapeDtypeStruct]) -> Any:
    """``fn(*inputs)``, with a ``jax.ShapeDtypeStruct`` in place of each array that depends on the inputs."""
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*inputs)
    leaves, tree = jax.tree.flatten(shapes)
    jaxpr = closed.jaxpr
    depends = _dependent(jaxpr, [True] * len(jaxpr.invars))

    def known() -> list[Any]:
        outputs = jax.tree.leaves(fn(*(jnp.zeros(x.shape, x.dtype) for x in inputs)))
        return [x for x, unknown in zip(outputs, depends, strict=True) if not unknown]

    values = iter(jax.jit(known)() if not all(depends) else ())
    return jax.tree.unflatten(
        tree,
        [
            jax.ShapeDtypeStruct(x.shape, x.dtype) if unknown else next(values)
            for x, unknown in zip(leaves, depends, strict=True)
        ],
    )


def _dependent(jaxpr: Any, inputs: Iterable[bool]) -> list[bool]:
    """Which outputs of a jaxpr depend on those of its inputs that are marked; any loop or branch mixes all."""
    marked = {var for var, mark in zip(jaxpr.invars, inputs, strict=True) if mark}

    def is_marked(atom: Any) -> bool:
        return not hasattr(atom, "val") and atom in marked  # literals have a value, and no hash

    for equation in jaxpr.eqns:
        operands = [is_marked(atom) for atom in equation.invars]
        results = [any(operands)] * len(equation.outvars)
        body = next((equation.params[name] for name in _BODIES if name in equation.params), None)
        if equation.primitive.name in _CALLS and body is not None:
            results = _dependent(getattr(body, "jaxpr", body), operands)
        marked |= {var for var, mark in zip(equation.outvars, results, strict=True) if mark}
    return [is_marked(atom) for atom in jaxpr.outvars]
