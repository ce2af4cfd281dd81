"""Recurrent networks over sequences: ``RNN`` and ``Bidirectional``; and the names of the cells.

Sequences are [batch..., time, features...], or [time, batch..., features...] with ``time_major``. ``seq_lengths``
[batch...] tells how many elements of each sequence count; those after are padding, which stays at the end when a
sequence is reversed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax

from distaff.frontend.core import FrozenDict
from distaff.frontend.core.filters import CollectionFilter
from distaff.frontend.layers.recurrent import at_last, concatenate
from distaff.frontend.layers.recurrent import flip_sequences as flip_sequences
from distaff.frontend.linen import transforms
from distaff.frontend.linen.dtypes import Array
from distaff.frontend.linen.module import Module
from distaff.frontend.linen.recurrent_cells import Carry as Carry
from distaff.frontend.linen.recurrent_cells import ConvLSTMCell as ConvLSTMCell
from distaff.frontend.linen.recurrent_cells import GRUCell as GRUCell
from distaff.frontend.linen.recurrent_cells import LSTMCell as LSTMCell
from distaff.frontend.linen.recurrent_cells import MGUCell as MGUCell
from distaff.frontend.linen.recurrent_cells import OptimizedLSTMCell as OptimizedLSTMCell
from distaff.frontend.linen.recurrent_cells import RNNCellBase as RNNCellBase
from distaff.frontend.linen.recurrent_cells import SimpleCell as SimpleCell


class RNN(Module):
    """A cell, applied to one element of a sequence after the other by ``nn.scan``.

    Args:
        cell: the cell, the submodule ``cell``.
        time_major: time is the first axis of inputs and outputs.
        return_carry: return the carry after the last element (of ``seq_lengths``) too.
        reverse: go from the last element to the first, and return the outputs in that order.
        keep_order: with ``reverse``, return the outputs in the order of the inputs.
        unroll, variable_axes, variable_broadcast, variable_carry, split_rngs: as for ``nn.scan``. By default all steps
            share the parameters, and the random streams are not passed on: a cell that draws needs, for example,
            ``split_rngs={"params": False, "dropout": True}``.
    """

    cell: RNNCellBase
    time_major: bool = False
    return_carry: bool = False
    reverse: bool = False
    keep_order: bool = False
    unroll: int = 1
    variable_axes: Mapping[CollectionFilter, Any] = FrozenDict()
    variable_broadcast: CollectionFilter = "params"
    variable_carry: CollectionFilter = False
    split_rngs: Mapping[CollectionFilter, bool] = FrozenDict({"params": False})

    def __call__(
        self,
        inputs: Any,
        *,
        initial_carry: Carry | None = None,
        init_key: jax.Array | None = None,
        seq_lengths: Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
    ) -> Any:
        """The outputs for a sequence, or with ``return_carry`` the last carry and the outputs.

        Args:
            inputs: [batch..., time, features...].
            initial_carry: by default made by the cell's ``initialize_carry``, with ``init_key`` or a constant key.
            seq_lengths: [batch...].
            return_carry, time_major, reverse, keep_order: go before the fields of these names.
        """
        return_carry = self.return_carry if return_carry is None else return_carry
        time_major = self.time_major if time_major is None else time_major
        reverse = self.reverse if reverse is None else reverse
        keep_order = self.keep_order if keep_order is None else keep_order

        batch_axes = inputs.ndim - self.cell.num_feature_axes - 1
        time_axis = 0 if time_major else batch_axes

        def flipped(sequences: Any) -> Any:
            return jax.tree.map(lambda x: flip_sequences(x, seq_lengths, batch_axes, time_major), sequences)

        if reverse:
            inputs = flipped(inputs)
        if initial_carry is None:
            step_shape = inputs.shape[:time_axis] + inputs.shape[time_axis + 1 :]
            initial_carry = self.cell.initialize_carry(jax.random.key(0) if init_key is None else init_key, step_shape)
        carry, outputs = self._scan(initial_carry, inputs, time_axis, seq_lengths if return_carry else None)
        if reverse and keep_order:
            outputs = flipped(outputs)
        return (carry, outputs) if return_carry else outputs

    def _scan(self, carry: Carry, inputs: Array, time_axis: int, seq_lengths: Array | None) -> tuple[Carry, Any]:
        """The carry after the last element, or with ``seq_lengths`` after each sequence's own, and the outputs."""

        def step(cell: Any, carry: Carry, x: Array) -> Any:
            carry, y = cell(carry, x)
            # To keep all carries and pick from them is faster than to choose in each step.
            return carry, y if seq_lengths is None else (carry, y)

        scan = transforms.scan(
            step,
            in_axes=time_axis,
            out_axes=time_axis if seq_lengths is None else (0, time_axis),
            unroll=self.unroll,
            variable_axes=self.variable_axes,
            variable_broadcast=self.variable_broadcast,
            variable_carry=self.variable_carry,
            split_rngs=self.split_rngs,
        )
        carry, outputs = scan(self.cell, carry, inputs)
        if seq_lengths is None:
            return carry, outputs
        carries, outputs = outputs
        return jax.tree.map(lambda x: at_last(x, seq_lengths), carries), outputs


class Bidirectional(Module):
    """Two networks over one sequence, the second from its end to its start, with their outputs merged.

    Args:
        forward_rnn, backward_rnn: ``RNN`` or modules that are called as it is; the submodules of these names. One
            object given as both shares its parameters, with a warning.
        merge_fn: joins two arrays of outputs; by default along the last axis.
        time_major, return_carry: as for ``RNN``; the carry is the pair of both.
    """

    forward_rnn: Any
    backward_rnn: Any
    merge_fn: Callable[[Array, Array], Array] = concatenate
    time_major: bool = False
    return_carry: bool = False

    def __call__(
        self,
        inputs: Any,
        *,
        initial_carry: tuple[Carry, Carry] | None = None,
        init_key: jax.Array | None = None,
        seq_lengths: Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
    ) -> Any:
        """As ``RNN``; ``reverse`` and ``keep_order`` are there for the signature, and ignored."""
        return_carry = self.return_carry if return_carry is None else return_carry
        forward_carry, backward_carry = (None, None) if initial_carry is None else initial_carry
        forward_key, backward_key = (None, None) if init_key is None else jax.random.split(init_key)
        if self.forward_rnn is self.backward_rnn:
            warnings.warn("forward_rnn and backward_rnn are one object and share their parameters.", stacklevel=2)
        options: dict[str, Any] = {
            "seq_lengths": seq_lengths,
            "return_carry": True,
            "time_major": self.time_major if time_major is None else time_major,
        }
        forward_carry, forward = self.forward_rnn(
            inputs, initial_carry=forward_carry, init_key=forward_key, reverse=False, **options
        )
        backward_carry, backward = self.backward_rnn(
            inputs, initial_carry=backward_carry, init_key=backward_key, reverse=True, keep_order=True, **options
        )
        outputs = jax.tree.map(self.merge_fn, forward, backward)
        return ((forward_carry, backward_carry), outputs) if return_carry else outputs
