"""Products in 8-bit floats as modules, for the fields ``dot_general_cls`` and ``…_einsum_cls`` of layers.

Scales and histories (see ``distaff.frontend.layers.fp8``) are variables of the collection
``_overwrite_with_gradient``.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax.numpy as jnp

from distaff.frontend.core.scope import Variable
from distaff.frontend.layers.fp8 import DimensionNumbers as DimensionNumbers
from distaff.frontend.layers.fp8 import compute_amax_history as compute_amax_history
from distaff.frontend.layers.fp8 import compute_scale as compute_scale
from distaff.frontend.layers.fp8 import dequantize as dequantize
from distaff.frontend.layers.fp8 import dot_general_with_precision as dot_general_with_precision
from distaff.frontend.layers.fp8 import fm32 as fm32
from distaff.frontend.layers.fp8 import fp8_scaled_dot_general as fp8_scaled_dot_general
from distaff.frontend.layers.fp8 import fp32_max_grad as fp32_max_grad
from distaff.frontend.layers.fp8 import get_fp8_max as get_fp8_max
from distaff.frontend.layers.fp8 import in_q as in_q
from distaff.frontend.layers.fp8 import in_qdq as in_qdq
from distaff.frontend.layers.fp8 import out_dq as out_dq
from distaff.frontend.layers.fp8 import out_qdq as out_qdq
from distaff.frontend.layers.fp8 import qdq as qdq
from distaff.frontend.layers.fp8 import quantize as quantize
from distaff.frontend.layers.fp8 import quantize_dequantize_update as quantize_dequantize_update
from distaff.frontend.layers.fp8 import quantized_dot as quantized_dot
from distaff.frontend.layers.fp8 import update_fp8_meta as update_fp8_meta
from distaff.frontend.linen.class_transform import nowrap
from distaff.frontend.linen.dtypes import Array, Dtype
from distaff.frontend.linen.module import Module

OVERWRITE_WITH_GRADIENT = "_overwrite_with_gradient"


class Fp8DotGeneralBase(Module):
    """The variables of a product of an input and a kernel.

    In the collection ``_overwrite_with_gradient``, for each of ``input``, ``kernel`` and ``output_grad``: ``…_scale``
    [1] and ``…_amax_history`` [amax_history_length], float32.

    Args:
        amax_history_length: number of steps that a scale looks back.
        e4m3_dtype, e5m2_dtype: formats of inputs and kernels, and of the output's gradient.
    """

    amax_history_length: int = 1024
    e4m3_dtype: Dtype = jnp.float8_e4m3fn
    e5m2_dtype: Dtype = jnp.float8_e5m2

    def setup(self) -> None:
        """Declare the variables."""
        self.input_amax_history, self.input_scale = self._declare("input")
        self.kernel_amax_history, self.kernel_scale = self._declare("kernel")
        self.output_grad_amax_history, self.output_grad_scale = self._declare("output_grad")

    @nowrap
    def _declare(self, operand: str) -> tuple[Variable[Array], Variable[Array]]:
        col, length = OVERWRITE_WITH_GRADIENT, (self.amax_history_length,)
        history = self.variable(col, f"{operand}_amax_history", jnp.zeros, length, jnp.float32)
        return history, self.variable(col, f"{operand}_scale", jnp.ones, (1,), jnp.float32)

    @nowrap
    def _scaled_dot_general(self, compute_dtype: Dtype) -> Any:
        """``fp8_scaled_dot_general`` with these variables."""
        return functools.partial(
            fp8_scaled_dot_general,
            lhs_scale=self.input_scale.value,
            rhs_scale=self.kernel_scale.value,
            grad_scale=self.output_grad_scale.value,
            lhs_amax_history=self.input_amax_history.value,
            rhs_amax_history=self.kernel_amax_history.value,
            grad_amax_history=self.output_grad_amax_history.value,
            quantize_compute_type=compute_dtype,
        )


class Fp8DotGeneralOp(Fp8DotGeneralBase):
    """A product of operands that are rounded to 8 bits and back, which a compiler may turn into one in 8 bits.

    Deprecated: ``Fp8DirectDotGeneralOp`` and ``Fp8Einsum`` leave that to no compiler.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self) is Fp8DotGeneralOp:
            warnings.warn(
                "Fp8DotGeneralOp is deprecated; use Fp8DirectDotGeneralOp or Fp8Einsum.",
                DeprecationWarning,
                stacklevel=3,
            )

    def __call__(self, x: Array, k: Array, dimension_numbers: DimensionNumbers, **kwargs: Any) -> Array:
        """As ``jax.lax.dot_general`` of the input ``x`` and the kernel ``k``, in the kernel's dtype.

        Keyword arguments, such as ``precision``, are ignored.
        """
        dtype = k.dtype
        x = in_qdq(dtype, self.e4m3_dtype, x.astype(dtype), self.input_scale.value, self.input_amax_history.value)
        k = in_qdq(dtype, self.e4m3_dtype, k, self.kernel_scale.value, self.kernel_amax_history.value)
        y = dot_general_with_precision(x, k, dimension_numbers)
        return out_qdq(dtype, self.e5m2_dtype, y, self.output_grad_scale.value, self.output_grad_amax_history.value)


class NANOOFp8DotGeneralOp(Fp8DotGeneralOp):
    """``Fp8DotGeneralOp`` in the formats of AMD's MI300, which have one NaN and no infinities."""

    e4m3_dtype: Dtype = jnp.float8_e4m3fnuz
    e5m2_dtype: Dtype = jnp.float8_e5m2fnuz


class Fp8DirectDotGeneralOp(Fp8DotGeneralBase):
    """A product in 8 bits, forwards and backwards. The formats are e4m3fn and e5m2, whatever the fields say."""

    def __call__(self, x: Array, k: Array, dimension_numbers: DimensionNumbers, **kwargs: Any) -> Array:
        """As ``jax.lax.dot_general`` of the input ``x`` and the kernel ``k``, in the kernel's dtype.

        Keyword arguments, such as ``precision``, are ignored.
        """
        dtype = k.dtype
        return self._scaled_dot_general(dtype)(  # type: ignore[no-any-return]
            jnp.asarray(x, dtype), k, dimension_numbers, preferred_element_type=dtype
        )


class Fp8Einsum(Fp8DotGeneralBase):
    """An ``einsum`` of two operands in 8 bits, forwards and backwards."""

    def __call__(
        self,
        eqn: str,
        lhs: Array,
        rhs: Array,
        precision: Any = None,
        preferred_element_type: Dtype | None = None,
    ) -> Array:
        """As ``jnp.einsum`` of the input ``lhs`` and the kernel ``rhs``, in the kernel's dtype."""
        return jnp.einsum(
            eqn,
            lhs.astype(rhs.dtype),
            rhs,
            precision=precision,
            preferred_element_type=preferred_element_type,
            _dot_general=self._scaled_dot_general(rhs.dtype),
        )


Fp8DotGeneral = Fp8DirectDotGeneralOp
