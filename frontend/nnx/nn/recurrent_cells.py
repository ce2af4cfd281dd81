"""Cells of recurrent networks: one step, ``carry, output = cell(carry, inputs)``.

Inputs are [batch..., in_features]; the carry is an array [batch..., hidden_features], or a pair of them, that
``initialize_carry`` makes. They share these arguments of constructors:

* ``gate_fn``, ``activation_fn``: of the gates, and of the output and the update.
* ``kernel_init``, ``recurrent_kernel_init``, ``bias_init``: initialisers of the kernels for the input and for the
  carry, and of the biases; ``kernel_metadata``, ``recurrent_kernel_metadata``, ``bias_metadata``: their metadata.
* ``dtype``, ``param_dtype``, ``promote_dtype``, ``rngs``: as for ``Linear``.
* ``carry_init``, ``keep_rngs``: deprecated; give ``carry_init`` and ``rngs`` to ``initialize_carry``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import jax.numpy as jnp

from distaff.frontend.layers.fields import Initializer, PromoteDtype
from distaff.frontend.layers.initializers import default_kernel_init as default_kernel_init
from distaff.frontend.layers.initializers import orthogonal, zeros
from distaff.frontend.layers.recurrent import gru_step, lstm_step
from distaff.frontend.nnx.module import Module
from distaff.frontend.nnx.nn.activations import sigmoid, tanh
from distaff.frontend.nnx.nn.dtypes import Array, Dtype, promote_dtype
from distaff.frontend.nnx.nn.fields import NO_METADATA, Metadata
from distaff.frontend.nnx.nn.linear import Linear
from distaff.frontend.nnx.pytrees import data
from distaff.frontend.nnx.rngs import Rngs, RngStream

Carry: TypeAlias = Any
Output: TypeAlias = Any
Pair: TypeAlias = tuple[Array, Array]

default_bias_init = zeros


def modified_orthogonal(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
    """An orthogonal matrix, computed in float32 whatever the dtype."""
    return orthogonal()(key, shape).astype(dtype)


class RNNCellBase(Module):
    """Base of cells; what ``RNN`` needs to know of one."""

    def initialize_carry(
        self,
        input_shape: tuple[int, ...],
        rngs: Rngs | RngStream | None = None,
        carry_init: Initializer | None = None,
    ) -> Carry:
        """The carry before the first step, for inputs of this shape, the batch axes included."""
        raise NotImplementedError(f"{type(self).__name__} must define initialize_carry.")

    def __call__(self, carry: Carry, inputs: Array) -> tuple[Carry, Array]:
        """One step: the new carry and the output."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__.")

    @property
    def num_feature_axes(self) -> int:
        """How many of the input's last axes are not batch axes."""
        raise NotImplementedError(f"{type(self).__name__} must define num_feature_axes.")


class _VectorCell(RNNCellBase):
    """A cell with vectors as inputs and in the carry."""

    hidden_features: int
    param_dtype: Dtype
    carry_init: Initializer | None
    _arrays_in_carry = 1

    def _set_common(
        self,
        in_features: int,
        hidden_features: int,
        dtype: Dtype | None,
        param_dtype: Dtype,
        promote_dtype: PromoteDtype,
        rngs: Rngs,
    ) -> dict[str, Any]:
        """Set the attributes that all cells have, and return the arguments that all their layers take."""
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.promote_dtype = promote_dtype
        return {"dtype": dtype, "param_dtype": param_dtype, "promote_dtype": promote_dtype, "rngs": rngs}

    def _deprecated(self, carry_init: Initializer | None, keep_rngs: bool, rngs: Rngs) -> None:
        self.rngs: Any = data(None)
        if keep_rngs:
            warnings.warn(
                "keep_rngs argument is deprecated. Please use rngs argument in __call__ instead.", stacklevel=3
            )
            self.rngs = rngs.carry.fork()
        if carry_init is not None:
            warnings.warn(
                "carry_init is provided in __init__. Give it to initialize_carry instead: two cells with different "
                "carry_init functions have different graphdefs.",
                stacklevel=3,
            )
        self.carry_init = carry_init

    def initialize_carry(
        self,
        input_shape: tuple[int, ...],
        rngs: Rngs | RngStream | None = None,
        carry_init: Initializer | None = None,
    ) -> Carry:
        """The carry before the first step.

        Args:
            input_shape: [batch..., in_features].
            rngs: the stream, or the streams among which is ``carry``, to draw keys from.
            carry_init: initialiser of each array, by default zeros.

        Raises:
            ValueError: there are no ``rngs``.
        """
        stream = self.rngs if rngs is None else rngs.carry if isinstance(rngs, Rngs) else rngs
        if stream is None:
            raise ValueError("RNGs must be provided to initialize the cell carry.")
        init = carry_init or self.carry_init or zeros
        shape = (*input_shape[:-1], self.hidden_features)
        arrays = tuple(init(stream(), shape, self.param_dtype) for _ in range(self._arrays_in_carry))
        return arrays if len(arrays) > 1 else arrays[0]

    @property
    def num_feature_axes(self) -> int:
        """One: the features."""
        return 1


