"""Comparison with Flax's NNX, where it is installed: the same program, with either library's ``nnx``."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tree_equality import assert_trees_equal

from distaff.frontend import nnx

FOLLOWED = "0.12.8"  # the version of Flax whose names and arguments ours are


@pytest.fixture(scope="session")
def flax_is_followed() -> bool:
    """Whether the installed Flax is that version: of another one, only what both have is compared."""
    return version("flax") == FOLLOWED


@pytest.fixture(scope="session")
def flax_nnx() -> ModuleType:
    return pytest.importorskip("flax.nnx")


@pytest.fixture(scope="session")
def same_layer(flax_nnx: ModuleType, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Compare a layer of either library: initial state exactly; outputs, later state and gradients nearly."""

    def compare(
        build: Callable[[Any, Any], Any],
        *args: Any,
        call: Callable[..., Any] = lambda layer, *args: layer(*args),
        rtol: float = 2e-6,
        gradients: bool = True,
    ) -> None:
        libraries = (nnx, flax_nnx)
        layers = [build(lib, lib.Rngs(7, params=3)) for lib in libraries]
        states = [described(lib, layer) for lib, layer in zip(libraries, layers, strict=True)]
        assert_trees_equal(*[{path: value for path, (_, value) in state.items()} for state in states])
        kinds = [{path: kind for path, (kind, _) in state.items()} for state in states]
        assert kinds[0] == kinds[1]

        results = []
        for lib, layer in zip(libraries, layers, strict=True):
            graphdef, state = lib.split(layer)
            leaves, treedef = jax.tree.flatten(state)
            floats = {i: moved(x) for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact)}

            def run(
                floats: Any, lib: Any = lib, graphdef: Any = graphdef, leaves: Any = leaves, treedef: Any = treedef
            ) -> Any:
                values = [floats.get(i, x) for i, x in enumerate(leaves)]
                layer = lib.merge(graphdef, jax.tree.unflatten(treedef, values))
                output = call(layer, *args)
                after = {path: value for path, (_, value) in described(lib, layer).items()}
                return scalar(output), (output, after)

            if gradients:
                gradient, result = compiled(jax.grad(run, has_aux=True), floats)
                results.append((result, gradient))
            else:
                results.append((compiled(run, floats)[1], {}))
        (mine, my_gradient), (other, other_gradient) = results
        assert_trees_equal(mine, other, rtol=rtol)
        assert_trees_equal(my_gradient, other_gradient, rtol=100 * rtol)

    return compare


def described(lib: Any, layer: Any) -> dict[tuple[str, ...], Any]:
    """The leaves of a layer by path: the name of the variable's type (None for arrays), and the value."""
    found = {}
    for path, leaf in lib.to_flat_state(lib.state(layer)):
        kind = type(leaf).__name__ if isinstance(leaf, lib.Variable) else None
        found[tuple(map(str, path))] = kind, leaf.get_raw_value() if kind else leaf
    return found


def moved(x: jax.Array) -> jax.Array:
    """Away from the initial values, so that scales and biases count."""
    steps = np.abs(np.sin(np.arange(x.size, dtype=np.float32))).reshape(x.shape) / 4
    return x + jnp.asarray(steps, x.dtype)


def scalar(tree: Any) -> jax.Array:
    return sum(jnp.sum(jnp.sin(jnp.real(x).astype(jnp.float32))) for x in jax.tree.leaves(tree))
