"""Recurrent cells and networks against Flax's, on drawn configurations, and against loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff.frontend import linen as nn
from distaff.frontend.linen import recurrent

few = settings(max_examples=4, deadline=None)
VECTOR_CELLS = ["SimpleCell", "GRUCell", "MGUCell", "LSTMCell", "OptimizedLSTMCell"]


def array(shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def carry_like(cell, x):
    """A carry away from zero, as it is after some steps."""
    carry = cell.initialize_carry(jax.random.key(5), x.shape)
    return jax.tree.map(lambda c: c + array(c.shape, c.dtype, seed=3) / 2, carry)


@settings(max_examples=6, deadline=None)
@given(
    kind=st.sampled_from(VECTOR_CELLS),
    dtype=st.sampled_from([None, "bfloat16"]),
    param_dtype=st.sampled_from(["float32", "bfloat16"]),
    batch=st.sampled_from([(), (2,), (2, 3)]),
    switch=st.booleans(),
)
def test_cells(same_as_flax, kind, dtype, param_dtype, batch, switch):
    options = dict(dtype=dtype, param_dtype=param_dtype, recurrent_kernel_init=jax.nn.initializers.lecun_normal())
    if kind == "SimpleCell":
        options["residual"] = switch
    elif kind == "MGUCell":
        options["reset_gate"] = switch
    else:
        options["bias_init"] = jax.nn.initializers.normal()
    if switch and kind != "SimpleCell":
        options["gate_fn"] = jax.nn.hard_sigmoid
    x = array((*batch, 3))
    carry = carry_like(getattr(nn, kind)(4, **options), x)
    same_as_flax(lambda nn: getattr(nn, kind)(4, **options), carry, x, rtol=5e-6)


@pytest.mark.parametrize("kind", VECTOR_CELLS)
def test_default_initialisers_and_carries(flax_nn, kind):
    x = array((2, 3))
    cells = [getattr(library, kind)(4, carry_init=jax.nn.initializers.normal()) for library in (nn, flax_nn)]
    carries = [cell.initialize_carry(jax.random.key(1), x.shape) for cell in cells]
    variables = [cell.init(jax.random.key(0), carry, x) for cell, carry in zip(cells, carries, strict=True)]
    jax.tree.map(np.testing.assert_array_equal, carries[0], carries[1])
    jax.tree.map(np.testing.assert_array_equal, variables[0], variables[1])
    assert cells[0].num_feature_axes == cells[1].num_feature_axes == 1


@settings(max_examples=4, deadline=None)
@given(
    size=st.sampled_from([(3,), (2, 3)]),
    bias=st.booleans(),
    strides=st.sampled_from([None, 1]),
    padding=st.sampled_from(["SAME", "CIRCULAR"]),
)
def test_conv_lstm(same_as_flax, size, bias, strides, padding):
    x = array((2, 5, 4, 3)[: 1 + len(size)] + (3,))

    def build(nn):
        return nn.ConvLSTMCell(2, size, strides and (strides,) * len(size), padding, bias)

    cell = build(nn)
    assert cell.num_feature_axes == len(size) + 1
    same_as_flax(build, carry_like(cell, x), x, rtol=5e-6)


def test_optimized_lstm_takes_the_parameters_of_lstm():
    x = array((2, 3))
    carry = carry_like(nn.LSTMCell(4), x)
    variables = nn.LSTMCell(4).init(jax.random.key(0), carry, x)
    slow, fast = (cell.apply(variables, carry, x)[1] for cell in (nn.LSTMCell(4), nn.OptimizedLSTMCell(4)))
    np.testing.assert_allclose(slow, fast, atol=1e-6)


@pytest.mark.smoke
def test_lstm_is_its_equations_in_float64():
    x, layer = array((3,)), nn.LSTMCell(4)
    carry = carry_like(layer, x)
    params = layer.init(jax.random.key(0), carry, x)["params"]
    p = jax.tree.map(lambda v: np.asarray(v, np.float64), params)
    c, h = (np.asarray(v, np.float64) for v in carry)

    def gate(name):
        return x @ p[f"i{name}"]["kernel"] + h @ p[f"h{name}"]["kernel"] + p[f"h{name}"]["bias"]

    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    c = sigmoid(gate("f")) * c + sigmoid(gate("i")) * np.tanh(gate("g"))
    h = sigmoid(gate("o")) * np.tanh(c)
    new_carry, y = layer.apply({"params": params}, carry, x)
    np.testing.assert_allclose(new_carry[0], c, atol=1e-6)
    np.testing.assert_allclose(y, h, atol=1e-6)


def test_cells_without_the_methods_that_rnn_needs():
    class Cell(nn.RNNCellBase):
        pass

    with pytest.raises(NotImplementedError, match="initialize_carry"):
        Cell().initialize_carry(jax.random.key(0), (2, 3))
    with pytest.raises(NotImplementedError, match="num_feature_axes"):
        _ = Cell().num_feature_axes


@few
@given(
    batch=st.sampled_from([(), (3,), (2, 3)]),
    time_major=st.booleans(),
    lengths=st.booleans(),
    features=st.sampled_from([(), (2,)]),
)
def test_flip_sequences(batch, time_major, lengths, features):
    time = 5
    rng = np.random.default_rng(0)
    x = rng.standard_normal((*batch, time, *features))
    seq_lengths = rng.integers(1, time + 1, batch) if lengths else None
    expected = x.copy()
    for index in np.ndindex(*batch):
        n = time if seq_lengths is None else seq_lengths[index]
        expected[index][:n] = x[index][:n][::-1]
    given = np.moveaxis(x, len(batch), 0) if time_major else x
    lengths = None if seq_lengths is None else jnp.asarray(seq_lengths)
    flipped = recurrent.flip_sequences(jnp.asarray(given), lengths, len(batch), time_major)
    flipped = np.moveaxis(flipped, 0, len(batch)) if time_major else np.asarray(flipped)
    counted = np.ones((*batch, time), bool) if lengths is None else np.arange(time) < seq_lengths[..., None]
    np.testing.assert_allclose(flipped[counted], expected[counted], rtol=1e-6)


@settings(max_examples=6, deadline=None)
@given(
    kind=st.sampled_from(VECTOR_CELLS),
    batch=st.sampled_from([(), (3,), (2, 3)]),
    lengths=st.booleans(),
    options=st.fixed_dictionaries(
        dict(
            time_major=st.booleans(),
            return_carry=st.booleans(),
            reverse=st.booleans(),
            keep_order=st.booleans(),
            unroll=st.sampled_from([1, 2]),
        )
    ),
    at_call=st.booleans(),
)
def test_rnn(same_as_flax, kind, batch, lengths, options, at_call):
    if options["return_carry"] and len(batch) != 1:
        lengths = False  # Flax picks carries along one batch axis only
    x = array((4, *batch, 3) if options["time_major"] else (*batch, 4, 3))
    call = dict(seq_lengths=jnp.asarray(np.random.default_rng(1).integers(1, 5, batch)) if lengths else None)
    fields = dict(options)
    if at_call:
        call.update({name: fields.pop(name) for name in ("time_major", "return_carry", "reverse", "keep_order")})
    same_as_flax(lambda nn: nn.RNN(getattr(nn, kind)(5), **fields), x, rtol=5e-6, gradients=not batch, **call)


def test_rnn_of_convolutions(same_as_flax):
    def build(nn):
        return nn.RNN(nn.ConvLSTMCell(2, (3, 3)), return_carry=True)

    same_as_flax(build, array((2, 3, 4, 5, 1)), seq_lengths=jnp.array([3, 1]), rtol=5e-6)


def test_rnn_starts_from_a_given_carry(same_as_flax):
    carry = (array((2, 5), seed=1), array((2, 5), seed=2))
    same_as_flax(lambda nn: nn.RNN(nn.LSTMCell(5)), array((2, 4, 3)), initial_carry=carry, rtol=5e-6)

    def build(nn):
        return nn.RNN(nn.GRUCell(5, carry_init=nn.initializers.normal()))

    same_as_flax(build, array((2, 4, 3)), init_key=jax.random.key(3), rtol=5e-6)


@pytest.mark.parametrize("split", [True, False])
def test_rnn_with_dropout_in_its_cell(same_as_flax, split):
    """Split streams give each step its own mask, others the same one; the masks are those of Flax."""

    def build(nn):
        class Cell(nn.RNNCellBase):
            @nn.compact
            def __call__(self, carry, x):
                x = nn.Dropout(0.5, deterministic=False)(x)
                carry = jnp.tanh(nn.Dense(3)(x) + carry)
                return carry, (carry, x)

            @nn.nowrap
            def initialize_carry(self, rng, input_shape):
                return jnp.zeros(input_shape)

            @property
            def num_feature_axes(self):
                return 1

        return nn.RNN(Cell(), split_rngs={"params": False, "dropout": split})

    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    x = array((2, 6, 3))
    variables = same_as_flax(build, x, rngs=keys, rtol=5e-6)
    _, dropped = build(nn).apply(variables, x, rngs={"dropout": jax.random.key(2)})
    masks = np.asarray(dropped == 0)
    assert np.all(masks == masks[:, :1]) != split


def test_rnn_carries_and_stacks_collections(flax_nn):
    """A counter that each step counts up, and a memory for each step. Carried variables exist before, as for scan."""

    def build(nn):
        class Cell(nn.RNNCellBase):
            @nn.compact
            def __call__(self, carry, x):
                count = self.variable("counts", "steps", lambda: jnp.zeros((), jnp.int32))
                memory = self.variable("memory", "last", jnp.zeros, x.shape)
                y = nn.Dense(3)(x) + carry + memory.value + count.value
                count.value += 1
                memory.value = y
                return carry, y

            @nn.nowrap
            def initialize_carry(self, rng, input_shape):
                return jnp.zeros(input_shape)

            @property
            def num_feature_axes(self):
                return 1

        return nn.RNN(Cell(), variable_axes={"memory": 0}, variable_carry="counts")

    x = array((2, 4, 3))
    params = nn.Dense(3).init(jax.random.key(0), x)["params"]
    variables = {
        "params": {"cell": {"Dense_0": params}},
        "counts": {"cell": {"steps": jnp.asarray(5)}},
        "memory": {"cell": {"last": array((4, 2, 3), seed=1)}},
    }
    results = [build(library).apply(variables, x, mutable=["counts", "memory"]) for library in (nn, flax_nn)]
    jax.tree.map(np.testing.assert_array_equal, *results)
    y, updates = results[0]
    assert updates["counts"]["cell"]["steps"] == 9
    np.testing.assert_array_equal(updates["memory"]["cell"]["last"], jnp.swapaxes(y, 0, 1))


def test_carry_of_padded_sequences_over_two_batch_axes():
    """What Flax cannot do: each sequence's own last carry, for any number of batch axes."""
    x = array((2, 3, 4, 5))
    lengths = jnp.asarray([[1, 2, 3], [4, 3, 2]])
    rnn = nn.RNN(nn.GRUCell(5), return_carry=True)
    variables = rnn.init(jax.random.key(0), x)
    carry, y = rnn.apply(variables, x, seq_lengths=lengths)
    for index in np.ndindex(2, 3):
        np.testing.assert_array_equal(carry[index], y[index][lengths[index] - 1])


