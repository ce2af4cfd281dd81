"""Activation functions: those of ``jax.nn``, under the names that Linen code uses; and ``PReLU``, which learns one."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from distaff.frontend.layers.activations import *  # noqa: F403
from distaff.frontend.layers.activations import prelu, standardize
from distaff.frontend.linen.class_transform import compact
from distaff.frontend.linen.dtypes import Array, Dtype
from distaff.frontend.linen.module import Module

normalize: Callable[..., jax.Array] = standardize


class PReLU(Module):
    """``x`` where it is positive, and a learned multiple of it elsewhere (https://arxiv.org/abs/1502.01852).

    Parameters: ``negative_slope``, a scalar.

    Args:
        param_dtype: dtype of the slope.
        negative_slope_init: its initial value.
    """

    param_dtype: Dtype = jnp.float32
    negative_slope_init: float = 0.01

    @compact
    def __call__(self, inputs: Array) -> Array:
        """Apply the function to each element of ``inputs``; the dtype stays."""
        slope = self.param("negative_slope", lambda key: jnp.asarray(self.negative_slope_init, self.param_dtype))
        return prelu(inputs, slope.astype(inputs.dtype))
