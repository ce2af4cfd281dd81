"""What variables store: a value, or a mutable array or box with it, which is assigned in place."""

from __future__ import annotations

import copy
from typing import Any

import jax
import numpy as np

from distaff.frontend.jax_compat import Box

_IN_PLACE = (jax.Ref, Box)


def is_array_ref(value: Any) -> bool:
    """Whether a value is a mutable array, or stands for one in a trace."""
    return isinstance(value, jax.Ref)


def changes_in_place(value: Any) -> bool:
    """Whether what a variable stores is assigned in place, in any trace: a mutable array, or a box of JAX's."""
    return isinstance(value, _IN_PLACE)


def stored(value: Any, hijax: bool, ref: bool) -> Any:
    """What a variable stores for a value."""
    if ref:
        return value if isinstance(value, jax.Ref) else jax.new_ref(value)
    return Box(value) if hijax and not isinstance(value, Box) else value


def has_parts(raw: Any) -> bool:
    """Whether a value is an array, of which parts are assigned in one operation."""
    return isinstance(raw, jax.Array | np.ndarray | jax.Ref)


def with_part(raw: Any, index: Any, value: Any) -> Any:
    """A value with a part replaced. The dtype of an array stays; a NumPy array is changed itself, a dict is copied."""
    if isinstance(raw, jax.Array):
        whole = index is Ellipsis and isinstance(value, jax.Array) and value.shape == raw.shape
        if whole and value.dtype == raw.dtype and not getattr(value, "weak_type", False):
            return value
        return raw.at[index].set(value)
    changed: Any = raw if isinstance(raw, np.ndarray) else copy.copy(raw)
    changed[index] = value
    return changed
