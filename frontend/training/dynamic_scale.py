"""Dynamic loss scaling, so that gradients in float16 neither vanish nor overflow (arXiv:1710.03740, section 3.2)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distaff.frontend import struct

_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST = float(np.finfo(np.float32).tiny)


class DynamicScaleResult(NamedTuple):
    """The next scale; whether all gradients are finite; what the function returned; its gradients."""

    dynamic_scale: DynamicScale
    finite: jax.Array
    aux: Any
    grad: Any


class DynamicScale(struct.PyTreeNode):
    """A factor for the loss that grows while gradients are finite and shrinks when they are not.

    >>> scale, finite, loss, grads = scale.value_and_grad(loss_fn)(params)
    >>> new = state.apply_gradients(grads=grads)
    >>> state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)

    Attributes: ``growth_factor`` after ``growth_interval`` steps in a row that were finite, ``backoff_factor`` after
    one that was not, down to ``minimum_scale`` (None: any); ``fin_steps`` counts the steps, ``scale`` is the factor.
    """

    growth_factor: float = struct.field(pytree_node=False, default=2.0)
    backoff_factor: float = struct.field(pytree_node=False, default=0.5)
    growth_interval: int = struct.field(pytree_node=False, default=2000)
    fin_steps: int | jax.Array = 0
    scale: float | jax.Array = 65536.0
    minimum_scale: float | None = struct.field(pytree_node=False, default=_SMALLEST)

    def value_and_grad(
        self,
        fun: Callable[..., Any],
        argnums: int | Sequence[int] = 0,
        has_aux: bool = False,
        axis_name: str | None = None,
    ) -> Callable[..., DynamicScaleResult]:
        """``jax.value_and_grad`` of the scaled function, with the scale taken out again.

        Args:
            fun: returns a scalar, or with ``has_aux`` a scalar and anything else.
            argnums: which arguments to differentiate by.
            has_aux: whether ``fun`` returns a pair.
            axis_name: average gradients over this axis of ``pmap`` or ``shard_map`` before they are judged.

        Returns:
            A function of the arguments of ``fun``. Its gradients are float32; where ``finite`` is False they must not
            be applied.
        """

        @functools.wraps(fun)
        def scaled(*args: Any) -> Any:
            value = fun(*args)
            return (self.scale * value[0], value[1]) if has_aux else self.scale * value

        differentiate = jax.value_and_grad(scaled, argnums, has_aux)

        def run(*args: Any) -> DynamicScaleResult:
            value, grad = differentiate(*args)
            value = (value[0] / self.scale, value[1]) if has_aux else value / self.scale
            grad = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32) / self.scale, grad)
            if axis_name is not None:
                grad = jax.lax.pmean(grad, axis_name)
            finite = functools.reduce(jnp.logical_and, map(_all_finite, jax.tree.leaves(grad)), jnp.array(True))
            return DynamicScaleResult(self._after(finite), finite, value, grad)

        return run

    def _after(self, finite: jax.Array) -> DynamicScale:
        """The scale for the next step."""
        is_due = self.fin_steps == self.growth_interval
        grown = jnp.where(is_due, jnp.minimum(self.scale * self.growth_factor, _LARGEST), self.scale)
        shrunk = self.scale * self.backoff_factor
        if self.minimum_scale is not None:
            shrunk = jnp.maximum(shrunk, self.minimum_scale)
        steps = jnp.where(is_due | ~finite, 0, self.fin_steps + 1)
        return self.replace(fin_steps=steps, scale=jnp.where(finite, grown, shrunk))


def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(x))
