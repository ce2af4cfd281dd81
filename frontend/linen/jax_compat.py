"""A float dtype whose gradients are joined by their maximum, where others are added: ``MaxGradDtype``.

JAX's extended dtypes, which random keys have too, can say so; they are no public part of it, so that this file touches
private names of JAX.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jax import lax
from jax._src import core, dtypes, earray
from jax._src.interpreters import pxla


class max_grad_dtype(dtypes.extended):
    """The kind of these dtypes, for ``jax.dtypes.issubdtype``."""


class _Rules:
    """What JAX asks of an extended dtype."""

    @staticmethod
    def physical_element_aval(dtype: MaxGradDtype) -> core.ShapedArray:
        return core.ShapedArray((), dtype.float_dtype)

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
        physical = core.physical_aval(aval)
        handler = pxla.global_result_handlers[core.ShapedArray](physical, out_sharding, committed)
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