class _LSTM(_VectorCell):
    """What is common to both LSTMs, which differ in the shapes of their parameters."""

    gate_fn: Callable[..., Any]
    activation_fn: Callable[..., Any]
    _arrays_in_carry = 2

    def _sums(self, h: Array, inputs: Array) -> list[Array]:
        """What the gates ``i``, ``f``, ``g`` and ``o`` are functions of."""
        raise NotImplementedError

    def __call__(self, carry: Pair, inputs: Array) -> tuple[Pair, Array]:
        """One step: the new carry, and its ``h``."""
        c, h = carry
        i, f, g, o = self._sums(h, inputs)
        c, h = lstm_step(i, f, g, o, c, self.gate_fn, self.activation_fn)
        return (c, h), h


class LSTMCell(_LSTM):
    """Long short-term memory (https://www.bioinf.jku.at/publications/older/2604.pdf).

    ``i, f, o = gate(W_i x + W_h h + b_h)``, ``g = activation(W_ig x + W_hg h + b_hg)``, ``c' = f c + i g`` and
    ``h' = o activation(c')``. The carry is ``(c, h)``.

    Attributes:
        ii, if_, ig, io: ``Linear`` of the input, without bias.
        hi, hf, hg, ho: ``Linear`` of ``h``.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        gate_fn: Callable[..., Any] = sigmoid,
        activation_fn: Callable[..., Any] = tanh,
        kernel_init: Initializer = default_kernel_init,
        recurrent_kernel_init: Initializer = modified_orthogonal,
        bias_init: Initializer = zeros,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        carry_init: Initializer | None = None,
        promote_dtype: PromoteDtype = promote_dtype,
        keep_rngs: bool = False,
        rngs: Rngs,
        kernel_metadata: Metadata = NO_METADATA,
        recurrent_kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Make the parameters."""
        self.gate_fn = gate_fn
        self.activation_fn = activation_fn
        self._deprecated(carry_init, keep_rngs, rngs)
        of_all = self._set_common(in_features, hidden_features, dtype, param_dtype, promote_dtype, rngs)
        of_input = {"use_bias": False, "kernel_init": kernel_init, "kernel_metadata": kernel_metadata, **of_all}
        of_carry = {
            "kernel_init": recurrent_kernel_init,
            "bias_init": bias_init,
            "kernel_metadata": recurrent_kernel_metadata,
            "bias_metadata": bias_metadata,
            **of_all,
        }
        self.ii = Linear(in_features, hidden_features, **of_input)
        self.if_ = Linear(in_features, hidden_features, **of_input)
        self.ig = Linear(in_features, hidden_features, **of_input)
        self.io = Linear(in_features, hidden_features, **of_input)
        self.hi = Linear(hidden_features, hidden_features, **of_carry)
        self.hf = Linear(hidden_features, hidden_features, **of_carry)
        self.hg = Linear(hidden_features, hidden_features, **of_carry)
        self.ho = Linear(hidden_features, hidden_features, **of_carry)

    def _sums(self, h: Array, inputs: Array) -> list[Array]:
        pairs = (self.ii, self.hi), (self.if_, self.hf), (self.ig, self.hg), (self.io, self.ho)
        return [of_input(inputs) + of_carry(h) for of_input, of_carry in pairs]


