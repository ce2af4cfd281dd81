"""Cells of recurrent networks: one step, ``carry, output = cell(carry, inputs)``.

Inputs are [batch..., features] (``ConvLSTMCell``: [batch..., spatial..., channels]); the carry is an array, or a pair
of arrays, that ``initialize_carry`` makes. They share these fields:

* ``features``: size of the output and of the arrays of the carry.
* ``gate_fn``, ``activation_fn``: of the gates, and of the output and the update.
* ``kernel_init``, ``recurrent_kernel_init``, ``bias_init``: initialisers of the kernels for the input and for the
  carry, and of the biases.
* ``dtype``, ``param_dtype``: as for ``Dense``.
* ``carry_init``: initialiser of the carry, which has ``param_dtype``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp

from distaff.frontend.layers.convolution import Padding
from distaff.frontend.layers.fields import Initializer
from distaff.frontend.layers.recurrent import gru_step, lstm_step
from distaff.frontend.linen import initializers
from distaff.frontend.linen.activation import sigmoid, tanh
from distaff.frontend.linen.class_transform import compact, nowrap
from distaff.frontend.linen.convolution import Conv
from distaff.frontend.linen.dtypes import Array, Dtype, promote_dtype
from distaff.frontend.linen.initializers import default_kernel_init
from distaff.frontend.linen.linear import Dense
from distaff.frontend.linen.module import Module

Carry: TypeAlias = Any
Pair: TypeAlias = tuple[Array, Array]


class RNNCellBase(Module):
    """Base of cells; what ``RNN`` needs to know of one."""

    @nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> Carry:
        """The carry before the first step, for inputs of this shape, the batch axes included."""
        raise NotImplementedError(f"{type(self).__name__} must define initialize_carry.")

    @property
    def num_feature_axes(self) -> int:
        """How many of the input's last axes are not batch axes."""
        raise NotImplementedError(f"{type(self).__name__} must define num_feature_axes.")


class _VectorCell(RNNCellBase):
    """A cell with vectors as inputs and one vector as carry."""

    if TYPE_CHECKING:
        features: int
        dtype: Dtype | None
        param_dtype: Dtype
        kernel_init: Initializer
        recurrent_kernel_init: Initializer
        carry_init: Initializer

    @nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> Carry:
        """The carry [batch..., features] before the first step."""
        return self.carry_init(rng, (*input_shape[:-1], self.features), self.param_dtype)

    @property
    def num_feature_axes(self) -> int:
        """One: the features."""
        return 1

    @nowrap
    def _layers(self, hidden: Array) -> tuple[Callable[..., Dense], Callable[..., Dense]]:
        """Makers of the layers for the input and for the carry ``hidden``, without biases unless they are told."""
        of_cell = {"dtype": self.dtype, "param_dtype": self.param_dtype, "use_bias": False}
        make = functools.partial(Dense, hidden.shape[-1], **of_cell)
        return (
            functools.partial(make, kernel_init=self.kernel_init),
            functools.partial(make, kernel_init=self.recurrent_kernel_init),
        )


class SimpleCell(_VectorCell):
    """``h' = activation(W_i x + b_i + W_h h)``, plus ``h`` inside the activation with ``residual``.

    Submodules: ``i`` and ``h``.
    """

    features: int
    activation_fn: Callable[..., Any] = tanh
    kernel_init: Initializer = default_kernel_init
    recurrent_kernel_init: Initializer = initializers.orthogonal()
    bias_init: Initializer = initializers.zeros
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    carry_init: Initializer = initializers.zeros
    residual: bool = False

    @compact
    def __call__(self, carry: Array, inputs: Array) -> Pair:
        """One step: the new carry, twice."""
        of_input, of_carry = self._layers(carry)
        hidden = of_input(name="i", use_bias=True, bias_init=self.bias_init)(inputs) + of_carry(name="h")(carry)
        if self.residual:
            hidden += carry
        hidden = self.activation_fn(hidden)
        return hidden, hidden


