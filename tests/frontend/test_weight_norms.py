"""Spectral and weight normalisation against Flax's, and against what they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff.frontend import linen as nn

few = settings(max_examples=3, deadline=None)


def array(shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def nested(nn, wrap):
    """A wrapped module that has submodules, between others."""

    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.relu(nn.Dense(4)(x)))

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x, **kwargs):
            return wrap(nn)(Inner(), **self.options)(nn.Dense(2)(x), **kwargs)

        options: dict

    return Outer


@few
@given(
    steps=st.sampled_from([0, 1, 3]),
    dtype=st.sampled_from([None, "bfloat16"]),
    param_dtype=st.sampled_from(["float32", "bfloat16"]),
    update=st.booleans(),
    deep=st.booleans(),
)
def test_spectral_norm(same_as_flax, steps, dtype, param_dtype, update, deep):
    options = dict(
        n_steps=steps, dtype=dtype, param_dtype=param_dtype, collection_name="stats" if deep else "batch_stats"
    )

    def build(nn):
        if deep:
            return nested(nn, lambda nn: nn.SpectralNorm)(options=options)
        return nn.SpectralNorm(nn.Conv(4, (3,), bias_init=nn.initializers.normal()), **options)

    mutable = [options["collection_name"]] if update else False
    same_as_flax(build, array((2, 5, 3)), update_stats=update, mutable=mutable, rtol=5e-6)


def test_spectral_norm_converges_to_the_largest_singular_value():
    layer = nn.SpectralNorm(nn.Dense(6, use_bias=False), n_steps=10)
    x = array((2, 5))
    variables = layer.init(jax.random.key(0), x, update_stats=False)
    kernel = 3 * array((5, 6), seed=1)
    variables = {"params": {"layer_instance": {"kernel": kernel}}, "batch_stats": variables["batch_stats"]}
    for _ in range(10):  # each call goes on where the one before stopped
        y, updates = layer.apply(variables, x, update_stats=True, mutable=["batch_stats"])
        variables = {**variables, **updates}
    largest = np.linalg.svd(np.asarray(kernel, np.float64), compute_uv=False)[0]
    np.testing.assert_allclose(updates["batch_stats"]["layer_instance/kernel/sigma"], largest, rtol=1e-4)
    np.testing.assert_allclose(y, x @ kernel / largest, rtol=1e-4, atol=1e-5)


def test_spectral_norm_of_more_axes_can_be_refused(flax_nn):
    for library in (nn, flax_nn):
        layer = library.SpectralNorm(library.Conv(4, (3,)), error_on_non_matrix=True)
        with pytest.raises(ValueError, match="error_on_non_matrix"):
            layer.init(jax.random.key(0), array((2, 5, 3)), update_stats=True)


@few
@given(
    options=st.fixed_dictionaries(
        dict(
            dtype=st.sampled_from([None, "bfloat16"]),
            param_dtype=st.sampled_from(["float32", "bfloat16"]),
            use_scale=st.booleans(),
            feature_axes=st.sampled_from([-1, None, 0]),
            variable_filter=st.sampled_from([{"kernel"}, None, {"bias", "Dense_1"}]),
        )
    ),
    deep=st.booleans(),
)
def test_weight_norm(same_as_flax, options, deep):
    options = dict(options, scale_init=jax.nn.initializers.normal())

    def build(nn):
        if deep:
            return nested(nn, lambda nn: nn.WeightNorm)(options=options)
        return nn.WeightNorm(nn.Conv(4, (3,), bias_init=nn.initializers.normal()), **options)

    same_as_flax(build, array((2, 5, 3)), rtol=5e-6)


def test_weight_norm_gives_columns_of_unit_norm():
    layer = nn.WeightNorm(nn.Dense(4, use_bias=False))
    variables = layer.init(jax.random.key(0), array((2, 3)))
    kernel = layer.apply(variables, jnp.eye(3))
    np.testing.assert_allclose(np.linalg.norm(kernel, axis=0), np.ones(4), rtol=1e-5)
