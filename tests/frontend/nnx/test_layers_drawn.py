"""Layers with drawn configurations, against Flax's: state, outputs, gradients and updates."""

import functools

import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

drawn = functools.partial(
    settings, max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)()
DTYPES = st.sampled_from([{}, {}, {"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}])


def data(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


@drawn
@given(use_bias=st.booleans(), dtypes=DTYPES, accumulate=st.booleans(), batch=st.lists(st.integers(1, 3), max_size=2))
def test_linear(same_layer, use_bias, dtypes, accumulate, batch):
    options = {"use_bias": use_bias, **dtypes} | ({"preferred_element_type": jnp.float32} if accumulate else {})
    same_layer(lambda lib, rngs: lib.Linear(4, 6, rngs=rngs, **options), data(*batch, 4))


@st.composite
def general(draw):
    """Arguments of ``LinearGeneral`` and the shape of an input."""
    batch = draw(st.integers(0, 2))
    others = draw(st.integers(0, 1))
    contracted = draw(st.integers(1, 2))
    shape = [draw(st.integers(1, 3)) for _ in range(batch + others + contracted)]
    axes = list(range(len(shape)))[batch:][-contracted:]
    options = {"axis": tuple(a - draw(st.sampled_from([0, len(shape)])) for a in axes)} if contracted > 1 else {}
    features = draw(st.one_of(st.integers(1, 3), st.lists(st.integers(1, 3), min_size=1, max_size=2)))
    sizes = tuple(shape[a] for a in axes)
    return (
        sizes if contracted > 1 else sizes[0],
        features,
        {"batch_axis": dict(enumerate(shape[:batch])), **options},
        shape,
    )


@drawn
@given(general(), st.booleans(), DTYPES)
def test_linear_general(same_layer, arguments, use_bias, dtypes):
    inputs, features, options, shape = arguments
    options = {"use_bias": use_bias, **options, **dtypes}
    same_layer(lambda lib, rngs: lib.LinearGeneral(inputs, features, rngs=rngs, **options), data(*shape))


EQUATIONS = [
    ("nta,hab->nthb", (2, 4, 3), (2, 3), (2, 3, 4)),
    ("...a,ab->...b", (4, 5), (5,), (2, 1, 4)),
    ("ba, bac -> bc", (2, 4, 3), None, (2, 4)),
    ("abc,cd->adb", (4, 3), (3,), (2, 1, 4)),
]


@drawn
@given(st.sampled_from(EQUATIONS), st.booleans(), DTYPES)
def test_einsum(same_layer, case, has_bias, dtypes):
    equation, kernel, bias, shape = case
    bias = bias if has_bias else None
    same_layer(lambda lib, rngs: lib.Einsum(equation, kernel, bias, rngs=rngs, **dtypes), data(*shape))


@st.composite
def convolution(draw, transposed):
    """Arguments of a convolution and the shape of an input."""
    rank = draw(st.integers(1, 2))
    per_axis = st.one_of(st.integers(1, 2), st.lists(st.integers(1, 2), min_size=rank, max_size=rank).map(tuple))
    kernel_size = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    modes = ["SAME", "VALID", "CIRCULAR", 1, [(1, 0)] * rank, [1] * rank]
    if not transposed:
        modes += ["REFLECT"] + ["CAUSAL"] * (rank == 1)
    options = {
        "padding": draw(st.sampled_from(modes)),
        "strides": draw(st.one_of(st.none(), per_axis)),
        "kernel_dilation": draw(st.one_of(st.none(), per_axis)),
        "use_bias": draw(st.booleans()),
    }
    if transposed:
        options["transpose_kernel"] = draw(st.booleans())
    else:
        options["feature_group_count"] = draw(st.sampled_from([1, 2]))
        if not isinstance(options["padding"], str):  # which lax refuses together
            options["input_dilation"] = draw(st.one_of(st.none(), per_axis))
    if draw(st.booleans()):
        channels = (4 if options.get("transpose_kernel") else 2 // options.get("feature_group_count", 1),)
        channels += (2 if options.get("transpose_kernel") else 4,)
        options["mask"] = jnp.asarray(np.arange(np.prod(kernel_size + channels)).reshape(kernel_size + channels) % 2)
    batch = [draw(st.integers(1, 2)) for _ in range(draw(st.integers(0, 2)))]
    return kernel_size, options, [*batch, *(draw(st.integers(5, 7)) for _ in range(rank)), 2]


@drawn
@given(convolution(transposed=False), DTYPES)
def test_conv(same_layer, arguments, dtypes):
    kernel_size, options, shape = arguments
    same_layer(lambda lib, rngs: lib.Conv(2, 4, kernel_size, rngs=rngs, **options, **dtypes), data(*shape))


@drawn
@given(convolution(transposed=True), DTYPES)
def test_conv_transpose(same_layer, arguments, dtypes):
    kernel_size, options, shape = arguments
    same_layer(lambda lib, rngs: lib.ConvTranspose(2, 4, kernel_size, rngs=rngs, **options, **dtypes), data(*shape))


NORMS = {
    "BatchNorm": [{}, {"axis": 1, "num_features": 3}, {"use_running_average": True}, {"momentum": 0.5}],
    "LayerNorm": [{}, {"reduction_axes": (1, 2)}, {"feature_axes": -2, "num_features": 3}, {"use_bias": False}],
    "RMSNorm": [{}, {"reduction_axes": (1, -1)}, {"feature_axes": 1, "num_features": 3}],
    "GroupNorm": [{"num_groups": 2}, {"num_groups": None, "group_size": 2}, {"num_groups": 4}],
    "InstanceNorm": [{}, {"feature_axes": 1, "num_features": 3}, {"use_bias": False}],
}


@settings(drawn, max_examples=20)
@given(
    st.sampled_from([(name, options) for name, all_options in NORMS.items() for options in all_options]),
    DTYPES,
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_norms(same_layer, case, dtypes, use_scale, fast, masked):
    name, options = case
    options = {"num_features": 4, "use_scale": use_scale, "use_fast_variance": fast, **options, **dtypes}
    mask = jnp.arange(24).reshape(2, 3, 4) % 5 > 0 if masked else None
    same_layer(
        lambda lib, rngs: getattr(lib, name)(rngs=rngs, **options),
        data(2, 3, 4),
        call=lambda layer, x: layer(layer(x, mask=mask), mask=mask),
        rtol=1e-5,
    )


@drawn
@given(
    heads=st.sampled_from([(2, 2), (4, 2), (4, 1)]),
    depth=st.sampled_from([2, 3]),
    masked=st.booleans(),
    is_causal=st.booleans(),
    normalize_qk=st.booleans(),
    cross=st.booleans(),
    sow=st.booleans(),
    batch=st.sampled_from([(), (2,), (2, 1)]),
    dtypes=DTYPES,
)
def test_attention(same_layer, heads, depth, masked, is_causal, normalize_qk, cross, sow, batch, dtypes):
    (heads, kv_heads), length = heads, 4
    options = {"num_kv_heads": kv_heads, "normalize_qk": normalize_qk, "in_kv_features": 3 if cross else None}
    mask = (jnp.arange(length * length).reshape(length, length) % 3 > 0) | jnp.eye(length, dtype=bool)
    mask = jnp.broadcast_to(mask, (*batch, 1, length, length)) if masked else None
    inputs = (data(*batch, length, 5), *([data(*batch, length, 3)] if cross else []))
    same_layer(
        lambda lib, rngs: lib.MultiHeadAttention(
            heads, 5, heads * depth, 6, decode=False, rngs=rngs, **options, **dtypes
        ),
        *inputs,
        call=lambda layer, *x: layer(*x, mask=mask, is_causal=is_causal, sow_weights=sow),
    )


@settings(drawn, max_examples=12)
@given(
    st.sampled_from(["SimpleCell", "GRUCell", "LSTMCell", "OptimizedLSTMCell"]),
    DTYPES,
    st.lists(st.integers(1, 3), max_size=2),
    st.booleans(),
)
def test_cells(same_layer, name, dtypes, batch, residual):
    options = {"residual": residual} if name == "SimpleCell" else {}
    if name != "LSTMCell":  # JAX has no orthogonal matrices in bfloat16 on CPUs
        dtypes = {key: value for key, value in dtypes.items() if key != "param_dtype"}

    def two_steps(cell, x):
        carry = cell.initialize_carry(x.shape, cell.Rngs(5), lambda key, shape, dtype: jnp.full(shape, 0.5, dtype))
        carry, _ = cell(carry, x)
        return cell(carry, 2 * x)

    def build(lib, rngs):
        cell = getattr(lib, name)(3, 4, rngs=rngs, **options, **dtypes)
        cell.Rngs = lib.Rngs
        return cell

    same_layer(build, data(*batch, 3), call=two_steps)
