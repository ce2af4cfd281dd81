"""The only file that touches ``jax.extend``, ``jax.interpreters`` or private JAX names.

Everything that may move between JAX releases is named here once: jaxpr classes, source locations, binding a primitive
under a given location, and marking our own folders as library code so that locations name the user's lines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import source_info_util as _private_source_info
from jax.extend import core as _core
from jax.extend import source_info_util as _source_info

from distaff.compiler.ir.location import Frame, Location

Jaxpr = _core.Jaxpr
ClosedJaxpr = _core.ClosedJaxpr
Literal = _core.Literal
Primitive = _core.Primitive

# Modules that users build models with: a location names the line that called into them, not their insides.
_LIBRARY_FOLDERS = ("/flax/", "/equinox/", "/haiku/", "/jaxtyping/", "/einops/", "/optax/", "/penzai/")
_OWN_LIBRARY = tuple(
    str(Path(__file__).resolve().parent.parent / folder) + "/"
    for folder in ("compiler", "frontend/core", "frontend/linen", "frontend/nnx")
)


def trace(function: Callable[..., Any], *args: Any) -> ClosedJaxpr:
    """Traces ``function`` on arrays or ``jax.ShapeDtypeStruct`` arguments to a closed jaxpr."""
    return jax.make_jaxpr(function)(*args)


def inner_jaxpr(params: dict[str, Any]) -> tuple[Jaxpr, Sequence[Any]] | None:
    """The jaxpr and constants that a call-like equation runs, or None if the equation is no plain call."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = params.get(key)
        if isinstance(inner, ClosedJaxpr):
            return inner.jaxpr, inner.consts
        if isinstance(inner, Jaxpr):
            return inner, ()
    return None


def scan_parts(params: dict[str, Any]) -> tuple[int, int]:
    """How many leading operands of a ``scan`` equation are constants of the loop, and how many after them its carry."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carry, _ = params["ft_in"].unpack()  # since jax 0.12
    return len(constants), len(carry)


def expand_hijax_call(equation: Any) -> ClosedJaxpr | None:
    """The plain jaxpr of a ``call_hi_primitive`` equation (as ``jax.checkpoint`` becomes under JAX_REMAT3)."""
    primitive = equation.params.get("_prim") or equation.params.get("prim")
    if primitive is None:
        return None
    avals = [v.aval for v in equation.invars]
    tree = jax.tree_util.tree_structure(jax.tree_util.tree_unflatten(primitive.in_tree, range(len(avals))))
    args = jax.tree_util.tree_unflatten(tree, [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals])
    return jax.make_jaxpr(primitive.expand)(*args)


def location_of(equation: Any, enclosing: Sequence[Location] = ()) -> Location:
    """The user's frames of an equation, innermost first; a library helper without any takes its caller's."""
    traceback = equation.source_info.traceback
    frames: list[Frame] = []
    if traceback is not None:
        frames = [
            Frame(f.file_name, f.start_line, f.function_name)
            for f in _private_source_info.user_frames(traceback)
            if not any(part in f.file_name for part in _LIBRARY_FOLDERS) and not f.file_name.startswith(_OWN_LIBRARY)
        ]
    if not frames and enclosing:
        return enclosing[-1]
    return Location(tuple(frames), str(equation.source_info.name_stack), traceback)


@contextlib.contextmanager
def at_location(location: Location) -> Iterator[None]:
    """Gives primitives bound inside it the user's location, so that StableHLO names the user's lines."""
    if location.traceback is None:
        yield
        return
    stack = _source_info.current_name_stack()
    with _source_info.user_context(location.traceback, name_stack=stack):
        yield


def bind(primitive: Primitive, arrays: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    """Applies a primitive and returns its results as a list."""
    results = primitive.bind(*arrays, **params)
    return list(results) if primitive.multiple_results else [results]


def aval_dtype(aval: Any) -> np.dtype[Any]:
    """The NumPy dtype of an abstract value; raises TypeError for extended types such as PRNG keys."""
    dtype: np.dtype[Any] = np.dtype(aval.dtype)
    return dtype
