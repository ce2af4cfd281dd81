"""``TrainState``: a model in its functional form, with Optax state, as one pytree."""

from __future__ import annotations

from typing import Any, Generic, Self, TypeVar

import jax
import jax.numpy as jnp

from distaff.frontend import struct

M = TypeVar("M")


class TrainState(struct.PyTreeNode, Generic[M]):
    """What a functional training step takes and returns. Subclass it to keep more states.

    >>> graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    >>> state = nnx.TrainState.create(graphdef, params=params, tx=optax.adam(1e-3))
    >>> logits, (_, updates) = state.apply("params", rest)(x)
    >>> state = state.apply_gradients(grads)
    """

    graphdef: Any = struct.field(pytree_node=False)
    params: Any
    opt_state: Any
    step: jax.Array
    tx: Any = struct.field(pytree_node=False)

    @classmethod
    def create(cls, graphdef: Any, *, params: Any, tx: Any, step: int = 0, **kwargs: Any) -> Self:
        """The state before the first step; ``kwargs`` are the fields of a subclass."""
        return cls(graphdef=graphdef, params=params, opt_state=tx.init(params), step=jnp.asarray(step), tx=tx, **kwargs)

    def apply(self, state: Any, *states: Any) -> Any:
        """``GraphDef.apply`` with these states; a string is the name of a field."""
        return self.graphdef.apply(*(getattr(self, s) if isinstance(s, str) else s for s in (state, *states)))

    def apply_gradients(self, grads: Any, **kwargs: Any) -> Self:
        """The state after one step; ``kwargs`` replace other fields."""
        import optax  # here, so that modules work without the extra `train`

        updates, opt_state = self.tx.update(grads, self.opt_state, self.params)
        params = optax.apply_updates(self.params, updates)
        return self.replace(params=params, opt_state=opt_state, step=self.step + 1, **kwargs)
