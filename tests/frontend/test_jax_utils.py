"""Helpers around JAX, on one device, against Flax; several devices are in on_eight_devices.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tree_equality import assert_trees_equal

from distaff.frontend import jax_utils


@pytest.fixture(scope="session")
def flax_utils():
    return pytest.importorskip("flax.jax_utils")


def test_replicas_on_one_device(flax_utils):
    tree = {"a": jnp.ones((2, 3)), "b": np.arange(2), "c": jnp.float32(3)}
    mine, other = jax_utils.replicate(tree), flax_utils.replicate(tree)
    assert_trees_equal(mine, other)
    assert_trees_equal(jax_utils.unreplicate(mine), flax_utils.unreplicate(other))
    assert jax_utils.unreplicate(jnp.float32(1)) == 1 and jax_utils.unreplicate(np.arange(2)) == 0
    with pytest.warns(DeprecationWarning):
        means = jax.vmap(lambda x: jax_utils.pmean(x, "i"), axis_name="i")(jnp.arange(4.0))
    np.testing.assert_array_equal(means, [1.5] * 4)


def test_batches_are_fetched_ahead():
    taken = []

    def batches():
        for i in range(4):
            taken.append(i)
            yield {"x": np.full((1, 2), i)}

    fetched = jax_utils.prefetch_to_device(batches(), 2)
    for i, batch in enumerate(fetched):
        assert isinstance(batch["x"], jax.Array) and batch["x"].shape == (1, 2) and batch["x"][0, 0] == i
        assert len(taken) == min(i + 2, 4)
    assert i == 3


@settings(max_examples=5, deadline=None)
@given(
    axes=st.permutations(range(3)).flatmap(lambda order: st.integers(1, 3).map(lambda n: tuple(order[:n]))),
    keepdims=st.booleans(),
    unroll=st.sampled_from([1, 2, (1,)]),
)
def test_scans_over_any_axes_are_those_of_flax(flax_utils, axes, keepdims, unroll):
    x = jnp.arange(24.0).reshape(2, 3, 4)

    def body(carry, x):
        return carry + x.sum(), {"y": x * 2 + carry}

    results = [
        library.scan_in_dim(body, 0.0, x, axis=axes, unroll=unroll, keepdims=keepdims)
        for library in (jax_utils, flax_utils)
    ]
    assert_trees_equal(*results, rtol=1e-6)
    order = np.transpose(np.asarray(x), (*axes, *(i for i in range(3) if i not in axes)))
    steps = order.reshape(int(np.prod(order.shape[: len(axes)])), -1).sum(1)
    np.testing.assert_allclose(results[0][0], steps.sum())


def test_scanned_over_one_axis_by_number():
    total, _ = jax_utils.scan_in_dim(lambda c, x: (c + x, ()), jnp.zeros(2), jnp.ones((2, 3)), axis=1)
    np.testing.assert_array_equal(total, [3, 3])


class Model:
    """Uses its input in some outputs only, also behind calls."""

    def __call__(self, x, offset, *, width):
        key = jax.random.key(0)
        weights = jax.jit(lambda k, shape_of: jax.random.normal(k, (shape_of.shape[1], width)))(key, x)
        out, kept = jax.jit(lambda w, x: (x @ w, w + offset))(weights, x)
        again = jax.checkpoint(lambda w, x: (jnp.sin(x).sum(), w * 2))(weights, x)
        swapped = jax.lax.cond(offset > 0, lambda w: w, lambda w: -w, weights)
        return {"w": weights, "kept": kept, "again": again, "out": out, "swapped": swapped, "same": x, "number": 3.0}


@pytest.mark.parametrize("spec", [(2, 5), ((2, 5), jnp.bfloat16)])
def test_what_inputs_do_not_reach_is_computed(flax_utils, spec):
    mine = jax_utils.partial_eval_by_shape(Model(), [spec], 2.0, width=3)
    other = flax_utils.partial_eval_by_shape(Model(), [spec], 2.0, width=3)
    assert jax.tree.map(jnp.shape, mine) == jax.tree.map(jnp.shape, other)
    unknown = {name for name, value in mine.items() if isinstance(value, jax.ShapeDtypeStruct)}
    assert unknown == {"out", "same"} and isinstance(mine["again"][0], jax.ShapeDtypeStruct)
    dtype = spec[1] if isinstance(spec[0], tuple) else jnp.float32
    assert mine["same"] == jax.ShapeDtypeStruct((2, 5), dtype)
    for name in ("w", "kept", "swapped", "number"):
        np.testing.assert_allclose(mine[name], other[name], rtol=1e-6)
    np.testing.assert_allclose(mine["again"][1], other["again"][1], rtol=1e-6)


def test_all_or_nothing_known():
    nothing = jax_utils.partial_eval_by_shape(lambda x: x + 1, [(3,)])
    assert nothing == jax.ShapeDtypeStruct((3,), jnp.float32)
    everything = jax_utils.partial_eval_by_shape(lambda x: jnp.ones(x.shape), [(3,)])
    np.testing.assert_array_equal(everything, [1, 1, 1])
    looped = jax_utils.partial_eval_by_shape(
        lambda x: jax.lax.fori_loop(0, 2, lambda _, c: (c[1], c[0]), (x, x * 0)), [()]
    )
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in looped)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("minimum", [None, 5])
def test_batches_of_any_size_on_one_device(flax_utils, size, minimum):
    seen = []

    def wrapped(params, x, *, mask, scale):
        seen.append(x.shape)
        return {"y": params * x * scale, "m": mask}

    x, mask = np.arange(2.0 * size).reshape(size, 2), np.ones(size, bool)
    results = [
        library.pad_shard_unpad(wrapped, static_argnames=("scale",))(
            2.0, x, mask=mask, scale=3.0, min_device_batch=minimum
        )
        for library in (jax_utils, flax_utils)
    ]
    assert_trees_equal(*results)
    np.testing.assert_array_equal(results[0]["y"], 6 * x)
    assert seen[0] == seen[1] == (1, max(size, minimum or 0), 2)
    kept = jax_utils.pad_shard_unpad(lambda x: x.sum(), static_argnums=(), static_return=True)(x)
    assert kept == x.sum()
    with pytest.raises(ValueError, match="same size"):
        jax_utils.pad_shard_unpad(wrapped)(1, x, mask=np.ones(size + 1), scale=np.ones(size))
