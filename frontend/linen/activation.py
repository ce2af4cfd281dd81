"""Activation functions: those of ``jax.nn``, under the names that Linen code uses; and ``PReLU``, which learns one."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn import celu as celu
from jax.nn import elu as elu
from jax.nn import gelu as gelu
from jax.nn import glu as glu
from jax.nn import hard_sigmoid as hard_sigmoid
from jax.nn import hard_silu as hard_silu
from jax.nn import hard_swish as hard_swish
from jax.nn import hard_tanh as hard_tanh
from jax.nn import leaky_relu as leaky_relu
from jax.nn import log_sigmoid as log_sigmoid
from jax.nn import log_softmax as log_softmax
from jax.nn import logsumexp as logsumexp
from jax.nn import one_hot as one_hot
from jax.nn import relu as relu
from jax.nn import relu6 as relu6
from jax.nn import selu as selu
from jax.nn import sigmoid as sigmoid
from jax.nn import silu as silu
from jax.nn import soft_sign as soft_sign
from jax.nn import softmax as softmax
from jax.nn import softplus as softplus
from jax.nn import standardize as standardize
from jax.nn import swish as swish
from jax.numpy import tanh as tanh

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
        return jnp.where(inputs >= 0, inputs, slope.astype(inputs.dtype) * inputs)
