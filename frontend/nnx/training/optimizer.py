"""An Optax transformation and its state as an object that updates a model in place.

The state mirrors the parameters: where Optax keeps a value for each parameter there is an ``OptVariable`` with the
parameter's metadata (so that it is sharded alike), and an ``OptArray`` for anything else.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp

from distaff.frontend.nnx.filters import Filter
from distaff.frontend.nnx.functional import as_pure
from distaff.frontend.nnx.graph_functions import state, update
from distaff.frontend.nnx.pytrees import Pytree, data
from distaff.frontend.nnx.variable_kinds import Param
from distaff.frontend.nnx.variables import Variable

M = TypeVar("M")


class OptState(Variable[Any]):
    """Any state of an optimiser."""


class OptArray(OptState):
    """State of an optimiser that belongs to no variable."""


class OptVariable(OptState):
    """State of an optimiser that belongs to one variable."""


def _is_variable(x: Any) -> bool:
    return isinstance(x, Variable)


def _with_plain_value(x: Any) -> Any:
    """A variable that stores its value itself, whatever its metadata says of ``hijax``, for functions of arrays."""
    return x._of(x.get_raw_value(), x._var_metadata) if _is_variable(x) else x


def to_opt_state(tree: Any) -> Any:
    """The tree with its variables as ``OptVariable`` and its other arrays as ``OptArray``.

    A variable's metadata ``optimizer_sharding`` becomes the ``out_sharding`` of the state that belongs to it.
    """

    def convert(x: Any) -> OptState:
        if not _is_variable(x):
            return OptArray(x)
        metadata = x.get_metadata()
        if "optimizer_sharding" in metadata:
            metadata["out_sharding"] = metadata.pop("optimizer_sharding")
        return OptVariable(x.get_value(), **metadata)

    return jax.tree.map(convert, tree, is_leaf=_is_variable)


class _Missing:
    """The type of an argument that Flax before 0.11 did without."""


_MISSING: Any = _Missing()


class Optimizer(Pytree, Generic[M]):
    """An optimiser of some of the variables of a model.

    >>> optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    >>> grads = nnx.grad(loss_fn)(model)
    >>> optimizer.update(model, grads)

    Attributes:
        step: how many updates there were, an ``OptState`` of a uint32.
        tx: the Optax transformation, static.
        opt_state: its state, of ``OptVariable`` and ``OptArray``.
        wrt: which variables it optimises.
    """

    def __init__(self, model: M, tx: Any, *, wrt: Filter = _MISSING, graph: bool | None = None) -> None:
        """Make the state for the variables of ``model``.

        Args:
            tx: an Optax gradient transformation.
            wrt: which variables; the filter that gradients are taken by.
            graph: as for ``nnx.state``.
        """
        if wrt is _MISSING:
            raise TypeError(
                "Missing the argument `wrt`, the variables to optimise: nnx.Optimizer(model, tx, wrt=nnx.Param). "
                "For the form before Flax 0.11, which holds the model too, use nnx.ModelAndOptimizer."
            )
        self.graph = graph
        self.step = OptState(jnp.array(0, jnp.uint32))
        self.tx = tx
        params = jax.tree.map(_with_plain_value, state(model, wrt, graph=graph), is_leaf=_is_variable)
        self.opt_state = data(to_opt_state(tx.init(params)))
        self.wrt = wrt

    def __getattr__(self, name: str) -> Any:
        if name == "model":
            raise AttributeError(
                "Optimizer has no attribute 'model' since Flax 0.11; pass the model to `update`, or use "
                "nnx.ModelAndOptimizer, which holds it."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def update(self, model: M, grads: Any = _MISSING, /, **kwargs: Any) -> Any:
        """Change the variables of ``model`` and the state of the optimiser in place by one step.

        Args:
            grads: what ``nnx.grad`` returned; of it, what ``wrt`` selects.
            kwargs: more arguments for ``tx.update``, for transformations that take them, such as line searches; they
                see arrays in place of variables.

        Returns:
            What was added to the variables.

        Raises:
            ValueError: there are not gradients for just the variables that the optimiser has state for.
        """
        if grads is _MISSING:
            raise TypeError(
                "Missing the argument `grads`: optimizer.update(model, grads). For the form before Flax 0.11, "
                "update(grads), use nnx.ModelAndOptimizer."
            )
        return self._step(model, grads, kwargs)

    def _step(self, model: M, grads: Any, kwargs: dict[str, Any]) -> Any:
        import optax  # here, so that modules work without the extra `train`

        params = as_pure(state(model, self.wrt, graph=self.graph))
        grads = as_pure(state(grads, self.wrt, graph=self.graph))
        _check_same_paths(params, grads)
        updates, opt_state = self.tx.update(grads, as_pure(self.opt_state), params, **as_pure(kwargs))
        update(model, optax.apply_updates(params, updates))
        jax.tree.map(lambda var, value: var.set_value(value), self.opt_state, opt_state, is_leaf=_is_variable)
        self.step[...] += 1
        return updates


def _check_same_paths(params: Any, grads: Any) -> None:
    """Refuse gradients of other variables than those that are optimised."""
    ours, theirs = (
        {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (params, grads)
    )
    if ours != theirs:
        raise ValueError(
            "The gradients aren't those of the variables that the optimizer was made for. Without a gradient: "
            f"{sorted(ours - theirs)}; with one, but not optimised: {sorted(theirs - ours)}. Take the gradient by the "
            "filter that the optimizer has as `wrt`: nnx.grad(fn, argnums=nnx.DiffState(0, wrt))."
        )


class ModelAndOptimizer(Optimizer[M]):
    """An optimiser that holds its model, as ``Optimizer`` did before Flax 0.11. New code passes the model."""

    def __init__(self, model: M, tx: Any, *, wrt: Filter = Param) -> None:
        """As for ``Optimizer``."""
        super().__init__(model, tx, wrt=wrt)
        self.model = model

    def update(self, grads: Any, /, **kwargs: Any) -> Any:  # type: ignore[override]
        """As for ``Optimizer``, with the model that it holds."""
        return self._step(self.model, grads, kwargs)