class _GatedCell(_VectorCell):
    """What gated cells are configured with."""

    features: int
    gate_fn: Callable[..., Any] = sigmoid
    activation_fn: Callable[..., Any] = tanh
    kernel_init: Initializer = default_kernel_init
    recurrent_kernel_init: Initializer = initializers.orthogonal()
    bias_init: Initializer = initializers.zeros
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    carry_init: Initializer = initializers.zeros


class GRUCell(_GatedCell):
    """Gated recurrent unit (https://arxiv.org/abs/1406.1078).

    ``r, z = gate(W_i x + b_i + W_h h)``, ``n = activation(W_in x + b_in + r (W_hn h + b_hn))`` and
    ``h' = (1 - z) n + z h``. Submodules: ``ir``, ``iz``, ``in``, ``hr``, ``hz`` and ``hn``.
    """

    @compact
    def __call__(self, carry: Array, inputs: Array) -> Pair:
        """One step: the new carry, twice."""
        of_input, of_carry = self._layers(carry)
        biased: dict[str, Any] = {"use_bias": True, "bias_init": self.bias_init}
        x = tuple(of_input(name=f"i{gate}", **biased)(inputs) for gate in "rzn")
        h = tuple(of_carry(name=f"h{gate}", **(biased if gate == "n" else {}))(carry) for gate in "rzn")
        hidden = gru_step(x, h, carry, self.gate_fn, self.activation_fn)
        return hidden, hidden


class MGUCell(_VectorCell):
    """Minimal gated unit (https://arxiv.org/abs/1603.09420).

    ``f = gate(W_if x + b_if + W_hf h)``, ``n = activation(W_in x + b_in + f (W_hn h + b_hn))`` and
    ``h' = (1 - f) n + f h``; without ``reset_gate``, ``n = activation(W_in x + b_in + W_hn h)``. Submodules: ``if``,
    ``in``, ``hf`` and ``hn``.

    Args:
        forget_bias_init: initialiser of ``b_if``; ones, so that cells remember at first.
        activation_bias_init: initialiser of ``b_in`` and ``b_hn``.
        others: see the module.
    """

    features: int
    gate_fn: Callable[..., Any] = sigmoid
    activation_fn: Callable[..., Any] = tanh
    kernel_init: Initializer = default_kernel_init
    recurrent_kernel_init: Initializer = initializers.orthogonal()
    forget_bias_init: Initializer = initializers.ones
    activation_bias_init: Initializer = initializers.zeros
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    carry_init: Initializer = initializers.zeros
    reset_gate: bool = True

    @compact
    def __call__(self, carry: Array, inputs: Array) -> Pair:
        """One step: the new carry, twice."""
        of_input, of_carry = self._layers(carry)
        forget = of_input(name="if", use_bias=True, bias_init=self.forget_bias_init)(inputs)
        f = self.gate_fn(forget + of_carry(name="hf")(carry))
        recurrent = of_carry(name="hn", use_bias=self.reset_gate, bias_init=self.activation_bias_init)(carry)
        if self.reset_gate:
            recurrent *= f
        update = of_input(name="in", use_bias=True, bias_init=self.activation_bias_init)(inputs)
        hidden = (1.0 - f) * self.activation_fn(update + recurrent) + f * carry
        return hidden, hidden


class LSTMCell(_GatedCell):
    """Long short-term memory (https://www.bioinf.jku.at/publications/older/2604.pdf).

    ``i, f, o = gate(W_i x + W_h h + b_h)``, ``g = activation(W_ig x + W_hg h + b_hg)``, ``c' = f c + i g`` and
    ``h' = o activation(c')``. The carry is ``(c, h)``. Submodules: ``ii``, ``if``, ``ig``, ``io``, ``hi``, ``hf``,
    ``hg`` and ``ho``.
    """

    @compact
    def __call__(self, carry: Pair, inputs: Array) -> tuple[Pair, Array]:
        """One step: the new carry, and its ``h``."""
        c, h = carry
        i, f, g, o = self._sums(h, inputs)
        c, h = lstm_step(i, f, g, o, c, self.gate_fn, self.activation_fn)
        return (c, h), h

    @nowrap
    def _sums(self, h: Array, inputs: Array) -> Sequence[Array]:
        """What the gates ``i``, ``f``, ``g`` and ``o`` are functions of."""
        of_input, of_carry = self._layers(h)
        return [
            of_input(name=f"i{gate}")(inputs) + of_carry(name=f"h{gate}", use_bias=True, bias_init=self.bias_init)(h)
            for gate in "ifgo"
        ]

    @nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> Pair:
        """The carry (c, h), each [batch..., features], before the first step."""
        return _pair(self.carry_init, rng, (*input_shape[:-1], self.features), self.param_dtype)


