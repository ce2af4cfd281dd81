"""``jit``, views of variables, derivatives and control flow: programs that must do the same as under Flax."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from distaff.frontend import linen as nn

from .conftest import KEYS, X, assert_same_intermediates

# Programs: each takes a library's nn and returns a module of one argument.


def jit_of_setup_modules(nn):
    class Model(nn.Module):
        def setup(self):
            self.dense = nn.jit(nn.Dense)(4)
            self.drop = nn.jit(nn.Dropout)(0.5, deterministic=False)

        @nn.jit
        @nn.compact
        def __call__(self, x):
            x = self.drop(self.dense(self.dense(x)))
            return self.drop(nn.Dense(3)(self.helper(x)))

        @nn.jit
        def helper(self, x):
            return self.drop(x) + jax.random.normal(self.make_rng("noise"), x.shape)

    return Model()


def fold_rngs(nn):
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x) + jax.random.normal(self.make_rng("noise"))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            noisy = nn.fold_rngs(Noisy)()
            return noisy(x) + noisy(x) + nn.fold_rngs(lambda module, x: nn.Dense(3)(x))(self, x)

    return Model()


def map_variables_transposed(nn):
    def transpose(variables):
        return jax.tree.map(lambda x: x.T, variables)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            tied = nn.map_variables(nn.Dense, "params", transpose, transpose, init=True)
            return tied(4, use_bias=False)(x) + tied(4, use_bias=False, name="other")(x)

    return Model()


def map_variables_masked_in_setup(nn):
    class Causal(nn.Module):
        def mask(self, variables):
            return variables if self.is_initializing() else jax.tree.map(jnp.triu, variables)

        def setup(self):
            dense = nn.map_variables(nn.Dense, "params", self.mask, init=self.is_initializing())
            self.dense = dense(4, use_bias=False)

        def __call__(self, x):
            return self.dense(x)

    return Causal()


def derivatives_by_variables(nn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(3)
            dense(x)
            y, backward = nn.vjp(lambda module, x: module(x) ** 2, dense, x)
            by_variables, by_x = backward(jnp.ones_like(y))
            z, _, aux = nn.vjp(lambda module, x: (module(x), x.sum()), dense, x, has_aux=True)
            tangents = {"params": jax.tree.map(jnp.ones_like, by_variables["params"])}
            _, tangent = nn.jvp(lambda module, x: module(x), dense, (x,), (jnp.ones_like(x),), tangents)
            return y, jax.tree.leaves(by_variables), by_x, z, aux, tangent

    return Model()


def derivatives_by_arguments(nn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(3)
            value = nn.value_and_grad(lambda module, x, y: (module(x) * y).sum(), dense, x, 2.0)
            aux = nn.grad(lambda module, x: (module(x).sum(), x), dense, x, has_aux=True)
            return value, aux, nn.grad(lambda module, x: module(x).sum(), dense, x)

    return Model()


def custom_gradient(nn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            def f(module, scale, x):
                return module(scale * x)

            def forward(module, scale, x):
                return nn.vjp(functools.partial(lambda module, x, scale: f(module, scale, x), scale=scale), module, x)

            def backward(scale, vjp_fn, cotangent):
                params, x = vjp_fn(cotangent)
                return jax.tree.map(jnp.sign, params), scale * x

            call = nn.custom_vjp(f, forward, backward, nondiff_argnums=(1,))
            return call(nn.Dense(3), 3.0, x)

    return Model()


def while_loop_with_keys(nn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            def goes_on(module, state):
                return module.variables["state"]["count"] < 3

            def body(module, state):
                module.variable("state", "count", lambda: jnp.array(0)).value += 1
                return nn.Dense(4)(state) + jax.random.normal(module.make_rng("noise"))

            if self.is_initializing():
                return body(self, x)
            return nn.while_loop(
                goes_on, body, self, x, carry_variables="state", split_rngs={"noise": True, "params": False}
            )

    return Model()


def branches(nn):
    class Model(nn.Module):
        def setup(self):
            self.heads = [nn.Dense(3), nn.Sequential([nn.Dense(5), nn.Dense(3)])]

        @nn.compact
        def __call__(self, x):
            self.variable("state", "count", lambda: jnp.int32(0))

            def head(i):
                def call(module, x):
                    module.put_variable("state", "count", module.get_variable("state", "count") + i + 1)
                    return module.heads[i](x)

                return call

            if self.is_initializing():
                return [head(i)(self, x) for i in range(2)][1]
            return nn.cond(x.sum() > 100.0, head(0), head(1), self, x) + nn.switch(
                jnp.int32(0), [head(0), head(1)], self, x
            )

    return Model()


def modules_from_outside(nn):
    class Wrapper(nn.Module):
        inner: Any

        @nn.remat
        @nn.compact
        def __call__(self, x):
            return self.inner["a"](x) + nn.jit(lambda module, x: module.inner["b"][0](x))(self, x)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            shared = nn.Dense(4)
            wrapper = Wrapper({"a": shared, "b": [nn.Dense(4), shared]})
            stack = nn.vmap(Wrapper, variable_axes={"params": None}, split_rngs={"params": False})
            return wrapper(shared(x)) + stack({"a": shared, "b": [nn.Dense(4)]})(x)

    return Model()


def submodule_as_argument_of_a_lifted_helper(nn):
    class Model(nn.Module):
        def setup(self):
            self.dense = nn.Dense(4)
            self.other = nn.Dense(4)

        @nn.remat
        def helper(self, dense, x):
            return self.dense(x) + dense(x) + self.other(x)

        def __call__(self, x):
            return self.helper(self.other, self.dense(x))

    return Model()


def variables_as_arguments(nn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            total = self.variable("state", "total", jnp.zeros, (4,))

            def add(module, total, x):
                total.value += x.sum((0, 1))
                return x * total.value

            return nn.remat(add)(self, total, x)

    return Model()


def name_scopes(nn):
    class Model(nn.Module):
        @nn.compact_name_scope
        def up(self, x):
            return nn.Dense(3)(x)

        @nn.compact_name_scope
        def down(self, x):
            return nn.Dense(3)(nn.Dense(3)(x)) * self.scale

        def setup(self):
            self.scale = self.param("scale", nn.initializers.ones, ())

        def __call__(self, x):
            return self.up(x) + self.down(x) + self.up(2 * x)

    return Model()


STATELESS = [
    jit_of_setup_modules,
    fold_rngs,
    map_variables_transposed,
    map_variables_masked_in_setup,
    derivatives_by_variables,
    derivatives_by_arguments,
    custom_gradient,
    modules_from_outside,
    submodule_as_argument_of_a_lifted_helper,
    name_scopes,
]
STATEFUL = [
    while_loop_with_keys,
    branches,
    variables_as_arguments,
]


@pytest.mark.parametrize("program", STATELESS, ids=lambda program: program.__name__)
def test_program_is_the_same_as_under_flax(same_as_flax, program):
    same_as_flax(program, X, rngs=KEYS, rtol=3e-6)


@pytest.mark.parametrize("program", STATEFUL, ids=lambda program: program.__name__)
def test_state_is_the_same_as_under_flax(same_as_flax, program):
    gradients = program is not while_loop_with_keys  # JAX has none of while loops
    same_as_flax(program, X, rngs=KEYS, mutable=["state", "batch_stats", "seen"], gradients=gradients, rtol=3e-6)


@pytest.mark.parametrize("program", [jit_of_setup_modules])
def test_intermediates_under_transforms_are_the_same_as_under_flax(flax_nn, program):
    assert_same_intermediates(program, (nn, flax_nn))
