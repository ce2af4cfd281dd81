"""What the frontend needs of ``jax.extend`` and ``jax.interpreters``; only ``linen/jax_compat.py`` goes further."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import jax
from jax.extend import core as _core
from jax.extend import linear_util as _linear_util
from jax.interpreters import partial_eval as _partial_eval


class Unknown:
    """An output of ``evaluate_known`` that depends on an abstract input; ``aval`` has its shape and dtype."""

    def __init__(self, aval: Any) -> None:
        self.aval = aval


def current_trace() -> Hashable:
    """What identifies the innermost running JAX transform; equal while no transform is entered or left."""
    trace: Hashable = _core.get_opaque_trace_state(convention="flax")
    return trace


def made_by_current_trace(x: Any) -> bool:
    """Whether ``x`` is a tracer of the innermost running transform, which it must not outlive."""
    if not isinstance(x, jax.core.Tracer):
        return False
    running = getattr(current_trace(), "_trace_ref", lambda: None)()
    return running is None or getattr(x, "_trace", running) is running


def row_type(x: Any) -> Any:
    """The abstract value of ``x[0]``."""
    aval = jax.typeof(x)
    return _core.mapped_aval(aval.shape[0], 0, aval)


def evaluate_known(fn: Callable[..., Any], *args: Any) -> Any:
    """``fn(*args)``, computing only what does not depend on abstract arguments.

    Abstract are arguments (leaves of ``args``) that are ``jax.ShapeDtypeStruct`` or abstract values as of
    ``jax.typeof``. Output leaves that depend on them are ``Unknown``.
    """
    leaves, args_tree = jax.tree.flatten(args)
    tree: Any = args_tree
    out_tree: Any = None

    def flat(*leaves: Any) -> list[Any]:
        nonlocal out_tree
        outputs, out_tree = jax.tree.flatten(fn(*tree.unflatten(leaves)))
        return outputs

    about = jax.api_util.debug_info("evaluate_known", flat, tuple(leaves), {})
    _, outputs, _ = _partial_eval.trace_to_jaxpr_nounits(
        _linear_util.wrap_init(flat, debug_info=about), [_partial_value(leaf) for leaf in leaves]
    )
    return out_tree.unflatten([const if aval is None else Unknown(aval) for aval, const in outputs])


def _partial_value(x: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        x = jax.core.ShapedArray(x.shape, x.dtype)
    if isinstance(x, jax.core.AbstractValue):
        return _partial_eval.PartialVal.unknown(x)
    return _partial_eval.PartialVal.known(x)
