"""Activation functions: those of ``jax.nn``; and ``PReLU``, which learns one."""

from __future__ import annotations

import jax.numpy as jnp

from distaff.frontend.layers.activations import *  # noqa: F403
from distaff.frontend.layers.activations import prelu
from distaff.frontend.layers.fields import PromoteDtype
from distaff.frontend.nnx.module import Module
from distaff.frontend.nnx.nn.dtypes import Array, Dtype, promote_dtype
from distaff.frontend.nnx.nn.fields import NO_METADATA, Metadata
from distaff.frontend.nnx.variable_kinds import Param


class PReLU(Module):
    """``x`` where it is positive, and a learned multiple of it elsewhere (https://arxiv.org/abs/1502.01852).

    Attributes:
        negative_slope: ``Param``, a scalar.
    """

    def __init__(
        self,
        negative_slope_init: float = 0.01,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        promote_dtype: PromoteDtype = promote_dtype,
        negative_slope_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Make the slope.

        Args:
            negative_slope_init: its initial value.
            dtype: to compute in; by default that of the input.
            param_dtype, negative_slope_metadata: dtype and metadata of the slope.
            promote_dtype: brings a tuple of input and slope to ``dtype``.
        """
        self.negative_slope = Param(jnp.asarray(negative_slope_init, param_dtype), **negative_slope_metadata)
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.promote_dtype = promote_dtype

    def __call__(self, inputs: Array) -> Array:
        """Apply the function to each element of ``inputs``."""
        slope = self.negative_slope[...]
        if self.dtype is None:
            return prelu(inputs, slope.astype(inputs.dtype))
        return prelu(*self.promote_dtype((inputs, slope), dtype=self.dtype))