@few
@given(
    lengths=st.booleans(),
    options=st.fixed_dictionaries(dict(time_major=st.booleans(), return_carry=st.booleans())),
    keyed=st.booleans(),
)
def test_bidirectional(same_as_flax, lengths, options, keyed):
    def build(nn):
        forward = nn.RNN(nn.OptimizedLSTMCell(4, carry_init=nn.initializers.normal()))
        return nn.Bidirectional(forward, nn.RNN(nn.GRUCell(4)), **options)

    x = array((4, 2, 3) if options["time_major"] else (2, 4, 3))
    call = dict(seq_lengths=jnp.array([4, 2]) if lengths else None, init_key=jax.random.key(3) if keyed else None)
    same_as_flax(build, x, rtol=5e-6, gradients=False, **call)


@pytest.mark.filterwarnings("ignore:forward_rnn and backward_rnn")
def test_bidirectional_with_one_network_twice_and_a_merge(same_as_flax):
    def build(nn):
        rnn = nn.RNN(nn.GRUCell(4))
        return nn.Bidirectional(rnn, rnn, merge_fn=jnp.add)

    same_as_flax(build, array((2, 4, 3)), rtol=5e-6)
    with pytest.warns(UserWarning, match="share their parameters"):
        build(nn).init(jax.random.key(0), array((2, 4, 3)))


