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

from distaff.frontend.layers.recurrent import at_last, concatenate
from distaff.frontend.layers.recurrent import flip_sequences as flip_sequences
from distaff.frontend.nnx.filters import All, Filter
from distaff.frontend.nnx.module import Module
from distaff.frontend.nnx.nn.dtypes import Array
from distaff.frontend.nnx.nn.recurrent_cells import Carry as Carry
from distaff.frontend.nnx.nn.recurrent_cells import GRUCell as GRUCell
from distaff.frontend.nnx.nn.recurrent_cells import LSTMCell as LSTMCell
from distaff.frontend.nnx.nn.recurrent_cells import OptimizedLSTMCell as OptimizedLSTMCell
from distaff.frontend.nnx.nn.recurrent_cells import Output as Output
from distaff.frontend.nnx.nn.recurrent_cells import RNNCellBase as RNNCellBase
from distaff.frontend.nnx.nn.recurrent_cells import SimpleCell as SimpleCell
from distaff.frontend.nnx.nn.recurrent_cells import default_bias_init as default_bias_init
from distaff.frontend.nnx.nn.recurrent_cells import default_kernel_init as default_kernel_init
from distaff.frontend.nnx.nn.recurrent_cells import modified_orthogonal as modified_orthogonal
from distaff.frontend.nnx.pytrees import data
from distaff.frontend.nnx.rng_splitting import split_rngs
from distaff.frontend.nnx.rngs import Rngs, RngState, RngStream
from distaff.frontend.nnx.transforms.carry import Carry as Carried
from distaff.frontend.nnx.transforms.loops import scan
from distaff.frontend.nnx.transforms.prefixes import StateAxes


