"""``TrainState``: step, parameters and Optax state in one pytree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import jax
import optax

from distaff.frontend import struct
from distaff.frontend.linen.fp8_ops import OVERWRITE_WITH_GRADIENT as OVERWRITE_WITH_GRADIENT


class TrainState(struct.PyTreeNode):
    """What a training step takes and returns. Subclass it to keep more, such as ``batch_stats``.

    >>> class TrainState(train_state.TrainState):
    ...     batch_stats: Any
    >>> state = TrainState.create(apply_fn=model.apply, params=..., tx=optax.adam(1e-3), batch_stats=...)
    >>> state = state.apply_gradients(grads=grads, batch_stats=updates["batch_stats"])

    ``step`` counts the calls of ``apply_gradients``; ``apply_fn`` (usually ``model.apply``) and the Optax
    transformation ``tx`` are static. If ``params`` is a dict with the collection ``_overwrite_with_gradient`` beside
    ``"params"``, only the latter is given to ``tx``; the former is replaced by its gradients.
    """

    step: int | jax.Array
    apply_fn: Callable[..., Any] = struct.field(pytree_node=False)
    params: Any = struct.field(pytree_node=True)
    tx: optax.GradientTransformation = struct.field(pytree_node=False)
    opt_state: optax.OptState = struct.field(pytree_node=True)

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> Self:
        """The state after one step of the optimiser.

        Args:
            grads: a tree like ``params``.
            **kwargs: fields to replace besides.
        """
        overwrites = _overwrites(grads)
        params, of_params = (self.params["params"], grads["params"]) if overwrites else (self.params, grads)
        updates, opt_state = self.tx.update(of_params, self.opt_state, params)
        new_params = optax.apply_updates(params, updates)
        if overwrites:
            new_params = {"params": new_params, OVERWRITE_WITH_GRADIENT: grads[OVERWRITE_WITH_GRADIENT]}
        return self.replace(step=self.step + 1, params=new_params, opt_state=opt_state, **kwargs)

    @classmethod
    def create(
        cls, *, apply_fn: Callable[..., Any], params: Any, tx: optax.GradientTransformation, **kwargs: Any
    ) -> Self:
        """The state at step 0, with a new ``opt_state``; ``kwargs`` are the fields of a subclass."""
        optimised = params["params"] if _overwrites(params) else params
        return cls(step=0, apply_fn=apply_fn, params=params, tx=tx, opt_state=tx.init(optimised), **kwargs)


def _overwrites(tree: Any) -> bool:
    return not isinstance(tree, jax.Array) and OVERWRITE_WITH_GRADIENT in tree
