"""``vmap``, ``scan`` and ``remat``: programs that must make the same variables, outputs and gradients as under Flax."""

import functools

import jax.numpy as jnp
import pytest

from distaff.frontend import linen as nn

from .conftest import KEYS, X, assert_same_intermediates

# Programs: each takes a library's nn and returns a module of one argument.


def vmap_own_parameters(nn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=1, out_axes=1)
            return dense(5)(x)

    return Model()


def vmap_of_modules_as_arguments(nn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(3)

            def both(module, dense, x):
                return dense(x) + nn.Dense(3)(x)

            call = nn.vmap(
                both, variable_axes={"params": None}, split_rngs={"params": False}, in_axes=(None, 0), out_axes=0
            )
            return call(self, dense, x) + nn.Dense(3)(dense(x)[..., :1])

    return Model()


def vmap_of_methods_with_options(nn):
    class Pair(nn.Module):
        def setup(self):
            self.up, self.down = nn.Dense(6), nn.Dense(4)

        def encode(self, x):
            return self.up(x)

        def decode(self, x, scale):
            return scale * self.down(x)

    axes = dict(variable_axes={"params": 0}, split_rngs={"params": True})
    pairs = nn.vmap(Pair, methods={"encode": dict(in_axes=0, **axes), "decode": dict(in_axes=(0, None), **axes)})

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            pair = pairs()
            return pair.decode(jnp.sin(pair.encode(x)), 2.0)

    return Model()


def vmap_of_partial_class_with_statistics(nn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = functools.partial(nn.BatchNorm, use_running_average=False, momentum=0.8, axis_name="batch")
            call = nn.vmap(
                norm,
                variable_axes={"params": None, "batch_stats": None},
                split_rngs={"params": False},
                axis_name="batch",
            )
            return call()(x)

    return Model()


def scan_over_a_sequence(nn):
    class Cell(nn.Module):
        @nn.compact
        def __call__(self, state, x):
            state = jnp.tanh(nn.Dense(4)(state) + nn.Dense(4, use_bias=False)(x))
            return state, 2 * state

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            rnn = nn.scan(Cell, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
            return rnn()(jnp.zeros((x.shape[0], 4)), x)

    return Model()


def scan_over_layers(nn):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, scale, shift):
            x = nn.Dropout(0.5, deterministic=False)(nn.Dense(4)(x)) * scale + shift
            return x, (x.sum(), scale)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                Block,
                variable_axes={"params": 1},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, 0),
                out_axes=(0, nn.broadcast),
                reverse=True,
            )
            return layers()(x, jnp.float32(1.5), jnp.arange(3.0))

    return Model()


def scan_of_a_function_with_state(nn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(4)
            count = self.variable("state", "count", jnp.zeros, ())
            dense(x[:, 0])

            def body(module, dense, carry, row):
                module.variable("state", "count").value += 1.0
                module.sow("seen", "row", row.sum())
                return dense(carry + row), row * module.get_variable("state", "count")

            def swapped(module, carry, row):
                return body(module, dense_of(module), carry, row)

            def dense_of(module):
                return nn.Dense(4, name="inner")

            scan = nn.scan(
                swapped,
                variable_broadcast="params",
                variable_carry="state",
                variable_axes={"seen": 0},
                split_rngs={"params": False},
                in_axes=1,
                out_axes=1,
            )
            return scan(self, x[:, 0], x), count.value

    return Model()


def scan_under_vmap_under_remat(nn):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.remat(nn.Dense, prevent_cse=False)(4)(jnp.sin(x)), None

    layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    stacks = nn.vmap(
        layers, variable_axes={"params": 1}, split_rngs={"params": True}, in_axes=(0, None), out_axes=(0, None)
    )

    class Model(nn.Module):
        @nn.remat
        @nn.compact
        def __call__(self, x):
            return stacks(name="stacks")(x, None)[0]

    return Model()


def remat_with_static_arguments(nn):
    class Block(nn.Module):
        def setup(self):
            self.dense = nn.Dense(4)

        def __call__(self, x, train, scale=1.0):
            return self.dense(x) if train else x * scale

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            block = nn.checkpoint(Block, static_argnums=(2,))()
            return block(block(x, True), False, scale=2.0)

    return Model()


def remat_scan(nn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat_scan(nn.Dense, lengths=(2, 1, 2))(4)(x)

    return Model()


STATELESS = [
    vmap_own_parameters,
    vmap_of_modules_as_arguments,
    vmap_of_methods_with_options,
    scan_over_a_sequence,
    scan_over_layers,
    scan_under_vmap_under_remat,
    remat_with_static_arguments,
    remat_scan,
]
STATEFUL = [
    vmap_of_partial_class_with_statistics,
    scan_of_a_function_with_state,
]


@pytest.mark.parametrize("program", STATELESS, ids=lambda program: program.__name__)
def test_program_is_the_same_as_under_flax(same_as_flax, program):
    same_as_flax(program, X, rngs=KEYS, rtol=3e-6)


@pytest.mark.parametrize("program", STATEFUL, ids=lambda program: program.__name__)
def test_state_is_the_same_as_under_flax(same_as_flax, program):
    same_as_flax(program, X, rngs=KEYS, mutable=["state", "batch_stats", "seen"], rtol=3e-6)


@pytest.mark.parametrize("program", [vmap_own_parameters, scan_over_layers])
def test_intermediates_under_transforms_are_the_same_as_under_flax(flax_nn, program):
    assert_same_intermediates(program, (nn, flax_nn))
