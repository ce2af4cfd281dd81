"""The dtype in which a layer computes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

Array: TypeAlias = jax.Array
# A dtype or what jax.numpy takes for one, such as jnp.bfloat16 or "float32".
Dtype: TypeAlias = Any


def canonicalize_dtype(*args: Any, dtype: Dtype | None = None, inexact: bool = True) -> Dtype:
    """``dtype``, or the one that the arguments (None ones aside) promote to.

    With ``inexact``, integers count as float32, and ValueError refuses a ``dtype`` that is not floating or complex.
    """
    if dtype is None:
        arrays = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in args if x is not None]
        dtype = _common_dtype(arrays) or jnp.result_type(*arrays)
        if inexact and not jnp.issubdtype(dtype, jnp.inexact):
            dtype = jnp.promote_types(jnp.float32, dtype)
    if inexact and not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(f"Dtype must be inexact, that is floating or complex: {dtype}.")
    return dtype


def promoted(args: Iterable[Any], dtype: Dtype | None = None, inexact: bool = True) -> list[Any]:
    """The arguments as arrays of one dtype, chosen by ``canonicalize_dtype``; None stays None."""
    args = tuple(args)
    dtype = canonicalize_dtype(*args, dtype=dtype, inexact=inexact)
    return [x if x is None or _has_dtype(x, dtype) else jnp.asarray(x, dtype) for x in args]


def _common_dtype(arrays: list[jax.Array]) -> Dtype | None:
    """The dtype that all arrays have, if they do; to know that is cheaper than to promote."""
    dtypes = {x.dtype for x in arrays}
    return dtypes.pop() if len(dtypes) == 1 else None


def _has_dtype(x: Any, dtype: Dtype) -> bool:
    """Whether a conversion would do nothing; to know that is cheaper than to convert."""
    return isinstance(x, jax.Array) and x.dtype == dtype and not x.weak_type
