"""Networks over sequences, against Flax's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff.frontend import nnx

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3)), jnp.float32)
LENGTHS = jnp.asarray([3, 5])


@pytest.fixture(scope="module", params=["distaff", "flax"])
def lib(request):
    return nnx if request.param == "distaff" else pytest.importorskip("flax.nnx")


CELLS = ["SimpleCell", "GRUCell", "LSTMCell", "OptimizedLSTMCell"]
OPTIONS = [{}, {"time_major": True}, {"seq_lengths": LENGTHS}, {"unroll": 2}]
ORDERS = [{}, {"reverse": True}, {"reverse": True, "keep_order": True}]
CASES = [(CELLS[(i + j) % 4], order, options) for i, options in enumerate(OPTIONS) for j, order in enumerate(ORDERS)]


@pytest.mark.parametrize(("cell", "reverse", "options"), CASES)
def test_rnn(same_layer, cell, reverse, options):
    options = dict(options)
    lengths, unroll = options.pop("seq_lengths", None), options.pop("unroll", 1)
    x = jnp.swapaxes(X, 0, 1) if options.get("time_major") else X

    def build(lib, rngs):
        return lib.RNN(getattr(lib, cell)(3, 4, rngs=rngs), unroll=unroll, return_carry=True, **options, **reverse)

    same_layer(build, x, call=lambda layer, x: layer(x, seq_lengths=lengths))


@pytest.mark.parametrize("return_carry", [False, True])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_bidirectional(same_layer, return_carry, lengths):
    def build(lib, rngs):
        forward, backward = lib.RNN(lib.GRUCell(3, 4, rngs=rngs)), lib.RNN(lib.LSTMCell(3, 4, rngs=rngs))
        return lib.Bidirectional(forward, backward, return_carry=return_carry, rngs=rngs)

    same_layer(build, X, call=lambda layer, x: layer(x, seq_lengths=lengths))


@pytest.mark.parametrize("options", [{}, {"broadcast_rngs": "dropout"}])
def test_a_cell_with_random_numbers_and_statistics(same_layer, options):
    def build(lib, rngs):
        class Cell(lib.SimpleCell):
            def __init__(self):
                super().__init__(3, 4, rngs=rngs)
                self.dropout = lib.Dropout(0.5, rngs=lib.Rngs(dropout=1))
                self.norm = lib.BatchNorm(4, rngs=rngs)

            def __call__(self, carry, x):
                carry, y = super().__call__(self.dropout(carry) + 1, x)
                return carry, self.norm(y)

        return lib.RNN(Cell(), **options)

    same_layer(build, X)


def test_variables_with_an_axis_of_time(same_layer):
    def build(lib, rngs):
        class Cell(lib.SimpleCell):
            def __init__(self):
                super().__init__(3, 4, rngs=rngs)
                self.gain = lib.BatchStat(jnp.arange(20.0).reshape(5, 4))

            def __call__(self, carry, x):
                carry, y = super().__call__(carry, x)
                self.gain[...] = self.gain[...] + 1
                return carry, y * self.gain[...]

        return lib.RNN(Cell(), state_axes=lib.StateAxes({lib.BatchStat: 0, ...: lib.Carry}))

    same_layer(build, X)


def test_the_same_in_a_loop():
    cell = nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0))
    carry, expected = cell.initialize_carry((2, 3), nnx.Rngs(0)), []
    for t in range(5):
        carry, y = cell(carry, X[:, t])
        expected.append(y)
    last, outputs = nnx.RNN(cell)(X, return_carry=True)
    np.testing.assert_allclose(outputs, jnp.stack(expected, 1), atol=1e-6)
    np.testing.assert_allclose(last[1], carry[1], atol=1e-6)


def test_first_carries_are_drawn(lib):
    cell = lib.GRUCell(3, 4, rngs=lib.Rngs(0))
    normal = jax.nn.initializers.normal()
    carries = [cell.initialize_carry((2, 3), lib.Rngs(seed), normal) for seed in (0, 1)]
    draws = [lib.RNN(cell)(X, initial_carry=carry) for carry in carries]
    assert not np.allclose(*draws)
    with pytest.raises(ValueError, match="RNGs must be provided"):
        lib.RNN(cell, rngs=False)(X)
    with pytest.raises(ValueError, match="rngs"):
        lib.RNN(cell, rngs=3)
    with pytest.raises(TypeError, match="rngs"):
        lib.Bidirectional(lib.RNN(cell), lib.RNN(cell), rngs=3)
