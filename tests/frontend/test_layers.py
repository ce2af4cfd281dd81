"""Each layer against Flax's, on drawn configurations: parameters, outputs and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff.frontend import linen as nn

few = settings(max_examples=6, deadline=None)
dtypes = st.sampled_from([None, "float32", "bfloat16"])


def array(shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.smoke
def test_dense_is_a_product_and_a_bias():
    x = array((2, 3, 4))
    variables = nn.Dense(5).init(jax.random.key(0), x)
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    assert (kernel.shape, bias.shape) == ((4, 5), (5,))
    np.testing.assert_allclose(nn.Dense(5).apply(variables, x), x @ kernel + bias, rtol=1e-5, atol=1e-6)


@few
@given(
    shape=st.sampled_from([(4,), (2, 4), (2, 3, 4)]),
    bias=st.booleans(),
    dtype=dtypes,
    param_dtype=st.sampled_from(["float32", "bfloat16"]),
    x_dtype=st.sampled_from(["float32", "bfloat16", "int32"]),
    init=st.sampled_from(["lecun_normal", "he_uniform", "xavier_normal"]),
)
def test_dense(same_as_flax, shape, bias, dtype, param_dtype, x_dtype, init):
    same_as_flax(
        lambda nn: nn.Dense(
            3,
            use_bias=bias,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=getattr(nn.initializers, init)(),
            bias_init=nn.initializers.normal(),
        ),
        array(shape, x_dtype),
    )


@few
@given(
    features=st.sampled_from([3, (3,), (2, 3)]),
    axis=st.sampled_from([-1, (-2, -1), (-1, -2), 2, (1, 3)]),
    batch_dims=st.sampled_from([(), (0,)]),
    bias=st.booleans(),
    dtype=dtypes,
)
def test_dense_general(same_as_flax, features, axis, batch_dims, bias, dtype):
    x = array((2, 3, 4, 5))
    same_as_flax(
        lambda nn: nn.DenseGeneral(features, axis=axis, batch_dims=batch_dims, use_bias=bias, dtype=dtype),
        x,
        rtol=2e-6,
    )


def test_dense_general_refuses_scattered_batch_dims():
    with pytest.raises(ValueError, match="consecutive leading"):
        nn.DenseGeneral(3, batch_dims=(1,)).init(jax.random.key(0), array((2, 3, 4)))


@few
@given(
    equation=st.sampled_from(["abc,cde->abde", "...c,cde->...de", "abc, acd -> abd", "abc,dc->abd", "abc,bcd->abd"]),
    bias=st.booleans(),
    at_call=st.booleans(),
)
def test_einsum(same_as_flax, equation, bias, at_call):
    sizes = dict(a=2, b=3, c=4, d=5, e=2)
    shape = tuple(sizes[letter] for letter in equation.split("->")[0].split(",")[1].strip())
    x = array((2, 3, 4))
    if at_call:
        same_as_flax(lambda nn: nn.Einsum(shape, use_bias=bias), x, equation, rtol=2e-6)
    else:
        same_as_flax(lambda nn: nn.Einsum(shape, equation, use_bias=bias), x, rtol=2e-6)


@pytest.mark.parametrize(
    ("equation", "shape"),
    [
        ("ab...,bc...->ac...", (3, 5, 4)),
        ("abd,bc...->ac...", (3, 5, 2)),
        ("a...d,ej...f->adef", (5, 2, 3, 6)),
        ("a...d,e...->a...e", (5, 3)),
        ("a...,b...->...ab", (5, 3, 4)),
        ("...,...->...", (3, 4)),
    ],
)
def test_einsum_with_unnamed_axes_of_the_kernel(same_as_flax, equation, shape):
    same_as_flax(lambda nn: nn.Einsum(shape, equation, bias_init=nn.initializers.normal()), array((2, 3, 4)), rtol=2e-6)


@few
@given(
    rows=st.sampled_from([1, 7]),
    shape=st.sampled_from([(), (3,), (2, 3)]),
    dtype=dtypes,
    param_dtype=st.sampled_from(["float32", "float16"]),
)
def test_embed(same_as_flax, rows, shape, dtype, param_dtype):
    if rows == 1 and shape == ():
        shape = (1,)  # Flax fails here
    ids = jnp.asarray(np.random.default_rng(1).integers(0, rows, shape))
    variables = same_as_flax(lambda nn: nn.Embed(rows, 4, dtype=dtype, param_dtype=param_dtype), ids)
    query = array((2, 4))
    logits = nn.Embed(rows, 4).apply(variables, query, method="attend")
    np.testing.assert_allclose(logits, query @ variables["params"]["embedding"].T, rtol=1e-2, atol=1e-2)


def test_embed_refuses_floats():
    with pytest.raises(ValueError, match="must be an integer"):
        nn.Embed(3, 4).init(jax.random.key(0), array((2,)))


norm_options = st.fixed_dictionaries(
    dict(
        epsilon=st.sampled_from([1e-6, 1e-2]),
        dtype=dtypes,
        param_dtype=st.sampled_from(["float32", "bfloat16"]),
        use_scale=st.booleans(),
        use_fast_variance=st.booleans(),
        force_float32_reductions=st.booleans(),
    )
)


@few
@given(
    kind=st.sampled_from(["LayerNorm", "RMSNorm"]),
    options=norm_options,
    axes=st.sampled_from([(-1, -1), ((1, 2), -1), ((-1, -2), (1, 2)), (1, (0, 2))]),
    masked=st.booleans(),
    x_dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_layer_and_rms_norm(same_as_flax, kind, options, axes, masked, x_dtype):
    options = dict(options, reduction_axes=axes[0], feature_axes=axes[1])
    mask = jnp.arange(24).reshape(2, 3, 4) % 3 < 2 if masked else None
    same_as_flax(
        lambda nn: getattr(nn, kind)(**options), array((2, 3, 4), x_dtype), mask=mask, rtol=5e-6, gradients=not masked
    )


@few
@given(
    options=norm_options,
    groups=st.sampled_from([dict(num_groups=2), dict(num_groups=None, group_size=2), dict(num_groups=1)]),
    masked=st.booleans(),
)
def test_group_norm(same_as_flax, options, groups, masked):
    mask = jnp.arange(48).reshape(2, 6, 4) % 7 < 5 if masked else None
    same_as_flax(
        lambda nn: nn.GroupNorm(**groups, **options), array((2, 6, 4)), mask=mask, rtol=5e-6, gradients=not masked
    )


@pytest.mark.parametrize(
    "groups", [dict(num_groups=3), dict(num_groups=None), dict(group_size=2), dict(num_groups=None, group_size=3)]
)
def test_group_norm_refuses_groups_that_do_not_divide(groups):
    with pytest.raises(ValueError, match="group"):
        nn.GroupNorm(**groups).init(jax.random.key(0), array((2, 4)))


@few
@given(
    options=norm_options,
    axes=st.sampled_from([-1, 1, (1, 2)]),
    masked=st.booleans(),
    use_bias=st.booleans(),
)
def test_instance_norm(same_as_flax, options, axes, masked, use_bias):
    mask = jnp.arange(96).reshape(2, 3, 4, 4) % 7 < 5 if masked else None
    same_as_flax(
        lambda nn: nn.InstanceNorm(feature_axes=axes, use_bias=use_bias, **options),
        array((2, 3, 4, 4)),
        mask=mask,
        rtol=5e-6,
        gradients=not masked,
    )


def test_instance_norm_refuses_the_batch_axis(flax_nn):
    for library in (nn, flax_nn):
        with pytest.raises(ValueError, match="batch"):
            library.InstanceNorm(feature_axes=(0, -1)).init(jax.random.key(0), array((2, 3, 4)))


def test_axes_out_of_range_are_refused():
    for layer in (nn.LayerNorm(reduction_axes=3), nn.DenseGeneral(2, axis=-4), nn.BatchNorm(True, axis=3)):
        with pytest.raises(ValueError, match="out of range"):
            layer.init(jax.random.key(0), array((2, 3, 4)))


@few
@given(options=norm_options, axis=st.sampled_from([-1, 1, (0, 2)]), average=st.booleans(), momentum=st.just(0.9))
def test_batch_norm(same_as_flax, options, axis, average, momentum):
    def build(nn):
        return nn.BatchNorm(use_running_average=average, axis=axis, momentum=momentum, **options)

    same_as_flax(build, array((2, 3, 4)), mutable=["batch_stats"], rtol=5e-6)


def test_norms_average_over_a_mapped_axis():
    x = array((4, 6, 3))

    def norm(axis_name):
        return nn.BatchNorm(use_running_average=False, axis_name=axis_name)

    variables = norm(None).init(jax.random.key(0), x[0])
    whole, stats = norm(None).apply(variables, x, mutable=["batch_stats"])
    split, split_stats = jax.vmap(
        lambda part: norm("shards").apply(variables, part, mutable=["batch_stats"]), axis_name="shards"
    )(x)
    np.testing.assert_allclose(split, whole, atol=1e-5)
    np.testing.assert_allclose(split_stats["batch_stats"]["var"][2], stats["batch_stats"]["var"], rtol=1e-5)


def test_norms_of_complex_input(same_as_flax):
    x = array((2, 3)) + 1j * array((2, 3), seed=1)
    same_as_flax(lambda nn: nn.LayerNorm(use_fast_variance=False), x, gradients=False, rtol=5e-6)


@few
@given(rate=st.sampled_from([0.0, 0.3, 1.0]), dims=st.sampled_from([(), (0,), (-1,)]), deterministic=st.booleans())
def test_dropout(same_as_flax, rate, dims, deterministic):
    def build(nn):
        class Twice(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.Dropout(rate, broadcast_dims=dims, deterministic=deterministic)(x)
                return nn.Dropout(rate, rng_collection="noise")(x, deterministic=deterministic)

        return Twice()

    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1), "noise": jax.random.key(2)}
    same_as_flax(build, array((3, 4)), rngs=keys, gradients=False)


@pytest.mark.smoke
def test_dropout_keeps_the_mean():
    x = jnp.ones((200, 200))
    y = nn.Dropout(0.25, deterministic=False).apply({}, x, rngs={"dropout": jax.random.key(0)})
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs(float(y.mean()) - 1) < 0.02


def test_sequential_passes_tuples_and_dicts_on(same_as_flax):
    def build(nn):
        layers = [nn.Dense(3), lambda x: (x, 2 * x), lambda x, y: {"a": x, "b": y}, lambda a, b: a + b, nn.Dense(2)]
        return nn.Sequential(layers)

    same_as_flax(build, array((2, 4)))
    with pytest.raises(ValueError, match="must be a sequence"):
        nn.Sequential(nn.Dense(3))
    with pytest.raises(ValueError, match="Empty"):
        nn.Sequential([]).init(jax.random.key(0), 1)


def test_activations_are_those_of_jax(flax_nn):
    x = array((3, 4))
    names = (
        "celu elu gelu glu hard_silu leaky_relu log_softmax relu relu6 selu sigmoid silu softmax softplus swish tanh"
    )
    for name in names.split():
        np.testing.assert_array_equal(getattr(nn, name)(x), getattr(flax_nn, name)(x))


@few
@given(x_dtype=st.sampled_from(["float32", "bfloat16", "int32"]), slope=st.sampled_from([0.01, 0.3]))
def test_prelu(same_as_flax, x_dtype, slope):
    x = (3 * array((2, 5))).astype(x_dtype)
    same_as_flax(lambda nn: nn.PReLU(negative_slope_init=slope), x)
    same_as_flax(lambda nn: nn.PReLU(param_dtype=jnp.bfloat16), x)


@few
@given(num_dims=st.sampled_from([1, 2, 3]), drawn=st.sampled_from([(2, 3), (2, 3, 1)]))
def test_batch_apply(flax_nn, num_dims, drawn):
    x, y = array((2, 3, 1, 4)), array((*drawn, 4), seed=1)

    def f(x, scale, *, others):
        return {"sum": x + scale, "others": [2 * other for other in others]}

    results = [
        library.BatchApply(f, num_dims)(x, jnp.float32(2.0), others=(y,) if num_dims < 3 else (x,))
        for library in (nn, flax_nn)
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)
    for library in (nn, flax_nn):
        with pytest.raises(ValueError, match=r"at least|ndim"):
            library.BatchApply(f, 5)(x, 1.0, others=())


def test_batch_apply_of_a_module():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchApply(nn.Dense(3))(x)

    x = array((2, 3, 4))
    variables = Net().init(jax.random.key(0), x)
    kernel = variables["params"]["Dense_0"]["kernel"]
    np.testing.assert_allclose(Net().apply(variables, x), x @ kernel, rtol=1e-5, atol=1e-6)


@settings(max_examples=6, deadline=None)
@given(
    heads=st.sampled_from([1, 2]),
    options=st.fixed_dictionaries(
        dict(
            qkv_features=st.sampled_from([None, 8]),
            out_features=st.sampled_from([None, 3]),
            normalize_qk=st.booleans(),
            use_bias=st.booleans(),
            dtype=dtypes,
            force_fp32_for_softmax=st.booleans(),
        )
    ),
    cross=st.booleans(),
    causal=st.booleans(),
)
def test_multi_head_attention(same_as_flax, heads, options, cross, causal):
    x = array((2, 5, 4))
    other = array((2, 5, 6), seed=2) if cross else None
    mask = nn.make_causal_mask(jnp.ones((2, 5))) if causal else None
    same_as_flax(
        lambda nn: nn.MultiHeadDotProductAttention(heads, **options),
        x,
        other,
        mask=mask,
        rtol=5e-6,
        gradients=cross and causal,
    )


@pytest.mark.filterwarnings("ignore:SelfAttention")
@pytest.mark.parametrize("broadcast", [True, False])
def test_attention_dropout_and_sown_weights(same_as_flax, broadcast):
    def build(nn):
        return nn.SelfAttention(2, dropout_rate=0.4, broadcast_dropout=broadcast)

    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    x = array((2, 5, 4))
    same_as_flax(build, x, rngs=keys, deterministic=False, rtol=5e-6)
    same_as_flax(build, x, rngs=keys, deterministic=True, sow_weights=True, mutable=["intermediates"], rtol=5e-6)


def test_decoding_with_a_cache_equals_one_causal_pass():
    x = array((2, 5, 4))
    decoder = nn.MultiHeadDotProductAttention(2, decode=True)
    variables = decoder.init(jax.random.key(0), x)
    assert variables["cache"]["cached_key"].shape == (2, 5, 2, 2)
    whole = nn.MultiHeadDotProductAttention(2).apply(
        {"params": variables["params"]}, x, mask=nn.make_causal_mask(x[..., 0])
    )
    cache = variables["cache"]
    for i in range(5):
        state = {"params": variables["params"], "cache": cache}
        y, updates = decoder.apply(state, x[:, i : i + 1], mutable=["cache"])
        cache = updates["cache"]
        np.testing.assert_allclose(y[:, 0], whole[:, i], atol=1e-5)
    with pytest.raises(ValueError, match="one token a call"):
        decoder.apply({"params": variables["params"], "cache": cache}, x, mutable=["cache"])


def test_decoding_keeps_the_cache_of_flax(flax_nn):
    x = array((2, 3, 4))
    results = []
    for library in (nn, flax_nn):
        decoder = library.MultiHeadDotProductAttention(2, decode=True)
        variables = decoder.init(jax.random.key(0), x)
        outputs = [variables]
        for i in range(2):
            y, updates = decoder.apply(variables, x[:, i : i + 1], mutable=["cache"])
            variables = {"params": variables["params"], **updates}
            outputs += [y, updates]
        results.append(outputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)


def test_attention_passes_on_what_its_function_takes(same_as_flax):
    def uniform(query, key, value, mask=None):
        assert mask is None
        return jnp.broadcast_to(value.mean(-3, keepdims=True), (*query.shape[:-1], value.shape[-1]))

    same_as_flax(
        lambda nn: nn.MultiHeadAttention(2, attention_fn=uniform, dropout_rate=0.1),
        array((2, 5, 4)),
        deterministic=True,
    )


def test_misused_attention_has_the_error_class_of_flax(flax_nn):
    x = array((2, 5, 4))
    q = array((2, 5, 2, 4))
    for library in (nn, flax_nn):
        layer = library.MultiHeadDotProductAttention(2, dropout_rate=0.1)
        for misuse in (
            lambda layer=layer: layer.init(jax.random.key(0), x),  # deterministic is missing
            lambda layer=layer: layer.init(jax.random.key(0), x, x, inputs_kv=x, deterministic=True),
            lambda layer=layer: layer.init(jax.random.key(0), x, None, x, deterministic=True),
            lambda library=library: library.dot_product_attention(q, q, q, qk_attn_weights_einsum=jnp.einsum),
            lambda library=library: library.dot_product_attention_weights(q, q, precision="highest", einsum=jnp.einsum),
        ):
            with pytest.raises(ValueError):
                misuse()
        with pytest.warns(DeprecationWarning, match="mask"):
            library.MultiHeadDotProductAttention(2).init(jax.random.key(0), x, x, array((2, 4, 4)[:1] + (5, 5)))


def test_dot_product_attention_with_bias_and_grouped_batches(flax_nn):
    q, k, v = array((2, 3, 4, 2, 5)), array((2, 3, 6, 2, 5), seed=1), array((2, 3, 6, 2, 7), seed=2)
    bias = array((2, 3, 2, 4, 6), seed=3)
    np.testing.assert_allclose(
        nn.dot_product_attention(q, k, v, bias=bias), flax_nn.dot_product_attention(q, k, v, bias=bias), atol=1e-6
    )
    with pytest.raises(ValueError, match="heads and depth"):
        nn.dot_product_attention(q, k[..., :1, :], v[..., :1, :])


def test_masks(flax_nn):
    tokens = jnp.array([[1, 1, 0], [1, 0, 0]])
    for make in (
        lambda nn: nn.make_attention_mask(tokens > 0, tokens > 0, extra_batch_dims=1, dtype=bool),
        lambda nn: nn.make_causal_mask(tokens, extra_batch_dims=2),
        lambda nn: nn.combine_masks(nn.make_causal_mask(tokens), None, nn.make_attention_mask(tokens, tokens)),
    ):
        ours, theirs = make(nn), make(flax_nn)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert nn.combine_masks(None, None) is None
