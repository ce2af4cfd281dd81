"""Comparison with Flax, where it is installed: the same program, with either library's ``nn``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff.frontend import core
from distaff.frontend import linen as nn


@pytest.fixture(scope="session")
def flax_nn() -> ModuleType:
    return pytest.importorskip("flax.linen")


@pytest.fixture(scope="session")
def same_as_flax(flax_nn: ModuleType) -> Callable[..., Any]:
    """Compare ``build`` of either library: variables exactly, outputs and gradients to float32 precision."""

    def compare(
        build: Callable[[Any], Any],
        *args: Any,
        rngs: Any = None,
        mutable: Any = False,
        gradients: bool = True,
        rtol: float = 1e-6,
        **kwargs: Any,
    ) -> Any:
        modules = build(nn), build(flax_nn)
        keys = rngs or {"params": jax.random.key(7, impl="unsafe_rbg")}  # whose programs are small
        variables, others = _compiled(lambda: [module.init(keys, *args, **kwargs) for module in modules])
        assert_same_tree(variables, others)
        apply_keys = {name: jax.random.fold_in(key, 1) for name, key in keys.items() if name != "params"}

        def results(values: Any) -> Any:
            def run(values: Any, module: Any) -> tuple[jax.Array, Any]:
                output = module.apply(values, *args, rngs=apply_keys, mutable=mutable, **kwargs)
                return _scalar(output[0] if mutable else output), output

            if not gradients:
                return [(run(values, module)[1], ()) for module in modules]
            with_gradient = jax.value_and_grad(run, has_aux=True, allow_int=True)
            made = [with_gradient(values, module) for module in modules]
            return [(output, gradient) for (_, output), gradient in made]

        # Away from the initial values, so that scales and biases count.
        (mine, mine_gradient), (other, other_gradient) = _compiled(results, jax.tree.map(_moved, variables))
        assert_same_tree(mine, other, rtol=rtol)
        assert_same_tree(mine_gradient, other_gradient, rtol=100 * rtol)
        return variables

    return compare


@pytest.fixture(scope="session")
def compiled() -> Callable[..., Any]:
    """Call a function of arrays, compiled fast."""
    return _compiled


# Little optimisation, as programs of tests run once; and roundings to bfloat16 where the program has them.
_OPTIONS = {"xla_backend_optimization_level": 0, "xla_allow_excess_precision": False}


def _compiled(fn: Callable[..., Any], *args: Any) -> Any:
    return jax.jit(fn).lower(*args).compile(compiler_options=_OPTIONS)(*args)


def _moved(x: jax.Array) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    return x + jnp.abs(jnp.sin(jnp.arange(x.size, dtype=jnp.float32))).reshape(x.shape).astype(x.dtype) / 4


def _scalar(tree: Any) -> jax.Array:
    return sum(jnp.sum(jnp.sin(jnp.real(x).astype(jnp.float32))) for x in jax.tree.leaves(tree))


# What programs with transforms are given.
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4)), jnp.float32)
KEYS = {name: jax.random.key(i) for i, name in enumerate(("params", "dropout", "noise"))}


def plain(tree: Any) -> Any:
    """Frozen dicts as dicts: what Flax freezes is frozen there alone."""
    return jax.tree.map(lambda x: x, core.unfreeze(tree)) if isinstance(tree, dict) else tree


def assert_same_intermediates(build: Callable[[Any], Any], libraries: Iterable[Any]) -> None:
    """What a program of either library captures of ``X``, without transforms around it, is the same."""
    captured = []
    for library in libraries:
        module = build(library)
        variables = module.init(KEYS, X)
        captured.append(plain(module.apply(variables, X, rngs=KEYS, capture_intermediates=True)[1]))
    assert_same_tree(*captured, rtol=1e-6)


def assert_same_tree(ours: Any, theirs: Any, rtol: float = 0.0) -> None:
    """The same structure, shapes and dtypes; the same values, or with ``rtol`` nearly, relative to the largest."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for path, mine in jax.tree_util.tree_leaves_with_path(ours):
        other = dict(jax.tree_util.tree_leaves_with_path(theirs))[path]
        assert jnp.shape(mine) == jnp.shape(other), path
        assert jnp.result_type(mine) == jnp.result_type(other), path
        if jnp.issubdtype(jnp.result_type(mine), jax.dtypes.prng_key) or jnp.result_type(mine) == jax.dtypes.float0:
            continue
        a, b = (np.asarray(x).astype(complex if np.iscomplexobj(x) else np.float64) for x in (mine, other))
        low_precision = jnp.result_type(mine) in (jnp.bfloat16, jnp.float16)
        tolerance = (0.02 if low_precision and rtol else rtol) * float(np.max(np.abs(b), initial=1e-6))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance, err_msg=str(path))
