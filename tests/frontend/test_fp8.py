"""Products in 8-bit floats against Flax's: variables, outputs, gradients and updated scales; and against float64."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff.frontend import linen as nn
from distaff.frontend.linen import fp8_ops

few = settings(max_examples=3, deadline=None)
OPS = ["Fp8DotGeneralOp", "Fp8DirectDotGeneralOp", "NANOOFp8DotGeneralOp"]
META = fp8_ops.OVERWRITE_WITH_GRADIENT


def array(shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.fixture(autouse=True)
def without_deprecations():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@few
@given(
    op=st.sampled_from(OPS),
    dtype=st.sampled_from([None, "bfloat16"]),
    shape=st.sampled_from([(3, 4), (2, 3, 4)]),
    scale=st.sampled_from([0.01, 1.0, 1000.0]),
)
def test_dense_with_each_operation(same_as_flax, op, dtype, shape, scale):
    def build(nn):
        return nn.Dense(5, dtype=dtype, dot_general_cls=getattr(nn, op))

    same_as_flax(build, scale * array(shape), rtol=1e-6)


@pytest.mark.parametrize("op", OPS)
def test_dense_general_over_batch_axes(same_as_flax, op):
    def build(nn):
        return nn.DenseGeneral((3, 2), axis=(3, 1), batch_dims=(0,), dot_general_cls=getattr(nn, op))

    same_as_flax(build, array((2, 3, 4, 5)), rtol=1e-6)


@few
@given(
    equation=st.sampled_from(["ab,bc->ac", "abc,cd->abd", "abc,adc->abd", "bac,cdb->dba", "ab,cb->ca"]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_einsum(flax_nn, compiled, equation, dtype):
    sizes = dict(a=2, b=3, c=4, d=5)
    left, right = equation.split("->")[0].split(",")
    x, k = (array([sizes[axis] for axis in axes], dtype, seed) for seed, axes in enumerate((left, right)))
    results = []
    for library in (nn, flax_nn):
        module = library.Fp8Einsum(amax_history_length=3)
        variables = module.init(jax.random.key(0), equation, x, k)

        def loss(variables, x, k, module=module):
            return jnp.sum(jnp.sin(module.apply(variables, equation, x, k).astype(jnp.float32)))

        results.append(compiled(jax.value_and_grad(loss, argnums=(0, 1, 2)), variables, x, k))
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(*(np.asarray(v, np.float32) for v in (ours, theirs)), rtol=1e-5, atol=1e-6)


def test_attention_with_einsums_in_8_bits(same_as_flax):
    def build(nn):
        return nn.MultiHeadDotProductAttention(
            2,
            dtype=jnp.bfloat16,
            qkv_dot_general_cls=nn.Fp8DirectDotGeneralOp,
            qk_attn_weights_einsum_cls=nn.Fp8Einsum,
            attn_weights_value_einsum_cls=nn.Fp8Einsum,
        )

    same_as_flax(build, array((2, 4, 8)), gradients=False, rtol=1e-6)


@pytest.mark.smoke
@pytest.mark.parametrize("op", OPS)
def test_training_steps_carry_scales_on_and_stay_near_float64(compiled, op):
    """Scales of one step come from the magnitudes of those before; the product stays as near as 8 bits allow."""
    layer = nn.Dense(6, use_bias=False, dot_general_cls=getattr(nn, op))
    x = 37.0 * array((8, 16))
    variables = layer.init(jax.random.key(0), x)

    def loss(variables, x):
        y = layer.apply(variables, x)
        return jnp.sum(y * y) / 2, y

    exact = np.asarray(x, np.float64) @ np.asarray(variables["params"]["kernel"], np.float64)
    for _ in range(3):
        (_, y), gradients = compiled(jax.value_and_grad(loss, has_aux=True), variables, x)
        variables = {"params": variables["params"], META: gradients[META]}
    error = np.abs(np.asarray(y) - exact).max() / np.abs(exact).max()
    assert 0 < error < 0.06
    kernel_gradient = np.asarray(x, np.float64).T @ exact
    error = np.abs(np.asarray(gradients["params"]["kernel"]) - kernel_gradient).max() / np.abs(kernel_gradient).max()
    assert 0 < error < 0.2
    (meta,) = variables[META].values()
    largest = float(jnp.finfo(jnp.float8_e4m3fnuz if op.startswith("NANOO") else jnp.float8_e4m3fn).max)
    np.testing.assert_allclose(meta["input_scale"], np.abs(x).max() / largest, rtol=1e-5)
    assert float(meta["input_amax_history"][0]) == np.abs(x).max()


def test_scale_keeps_its_value_without_a_history_and_with_infinities():
    for amax in (0.0, np.inf, np.nan):
        np.testing.assert_array_equal(fp8_ops.compute_scale(jnp.float32(amax), jnp.float32(4.0), 448.0), 4.0)
    np.testing.assert_allclose(fp8_ops.compute_scale(jnp.float32(7.0), jnp.float32(4.0), 448.0, margin=1), 2 * 7 / 448)


def test_quantize_clips_and_rounds():
    x = jnp.asarray([1000.0, -1000.0, 1.06, 0.0])
    quantized = fp8_ops.quantize(x, jnp.float8_e4m3fn, jnp.ones(1), jnp.float32)
    np.testing.assert_array_equal(quantized.astype(jnp.float32), [448.0, -448.0, 1.0, 0.0])
    with pytest.raises(ValueError, match="Expected one of"):
        fp8_ops.get_fp8_max(jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("library", ["ours", "flax"])
def test_max_gradient_dtype_joins_gradients_by_their_maximum(library):
    """A layer used twice in one step: the new scale is the largest of both, where float32 would give their sum."""
    if library == "flax":
        lib, ops = pytest.importorskip("flax.linen"), pytest.importorskip("flax.linen.fp8_ops")
    else:
        lib, ops = nn, fp8_ops
    layer = lib.Dense(3, dot_general_cls=lib.Fp8DirectDotGeneralOp)
    x = array((2, 4))
    variables = layer.init(jax.random.key(0), x)

    @jax.jit
    def step(variables):
        meta = jax.tree.map(lambda v: jax.lax.convert_element_type(v, ops.fm32), variables[META])

        def loss(meta):
            state = {"params": variables["params"], META: meta}
            return jnp.sum(layer.apply(state, x)) + jnp.sum(layer.apply(state, 5 * x))

        gradients = jax.grad(loss, allow_int=True)(meta)
        return jax.tree.map(lambda v: jax.lax.convert_element_type(v, jnp.float32), gradients)

    (meta,) = step(variables).values()
    np.testing.assert_allclose(meta["input_amax_history"][0], 5 * np.abs(x).max(), rtol=1e-6)
    np.testing.assert_allclose(meta["input_scale"], [1.0])


def test_max_gradient_values_cross_the_border_of_jit():
    value = jax.jit(lambda v: jax.lax.convert_element_type(v, fp8_ops.fm32))(jnp.ones(2))
    assert value.dtype == fp8_ops.fm32 == fp8_ops.fp32_max_grad
    back = jax.jit(lambda v: jax.lax.convert_element_type(v, jnp.float32))(value)
    np.testing.assert_array_equal(back, [1.0, 1.0])
    assert repr(fp8_ops.fm32) == "fp8_meta32"


def test_deprecated_operation_warns():
    with pytest.warns(DeprecationWarning, match="Fp8DirectDotGeneralOp"):
        nn.Fp8DotGeneralOp()
    x, k = jnp.ones((2, 3)), jnp.ones((3, 2))
    with pytest.warns(UserWarning, match="ignores yours"):
        fp8_ops.dot_general_with_precision(x, k, (((1,), (0,)), ((), ())), "highest")
