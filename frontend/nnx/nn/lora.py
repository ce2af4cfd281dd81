"""Low-rank adapters (https://arxiv.org/abs/2106.09685): ``LoRA`` and ``LoRALinear``."""

from __future__ import annotations

from typing import Any, TypeVar

import jax.numpy as jnp

from distaff.frontend.layers.fields import Initializer, PromoteDtype
from distaff.frontend.layers.initializers import he_uniform, zeros
from distaff.frontend.nnx.module import Module
from distaff.frontend.nnx.nn.dtypes import Array, Dtype, promote_dtype
from distaff.frontend.nnx.nn.fields import NO_METADATA, Metadata
from distaff.frontend.nnx.nn.linear import Linear
from distaff.frontend.nnx.rngs import Rngs
from distaff.frontend.nnx.variable_kinds import Param
from distaff.frontend.nnx.variables import Variable

A = TypeVar("A")

default_a_initializer = he_uniform()
default_b_initializer = zeros


class LoRAParam(Param[A]):
    """A parameter of an adapter."""


class LoRA(Module):
    """``x @ lora_a @ lora_b``, plus what ``base_module`` gives for ``x``, if there is one.

    Attributes:
        lora_a: ``LoRAParam`` [in_features, lora_rank].
        lora_b: ``LoRAParam`` [lora_rank, out_features].
    """

    def __init__(
        self,
        in_features: int,
        lora_rank: int,
        out_features: int,
        *,
        base_module: Module | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        a_initializer: Initializer = default_a_initializer,
        b_initializer: Initializer = default_b_initializer,
        lora_param_type: type[Variable[Any]] = LoRAParam,
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: Rngs,
        a_metadata: Metadata = NO_METADATA,
        b_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Make the parameters.

        Args:
            in_features, lora_rank, out_features: sizes of the input, between both products, and of the output.
            base_module: the layer that is adapted; may be left out.
            dtype, param_dtype, promote_dtype, rngs: as for ``Linear``.
            a_initializer, b_initializer, a_metadata, b_metadata: of ``lora_a`` and ``lora_b``.
            lora_param_type: their type.
        """
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.lora_param_type = lora_param_type
        self.base_module = base_module
        self.promote_dtype = promote_dtype
        a, b = (in_features, lora_rank), (lora_rank, out_features)
        self.lora_a = lora_param_type(a_initializer(rngs.params(), a, param_dtype), **a_metadata)
        self.lora_b = lora_param_type(b_initializer(rngs.params(), b, param_dtype), **b_metadata)

    def __call__(self, x: Array, **kwargs: Any) -> Array:
        """Apply the layer to ``x`` [..., in_features]; ``kwargs`` go to ``base_module``.

        Raises:
            ValueError: ``base_module`` cannot be called.
        """
        arrays = (x, self.lora_a[...], self.lora_b[...])
        x, lora_a, lora_b = self.promote_dtype(arrays, dtype=self.dtype)
        out: Array = x @ lora_a @ lora_b
        if self.base_module is None:
            return out
        if not callable(self.base_module):
            raise ValueError(f"`base_module` must be callable, got {type(self.base_module).__name__}.")
        return out + self.base_module(x, **kwargs)  # type: ignore[no-any-return]


class LoRALinear(Linear):
    """``Linear`` with an adapter beside it, the attribute ``lora``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        lora_rank: int,
        lora_dtype: Dtype | None = None,
        lora_param_dtype: Dtype = jnp.float32,
        a_initializer: Initializer = default_a_initializer,
        b_initializer: Initializer = default_b_initializer,
        lora_param_type: type[Variable[Any]] = LoRAParam,
        lora_promote_dtype: PromoteDtype = promote_dtype,
        rngs: Rngs,
        a_metadata: Metadata = NO_METADATA,
        b_metadata: Metadata = NO_METADATA,
        **kwargs: Any,
    ) -> None:
        """Make the parameters; ``kwargs`` are those of ``Linear``, the others of ``LoRA``."""
        super().__init__(in_features, out_features, rngs=rngs, **kwargs)
        self.lora = LoRA(
            in_features,
            lora_rank,
            out_features,
            dtype=lora_dtype,
            param_dtype=lora_param_dtype,
            a_initializer=a_initializer,
            b_initializer=b_initializer,
            lora_param_type=lora_param_type,
            promote_dtype=lora_promote_dtype,
            rngs=rngs,
            a_metadata=a_metadata,
            b_metadata=b_metadata,
        )

    def __call__(self, x: Array, out_sharding: Any = None) -> Array:
        """Apply the layer to ``x`` [..., in_features]."""
        return super().__call__(x, out_sharding=out_sharding) + self.lora(x)