class RNN(Module):
    """A cell, applied to one element of a sequence after the other by ``nnx.scan``.

    Attributes:
        cell: the cell.
        rngs: the ``RngStream`` that first carries are drawn from, or None.
    """

    def __init__(
        self,
        cell: RNNCellBase,
        *,
        time_major: bool = False,
        return_carry: bool = False,
        reverse: bool = False,
        keep_order: bool = False,
        unroll: int = 1,
        state_axes: StateAxes | Mapping[Filter, Any] | None = None,
        broadcast_rngs: Filter = None,
        rngs: Rngs | RngStream | bool = True,
    ) -> None:
        """Wrap a cell.

        Args:
            cell: the cell.
            time_major: time is the first axis of inputs and outputs.
            return_carry: return the carry after the last element (of ``seq_lengths``) too.
            reverse: go from the last element to the first, and return the outputs in that order.
            keep_order: with ``reverse``, return the outputs in the order of the inputs.
            unroll: as for ``jax.lax.scan``.
            state_axes: axes of the cell's variables by filter, as for ``nnx.StateAxes``; by default all are carried.
            broadcast_rngs: streams of the cell that draw the same in every step.
            rngs: streams, among which is ``carry``; True for a constant one, False for none.

        Raises:
            ValueError: ``rngs`` is none of these.
        """
        self.cell = cell
        self.time_major = time_major
        self.return_carry = return_carry
        self.reverse = reverse
        self.keep_order = keep_order
        self.unroll = unroll
        self.state_axes = state_axes or StateAxes({...: Carried})
        self.broadcast_rngs = broadcast_rngs
        if isinstance(rngs, RngStream):
            raise ValueError("Expected rngs to be an Rngs or bool, got a RngStream; pass it to the call.")
        self.rngs = _carry_stream(rngs, ValueError)

    def __call__(
        self,
        inputs: Any,
        *,
        initial_carry: Carry | None = None,
        seq_lengths: Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        rngs: Rngs | RngStream | None = None,
    ) -> Any:
        """The outputs for a sequence, or with ``return_carry`` the last carry and the outputs.

        Args:
            inputs: [batch..., time, features...].
            initial_carry: by default made by the cell's ``initialize_carry``.
            seq_lengths: [batch...].
            return_carry, time_major, reverse, keep_order, rngs: go before the constructor's.
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
            stream = self.rngs if rngs is None else rngs.carry.fork() if isinstance(rngs, Rngs) else rngs
            step_shape = inputs.shape[:time_axis] + inputs.shape[time_axis + 1 :]
            initial_carry = self.cell.initialize_carry(step_shape, stream)
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

        axes = StateAxes([(All(RngState, self.broadcast_rngs), None), *self.state_axes.items()])
        scanned = scan(
            step,
            in_axes=(axes, Carried, time_axis),
            out_axes=(Carried, time_axis if seq_lengths is None else (0, time_axis)),
            unroll=self.unroll,
            graph=True,
            graph_updates=True,
        )
        with_rngs = split_rngs(splits=1, only=self.broadcast_rngs, squeeze=True)(scanned)
        carry, outputs = with_rngs(self.cell, carry, inputs)
        if seq_lengths is None:
            return carry, outputs
        carries, outputs = outputs
        return jax.tree.map(lambda x: at_last(x, seq_lengths), carries), outputs


def _carry_stream(rngs: Any, error: type[Exception]) -> Any:
    """The stream for an attribute: forked, constant for True, and None for False."""
    if rngs is True:
        return RngStream(0, tag="carry")
    if rngs is False:
        return data(None)
    if isinstance(rngs, Rngs):
        return rngs.carry.fork()
    if isinstance(rngs, RngStream):
        return rngs
    raise error(f"Expected rngs to be an Rngs, a RngStream or a bool, got {type(rngs)}.")


class Bidirectional(Module):
    """Two networks over one sequence, the second from its end to its start, with their outputs merged.

    Attributes:
        forward_rnn, backward_rnn: the networks.
        rngs: the ``RngStream`` that first carries are drawn from, or None.
    """

    def __init__(
        self,
        forward_rnn: Any,
        backward_rnn: Any,
        *,
        merge_fn: Callable[[Array, Array], Array] = concatenate,
        time_major: bool = False,
        return_carry: bool = False,
        rngs: Rngs | RngStream | bool = True,
    ) -> None:
        """Join two networks.

        Args:
            forward_rnn, backward_rnn: ``RNN`` or modules that are called as it is. One object given as both shares its
                parameters, with a warning.
            merge_fn: joins two arrays of outputs; by default along the last axis.
            time_major, return_carry: as for ``RNN``; the carry is the pair of both.
            rngs: as for ``RNN``, or a stream.

        Raises:
            TypeError: ``rngs`` is none of these.
        """
        self.forward_rnn = forward_rnn
        self.backward_rnn = backward_rnn
        self.merge_fn = merge_fn
        self.time_major = time_major
        self.return_carry = return_carry
        self.rngs = _carry_stream(rngs, TypeError)

    def __call__(
        self,
        inputs: Any,
        *,
        initial_carry: tuple[Carry, Carry] | None = None,
        rngs: Rngs | RngStream | None = None,
        seq_lengths: Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
    ) -> Any:
        """As ``RNN``; ``reverse`` and ``keep_order`` are there for the signature, and ignored."""
        return_carry = self.return_carry if return_carry is None else return_carry
        forward_carry, backward_carry = (None, None) if initial_carry is None else initial_carry
        if self.forward_rnn is self.backward_rnn:
            warnings.warn("forward_rnn and backward_rnn are one object and share their parameters.", stacklevel=2)
        options: dict[str, Any] = {
            "rngs": self.rngs if rngs is None else rngs.carry if isinstance(rngs, Rngs) else rngs,
            "seq_lengths": seq_lengths,
            "return_carry": True,
            "time_major": self.time_major if time_major is None else time_major,
        }
        forward_carry, forward = self.forward_rnn(inputs, initial_carry=forward_carry, reverse=False, **options)
        backward_carry, backward = self.backward_rnn(
            inputs, initial_carry=backward_carry, reverse=True, keep_order=True, **options
        )
        outputs = jax.tree.map(self.merge_fn, forward, backward)
        return ((forward_carry, backward_carry), outputs) if return_carry else outputs
