"""``BatchApply``: a function of one batch axis, applied over several."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


class BatchApply:
    """Calls ``f`` with the first ``num_dims`` axes of each argument made one, and splits them again in the outputs.

    Arguments of a lower rank, in any tree, are passed as they are. Sizes are those of the first argument that has
    enough axes.

    Args:
        f: the function, such as a module. Its outputs must begin with the axis that was made.
        num_dims: the number of leading axes to merge.
    """

    def __init__(self, f: Callable[..., Any], num_dims: int = 2) -> None:
        self._f = f
        self.num_dims = num_dims

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function; ValueError if no argument has ``num_dims`` axes."""
        sizes = [jnp.shape(x) for x in jax.tree.leaves((args, kwargs))]
        leading = next((shape[: self.num_dims] for shape in sizes if len(shape) >= self.num_dims), None)
        if leading is None:
            raise ValueError(
                f"BatchApply requires at least one input with ndim >= {self.num_dims}; got shapes {sizes}."
            )
        args, kwargs = jax.tree.map(self._merge, (args, kwargs))
        return jax.tree.map(lambda x: x.reshape(*leading, *x.shape[1:]), self._f(*args, **kwargs))

    def _merge(self, x: Any) -> Any:
        shape = jnp.shape(x)
        if len(shape) < self.num_dims:
            return x
        return jnp.reshape(x, (math.prod(shape[: self.num_dims]), *shape[self.num_dims :]))
