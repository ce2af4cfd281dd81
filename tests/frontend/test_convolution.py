"""Convolutions and pooling against Flax's, on drawn configurations, and against sums written out in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff.frontend import linen as nn

few = settings(max_examples=5, deadline=None)
dtypes = st.sampled_from([None, None, "bfloat16"])


def array(shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@st.composite
def convolutions(draw):
    """Fields of Conv and the shape of an input."""
    rank = draw(st.sampled_from([1, 2]))
    batch = draw(st.sampled_from([(2,), (), (2, 3)]))
    groups = draw(st.sampled_from([1, 1, 2]))
    sizes = [1, 2, 3, 4]
    per_axis = st.sampled_from([1, 2, (2,) * rank])
    options = dict(
        features=4,
        kernel_size=tuple(draw(st.sampled_from(sizes)) for _ in range(rank)),
        strides=draw(st.sampled_from([None, 1, 2, (2,) * rank])),
        padding=draw(
            st.sampled_from(
                ["SAME", "VALID", "CIRCULAR", "REFLECT", 1, [(1, 2)] * rank, (2,) * rank] + ["CAUSAL"] * (2 - rank)
            )
        ),
        input_dilation=draw(st.sampled_from([None, 1, 2])),
        kernel_dilation=draw(per_axis),
        feature_group_count=groups,
        use_bias=draw(st.booleans()),
        dtype=draw(dtypes),
        bias_init=jax.nn.initializers.normal(),
    )
    if options["input_dilation"] == 2 and isinstance(options["padding"], str):
        options["padding"] = 1  # lax has no names for these
    return options, (*batch, *(9, 8)[:rank], 2)


@few
@given(drawn=convolutions(), masked=st.booleans())
def test_conv(same_as_flax, drawn, masked):
    options, shape = drawn
    if masked:
        kernel_shape = (*options["kernel_size"], 2 // options["feature_group_count"], 4)
        options["mask"] = jnp.asarray(np.random.default_rng(0).integers(0, 2, kernel_shape), "float32")
    same_as_flax(lambda nn: nn.Conv(**options), array(shape), rtol=5e-6)


@settings(max_examples=4, deadline=None)
@given(drawn=convolutions())
def test_conv_local(same_as_flax, drawn):
    options, shape = drawn
    options["feature_group_count"] = 1
    same_as_flax(lambda nn: nn.ConvLocal(**options), array(shape), rtol=5e-6)


@few
@given(
    rank=st.sampled_from([1, 2]),
    size=st.sampled_from([1, 2, 3, 4, 7]),
    stride=st.sampled_from([None, 1, 2, 3]),
    padding=st.sampled_from(["SAME", "VALID", "CIRCULAR", "CIRCULAR", 1]),
    dilation=st.sampled_from([None, 2]),
    transpose=st.booleans(),
    bias=st.booleans(),
    dtype=dtypes,
    batch=st.sampled_from([(2,), (), (2, 3)]),
)
def test_conv_transpose(same_as_flax, rank, size, stride, padding, dilation, transpose, bias, dtype, batch):
    def build(nn):
        return nn.ConvTranspose(
            4,
            (size,) * rank,
            strides=stride and (stride,) * rank,
            padding=padding,
            kernel_dilation=dilation and (dilation,) * rank,
            transpose_kernel=transpose,
            use_bias=bias,
            dtype=dtype,
        )

    same_as_flax(build, array((*batch, *(5, 4)[:rank], 3)), rtol=5e-6)


@pytest.mark.smoke
@settings(max_examples=5, deadline=None)
@given(kernel=st.integers(1, 5), dilation=st.integers(1, 3))
def test_circular_conv_is_a_sum_around_the_circle(kernel, dilation):
    layer = nn.Conv(3, kernel, padding="CIRCULAR", kernel_dilation=dilation, use_bias=False)
    x = array((2, 7, 2))
    variables = layer.init(jax.random.key(0), x)
    weights = np.asarray(variables["params"]["kernel"], np.float64)
    first = (dilation * (kernel - 1)) // 2
    expected = sum(np.roll(x, first - k * dilation, axis=1).astype(np.float64) @ weights[k] for k in range(kernel))
    np.testing.assert_allclose(layer.apply(variables, x), expected, atol=1e-5)


def test_causal_conv_sees_no_later_element():
    layer = nn.Conv(3, (3,), padding="CAUSAL", kernel_dilation=2)
    x = array((1, 9, 2))
    variables = layer.init(jax.random.key(0), x)
    later = x.at[:, 5:].add(1.0)
    before, after = (layer.apply(variables, value)[:, :5] for value in (x, later))
    np.testing.assert_array_equal(before, after)


def test_transposed_circular_conv_is_the_transpose_of_conv():
    conv = nn.Conv(4, (3, 3), strides=2, padding="CIRCULAR", use_bias=False)
    x, y = array((1, 6, 6, 3)), array((1, 3, 3, 4), seed=1)
    variables = conv.init(jax.random.key(0), x)
    (expected,) = jax.linear_transpose(lambda x: conv.apply(variables, x), x)(y)
    back = nn.ConvTranspose(3, (3, 3), (2, 2), padding="CIRCULAR", use_bias=False, transpose_kernel=True)
    np.testing.assert_allclose(back.apply(variables, y), expected, atol=1e-5)


def test_conv_calls_its_replacement(same_as_flax):
    def twice(*args, **kwargs):
        return 2 * jax.lax.conv_general_dilated(*args, **kwargs)

    same_as_flax(lambda nn: nn.Conv(4, (3,), conv_general_dilated=twice), array((2, 5, 3)), rtol=5e-6)
    same_as_flax(lambda nn: nn.Conv(4, (3,), conv_general_dilated_cls=lambda: twice), array((2, 5, 3)), rtol=5e-6)


@pytest.mark.parametrize(
    ("misuse", "error"),
    [
        (lambda nn: nn.Conv(4, (3,), mask=jnp.ones((2, 2))), ValueError),
        (lambda nn: nn.Conv(4, (3,), padding=[(1, 2, 3)]), ValueError),
        (lambda nn: nn.Conv(4, (3,), padding=[1, 1]), ValueError),
        (lambda nn: nn.ConvLocal(4, (3,), mask=jnp.ones((2, 2))), ValueError),
        (lambda nn: nn.ConvLocal(4, (3,), feature_group_count=3), NotImplementedError),
        (lambda nn: nn.ConvTranspose(4, (3,), mask=jnp.ones((2, 2))), ValueError),
        (lambda nn: nn.ConvTranspose(4, (3,), padding=[1, 1]), ValueError),
    ],
)
def test_misuse_has_the_error_class_of_flax(flax_nn, misuse, error):
    for library in (nn, flax_nn):
        with pytest.raises(error):
            misuse(library).init(jax.random.key(0), array((2, 5, 3)))


def test_misuse_that_flax_asserts_or_mistakes():
    for layer, x in (
        (nn.Conv(4, (3,), feature_group_count=2), array((2, 5, 3))),
        (nn.Conv(4, (3, 3), padding="CAUSAL"), array((2, 5, 5, 3))),
        (nn.Conv(4, (3, 3)), array((5, 3))),
    ):
        with pytest.raises(ValueError):
            layer.init(jax.random.key(0), x)


@few
@given(
    kind=st.sampled_from(["avg_pool", "max_pool", "min_pool"]),
    window=st.sampled_from([(2,), (3, 2), (1, 1)]),
    stride=st.sampled_from([None, 1, 2]),
    padding=st.sampled_from(["VALID", "SAME", "pairs"]),
    batch=st.sampled_from([(), (2,)]),
    count=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_pooling(flax_nn, compiled, kind, window, stride, padding, batch, count, dtype):
    x = array((*batch, *(7, 6)[: len(window)], 3), dtype)
    options = dict(strides=stride and (stride,) * len(window))
    options["padding"] = [(1, 2)] * len(window) if padding == "pairs" else padding
    if kind == "avg_pool":
        options["count_include_pad"] = count

    def results(library):
        def run(x):
            y = getattr(library.pooling, kind)(x, window, **options)
            return jnp.nansum(jnp.sin(y)), y

        (_, y), gradient = compiled(jax.value_and_grad(run, has_aux=True), x)
        return y, gradient

    for ours, theirs in zip(results(nn), results(flax_nn), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.smoke
def test_pooling_over_several_batch_axes_with_padding():
    x = array((2, 3, 4, 5, 2))
    y = nn.max_pool(x, (2, 2), padding=[(1, 0), (0, 1)])
    padded = np.pad(x, [(0, 0), (0, 0), (1, 0), (0, 1), (0, 0)], constant_values=-np.inf)
    for i, j in itertools.product(range(4), range(5)):
        np.testing.assert_array_equal(y[:, :, i, j], padded[:, :, i : i + 2, j : j + 2].max((2, 3)))


@pytest.mark.parametrize(
    "arguments", [((2, 2), (1,), "VALID"), ((2, 2), None, [(1, 1)]), ((2, 2, 2), None, "VALID"), ((2,), None, [(1,)])]
)
def test_pooling_refuses_what_does_not_fit(arguments):
    with pytest.raises(ValueError):
        nn.max_pool(array((4, 5, 2)), *arguments)


def test_a_convolutional_network_trains():
    """The layers of an image classifier together: loss falls in a few steps of gradient descent."""

    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3))(x)))
            x = nn.avg_pool(nn.PReLU()(nn.Conv(8, (3, 3), strides=2)(x)), (2, 2))
            return nn.Dense(2)(x.reshape(x.shape[0], -1))

    x = array((16, 8, 8, 1))
    labels = (x.mean((1, 2, 3)) > 0).astype(int)
    model = Classifier()
    variables = model.init(jax.random.key(0), x, train=False)

    @jax.jit
    def step(variables):
        def loss_fn(params):
            state = {"params": params, "batch_stats": variables["batch_stats"]}
            logits, updates = model.apply(state, x, train=True, mutable=["batch_stats"])
            return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(16), labels]), updates

        (loss, updates), gradients = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.3 * g, variables["params"], gradients)
        return loss, {"params": params, **updates}

    losses = []
    for _ in range(20):
        loss, variables = step(variables)
        losses.append(float(loss))
    assert losses[-1] < 0.3 * losses[0], losses