class OptimizedLSTMCell(_LSTM):
    """``LSTMCell`` as two products instead of eight.

    Attributes:
        dense_i, dense_h: ``Linear`` of the input, without bias, and of ``h``, to all four gates.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        gate_fn: Callable[..., Any] = sigmoid,
        activation_fn: Callable[..., Any] = tanh,
        kernel_init: Initializer = default_kernel_init,
        recurrent_kernel_init: Initializer = orthogonal(),  # noqa: B008
        bias_init: Initializer = zeros,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        carry_init: Initializer | None = None,
        promote_dtype: PromoteDtype = promote_dtype,
        keep_rngs: bool = False,
        rngs: Rngs,
        kernel_metadata: Metadata = NO_METADATA,
        recurrent_kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Make the parameters."""
        self.gate_fn = gate_fn
        self.activation_fn = activation_fn
        self._deprecated(carry_init, keep_rngs, rngs)
        of_all = self._set_common(in_features, hidden_features, dtype, param_dtype, promote_dtype, rngs)
        self.dense_i = Linear(
            in_features,
            4 * hidden_features,
            use_bias=False,
            kernel_init=kernel_init,
            kernel_metadata=kernel_metadata,
            **of_all,
        )
        self.dense_h = Linear(
            hidden_features,
            4 * hidden_features,
            kernel_init=recurrent_kernel_init,
            bias_init=bias_init,
            kernel_metadata=recurrent_kernel_metadata,
            bias_metadata=bias_metadata,
            **of_all,
        )

    def _sums(self, h: Array, inputs: Array) -> list[Array]:
        return jnp.split(self.dense_i(inputs) + self.dense_h(h), 4, axis=-1)


class SimpleCell(_VectorCell):
    """``h' = activation(W_i x + b_i + W_h h)``, plus ``h`` inside the activation with ``residual``.

    Attributes:
        dense_i, dense_h: ``Linear`` of the input, and of ``h``, without bias.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        carry_init: Initializer | None = None,
        residual: bool = False,
        activation_fn: Callable[..., Any] = tanh,
        kernel_init: Initializer = default_kernel_init,
        recurrent_kernel_init: Initializer = orthogonal(),  # noqa: B008
        bias_init: Initializer = zeros,
        promote_dtype: PromoteDtype = promote_dtype,
        keep_rngs: bool = False,
        rngs: Rngs,
        kernel_metadata: Metadata = NO_METADATA,
        recurrent_kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Make the parameters."""
        self.residual = residual
        self.activation_fn = activation_fn
        self._deprecated(carry_init, keep_rngs, rngs)
        of_all = self._set_common(in_features, hidden_features, dtype, param_dtype, promote_dtype, rngs)
        self.dense_h = Linear(
            hidden_features,
            hidden_features,
            use_bias=False,
            kernel_init=recurrent_kernel_init,
            kernel_metadata=recurrent_kernel_metadata,
            **of_all,
        )
        self.dense_i = Linear(
            in_features,
            hidden_features,
            kernel_init=kernel_init,
            bias_init=bias_init,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
            **of_all,
        )

    def __call__(self, carry: Array, inputs: Array) -> Pair:
        """One step: the new carry, twice."""
        hidden = self.dense_i(inputs) + self.dense_h(carry)
        hidden = self.activation_fn(hidden + carry if self.residual else hidden)
        return hidden, hidden


class GRUCell(_VectorCell):
    """Gated recurrent unit (https://arxiv.org/abs/1406.1078).

    ``r, z = gate(W_i x + b_i + W_h h)``, ``n = activation(W_in x + b_in + r (W_hn h))`` and ``h' = (1 - z) n + z h``.

    Attributes:
        dense_i, dense_h: ``Linear`` of the input, and of ``h``, without bias, to ``r``, ``z`` and ``n``.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        gate_fn: Callable[..., Any] = sigmoid,
        activation_fn: Callable[..., Any] = tanh,
        kernel_init: Initializer = default_kernel_init,
        recurrent_kernel_init: Initializer = orthogonal(),  # noqa: B008
        bias_init: Initializer = zeros,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        carry_init: Initializer | None = None,
        promote_dtype: PromoteDtype = promote_dtype,
        keep_rngs: bool = False,
        rngs: Rngs,
        kernel_metadata: Metadata = NO_METADATA,
        recurrent_kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ) -> None:
        """Make the parameters."""
        self.gate_fn = gate_fn
        self.activation_fn = activation_fn
        self._deprecated(carry_init, keep_rngs, rngs)
        of_all = self._set_common(in_features, hidden_features, dtype, param_dtype, promote_dtype, rngs)
        self.dense_i = Linear(
            in_features,
            3 * hidden_features,
            kernel_init=kernel_init,
            bias_init=bias_init,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
            **of_all,
        )
        self.dense_h = Linear(
            hidden_features,
            3 * hidden_features,
            use_bias=False,
            kernel_init=recurrent_kernel_init,
            kernel_metadata=recurrent_kernel_metadata,
            **of_all,
        )

    def __call__(self, carry: Array, inputs: Array) -> Pair:
        """One step: the new carry, twice."""
        of_input, of_carry = jnp.split(self.dense_i(inputs), 3, axis=-1), jnp.split(self.dense_h(carry), 3, axis=-1)
        hidden = gru_step(of_input, of_carry, carry, self.gate_fn, self.activation_fn)
        return hidden, hidden