def _pair(init: Initializer, rng: jax.Array, shape: tuple[int, ...], dtype: Dtype) -> Pair:
    first, second = jax.random.split(rng)
    return init(first, shape, dtype), init(second, shape, dtype)


class OptimizedLSTMCell(LSTMCell):
    """``LSTMCell``, with the same parameters, as two products instead of eight."""

    @nowrap
    def _sums(self, h: Array, inputs: Array) -> Sequence[Array]:
        of_input = [
            _DenseParams(h.shape[-1], False, self.param_dtype, self.kernel_init, name=f"i{gate}")(inputs)
            for gate in "ifgo"
        ]
        of_carry = [
            _DenseParams(
                h.shape[-1], True, self.param_dtype, self.recurrent_kernel_init, self.bias_init, name=f"h{gate}"
            )(h)
            for gate in "ifgo"
        ]
        return jnp.split(self._product(inputs, of_input) + self._product(h, of_carry), 4, axis=-1)

    @nowrap
    def _product(self, x: Array, params: Sequence[tuple[Array, Array | None]]) -> Array:
        """The outputs of four dense layers, one after the other."""
        kernel = jnp.concatenate([kernel for kernel, _ in params], axis=-1)
        biases = [bias for _, bias in params if bias is not None]
        bias = jnp.concatenate(biases) if biases else None
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = jnp.dot(x, kernel)
        return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


class _DenseParams(Module):
    """The parameters of a ``Dense``, without its product."""

    features: int
    use_bias: bool
    param_dtype: Dtype
    kernel_init: Initializer
    bias_init: Initializer = initializers.zeros

    @compact
    def __call__(self, inputs: Array) -> tuple[Array, Array | None]:
        """The kernel and the bias for ``inputs`` [..., inputs]."""
        kernel = self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        return kernel, bias


class ConvLSTMCell(RNNCellBase):
    """An LSTM with convolutions for products (https://arxiv.org/abs/1506.04214), and 1 added to the forget gate.

    Inputs are [batch..., spatial..., channels], the carry two arrays [batch..., spatial..., features]. Submodules:
    ``ih`` and ``hh``, convolutions to the four gates.

    Args:
        kernel_size, strides, padding, use_bias: as for ``Conv``.
        others: see the module.
    """

    features: int
    kernel_size: Sequence[int]
    strides: Sequence[int] | None = None
    padding: Padding = "SAME"
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    carry_init: Initializer = initializers.zeros

    @compact
    def __call__(self, carry: Pair, inputs: Array) -> tuple[Pair, Array]:
        """One step: the new carry, and its second array."""
        c, h = carry
        make = functools.partial(
            Conv,
            4 * self.features,
            self.kernel_size,
            strides=self.strides,
            padding=self.padding,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        i, g, f, o = jnp.split(make(name="ih")(inputs) + make(name="hh")(h), 4, axis=-1)
        c, h = lstm_step(i, f + 1, g, o, c, sigmoid, jnp.tanh)
        return (c, h), h

    @nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> Pair:
        """The carry before the first step."""
        return _pair(self.carry_init, rng, (*input_shape[:-1], self.features), self.param_dtype)

    @property
    def num_feature_axes(self) -> int:
        """The spatial axes and the channels."""
        return len(self.kernel_size) + 1
