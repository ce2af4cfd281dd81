"""What the frontend needs of ``jax.extend``, ``jax.interpreters`` and private names of JAX; no other file uses them."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax._src import core as _src_core
from jax._src import dtypes, earray
from jax._src.interpreters import batching as _batching
from jax._src.interpreters import pxla
from jax.extend import core as _core
from jax.extend import linear_util as _linear_util
from jax.interpreters import partial_eval as _partial_eval

try:
    from jax._src.hijax import Box as Box
except ImportError:  # JAX has had no boxes since 0.11

    class Box:  # type: ignore[no-redef]
        """In the place of JAX's box: there is none, and making one says so."""

        def __init__(self, value: Any) -> None:
            raise BoxesMissingError(
                f"hijax=True keeps a variable's value in a box of JAX's, and JAX {jax.__version__} has none; take "
                "ref=True for variables that change in place, or JAX 0.10"
            )


class BoxesMissingError(NotImplementedError):
    """This version of JAX has nothing to keep the value of a variable with ``hijax=True`` in."""


class Unknown:
    """An output of ``evaluate_known`` that depends on an abstract input; ``aval`` has its shape and dtype."""

    def __init__(self, aval: Any) -> None:
        self.aval = aval


def current_trace() -> Hashable:
    """What identifies the innermost running JAX transform; equal while no transform is entered or left."""
    trace: Hashable = _core.get_opaque_trace_state(convention="flax")
    return trace


def running_trace() -> weakref.ReferenceType[Any]:
    """A weak reference to the innermost running JAX transform: the same object while that one runs."""
    return weakref.ref(_src_core.trace_ctx.trace)


def made_by_current_trace(x: Any) -> bool:
    """Whether ``x`` is a tracer of the innermost running transform, which it must not outlive."""
    if not isinstance(x, jax.core.Tracer):
        return False
    running = getattr(current_trace(), "_trace_ref", lambda: None)()
    return running is None or getattr(x, "_trace", running) is running


def is_mapped(x: Any) -> bool:
    """Whether ``x`` differs from row to row of the innermost running transform, which is a ``vmap``."""
    return isinstance(x, _batching.BatchTracer) and x.batch_dim is not None and made_by_current_trace(x)


def mapped_axis(x: Any) -> int:
    """Which axis of the whole value is that of the rows, of what ``is_mapped``."""
    return x.batch_dim  # type: ignore[no-any-return]


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


# A float dtype whose gradients are joined by their maximum, where others are added: an extended dtype of JAX, as random
# keys have one.


class max_grad_dtype(dtypes.extended):
    """The kind of these dtypes, for ``jax.dtypes.issubdtype``."""


class _Rules:
    """What JAX asks of an extended dtype."""

    @staticmethod
    def physical_element_aval(dtype: MaxGradDtype) -> _src_core.ShapedArray:
        return _src_core.ShapedArray((), dtype.float_dtype)

    @staticmethod
    def convert_from(dtype: MaxGradDtype, other: Any) -> bool:
        return bool(dtype.float_dtype == other)

    @staticmethod
    def convert_to(other: Any, dtype: MaxGradDtype) -> bool:
        return bool(dtype.float_dtype == other)

    @staticmethod
    def tangent_dtype(dtype: MaxGradDtype) -> MaxGradDtype:
        return dtype

    @staticmethod
    def add(dtype: MaxGradDtype, x: Any, y: Any) -> Any:
        """Joins two gradients."""
        floats = [lax.convert_element_type(gradient, dtype.float_dtype) for gradient in (x, y)]
        return lax.convert_element_type(lax.max(*floats), dtype)

    @staticmethod
    def zero(dtype: MaxGradDtype) -> Any:
        """What ``add`` leaves the other of."""
        return lax.convert_element_type(np.array(-np.inf, dtype.float_dtype), dtype)

    @staticmethod
    def full(shape: tuple[int, ...], fill_value: Any, dtype: MaxGradDtype) -> Any:
        fill_value = lax.convert_element_type(fill_value, dtype.float_dtype)
        return lax.convert_element_type(lax.full(shape, fill_value, dtype.float_dtype), dtype)

    @staticmethod
    def global_sharded_result_handler(aval: Any, out_sharding: Any, committed: bool) -> Any:
        """How outputs of compiled functions become arrays: as their floats, under this dtype."""
        physical = _src_core.physical_aval(aval)
        handler = pxla.global_result_handlers[_src_core.ShapedArray](physical, out_sharding, committed)
        return lambda buffers: earray.EArray(aval, handler(buffers))


@dataclasses.dataclass(frozen=True)
class MaxGradDtype(dtypes.ExtendedDType):
    """``float_dtype``, to and from which it can be converted, but with gradients joined by their maximum."""

    float_dtype: Any
    _rules = _Rules
    type = max_grad_dtype

    def __repr__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        """As Flax names it: ``fp8_meta32``."""
        return f"fp8_meta{8 * np.dtype(self.float_dtype).itemsize}"


def inner_jaxprs(equation: Any) -> list[Any]:
    """The jaxprs among the parameters of an equation, such as the body of a loop."""
    return list(_src_core.jaxprs_in_params(equation.params))


def function_of_equations(
    equations: Sequence[Any], outputs: Sequence[Any]
) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]:
    """Some equations of a jaxpr as a function: what ``outputs`` depend on, of the variables that come from elsewhere.

    Returns:
        The function, from arrays to a list of arrays, and the shapes of its arguments.
    """
    needed = dict.fromkeys(outputs)
    kept = []
    for equation in reversed(equations):
        if any(var in needed for var in equation.outvars):
            kept.append(equation)
            needed.update(dict.fromkeys(x for x in equation.invars if not isinstance(x, _core.Literal)))
    made = {var for equation in kept for var in equation.outvars}
    inputs = [var for var in needed if var not in made]
    about = jax.api_util.debug_info("function_of_equations", lambda *arrays: arrays, tuple(inputs), {})
    jaxpr = _core.Jaxpr((), inputs, outputs, kept[::-1], debug_info=about._replace(result_paths=None))
    shapes = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in inputs]
    return _core.jaxpr_as_fun(_core.ClosedJaxpr(jaxpr, ())), shapes
