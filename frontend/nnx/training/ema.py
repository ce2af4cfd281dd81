"""Exponential moving averages of the variables of a model."""

from __future__ import annotations

from typing import Any, TypeVar

from distaff.frontend.nnx.filters import Filter
from distaff.frontend.nnx.graph_functions import clone, merge, split, state
from distaff.frontend.nnx.pytrees import Pytree, data
from distaff.frontend.nnx.state import to_flat_state

A = TypeVar("A")


class EMA(Pytree):
    """An average of variables in which older values fade.

    >>> ema = nnx.EMA(model, decay=0.999)
    >>> ema_model = ema.apply_to(model)  # once; it shares the variables of ``ema``
    >>> ema.update(model)  # after each step

    Attributes:
        params: the averages, a ``State`` of variables.
    """

    def __init__(self, params: Any, decay: float, *, only: Filter = ..., graph: bool | None = None) -> None:
        """Start at the present values.

        Args:
            params: an object that holds variables.
            decay: how much of the average each update keeps.
            only: which variables to average.
            graph: as for ``nnx.state``.
        """
        self.graph = graph
        self.decay = decay
        self.filter = only
        self.params = data(clone(state(params, only, graph=graph), graph=graph))

    def update(self, updates: Any) -> None:
        """Move the averages in place: ``decay * average + (1 - decay) * value``.

        Args:
            updates: the object, or a ``State`` of its variables.

        Raises:
            ValueError: it holds other variables than those that are averaged.
        """
        new = dict(to_flat_state(state(updates, self.filter, graph=self.graph)))
        averages = dict(to_flat_state(self.params))
        if new.keys() != averages.keys():
            raise ValueError(
                "The variables to update by aren't those that are averaged. Missing: "
                f"{sorted(averages.keys() - new.keys())}; not averaged: {sorted(new.keys() - averages.keys())}."
            )
        for path, average in averages.items():
            average[...] = self.decay * average[...] + (1 - self.decay) * new[path][...]

    def apply_to(self, model: A) -> A:
        """A model like ``model`` with the averages in place of what they are of. It shares all its variables.

        Those are the ones of this object and, for what is not averaged, the ones of ``model``.
        """
        graphdef, _, others = split(model, self.filter, ..., graph=self.graph)
        return merge(graphdef, self.params, others)  # type: ignore[no-any-return]