def test_bidirectional_takes_two_carries(same_as_flax):
    def build(nn):
        return nn.Bidirectional(nn.RNN(nn.GRUCell(4)), nn.RNN(nn.GRUCell(4)))

    carries = (array((2, 4), seed=1), array((2, 4), seed=2))
    same_as_flax(build, array((2, 4, 3)), initial_carry=carries, rtol=5e-6, gradients=False)


def test_a_recurrent_network_learns_to_add():
    """Loss of an LSTM on the sum of its inputs falls."""

    class Adder(nn.Module):
        @nn.compact
        def __call__(self, x):
            carry, _ = nn.RNN(nn.OptimizedLSTMCell(8), return_carry=True)(x)
            return nn.Dense(1)(carry[1])[..., 0]

    x = array((32, 5, 1))
    model = Adder()
    variables = model.init(jax.random.key(0), x)

    @jax.jit
    def step(variables):
        def loss_fn(variables):
            return jnp.mean((model.apply(variables, x) - x.sum((1, 2))) ** 2)

        loss, gradients = jax.value_and_grad(loss_fn)(variables)
        return loss, jax.tree.map(lambda p, g: p - 0.1 * g, variables, gradients)

    losses = []
    for _ in range(60):
        loss, variables = step(variables)
        losses.append(float(loss))
    assert losses[-1] < 0.3 * losses[0], losses[::10]
