"""Programs of modules that must make the same variables, outputs, gradients and texts as under Flax."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff.frontend import linen as nn

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4)), jnp.float32)
# Programs: each takes a library's nn and returns a module; both libraries must agree on everything.


def compact_names(nn):
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            scale = self.param("scale", nn.initializers.normal(), (x.shape[-1],))
            return nn.Dense(3)(x * scale) + nn.Dense(3, name="named")(x)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x = Inner()(x)
            return nn.Dense(2)(Inner(name="last")(x))

    return Outer()


def setup_attributes(nn):
    class Block(nn.Module):
        features: int

        def setup(self):
            self.norm = nn.LayerNorm()
            self.layers = [nn.Dense(self.features) for _ in range(2)]
            self.by_name = {"a": nn.Dense(self.features), "b": [nn.Dense(self.features)]}
            self.pair = (nn.Dense(self.features), None, 3)
            self.bias = self.param("offset", nn.initializers.ones, (self.features,))
            self.width = 2 * self.features

        def __call__(self, x):
            x = self.norm(x)
            for layer in [*self.layers, self.by_name["a"], self.by_name["b"][0], self.pair[0]]:
                x = jnp.sin(layer(x))
            return x + self.bias * self.width * self.pair[2]

    return Block(4)


def shared_submodule(nn):
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(4)
            return dense(jnp.sin(dense(x)))

    return Tied()


def shared_between_modules(nn):
    class User(nn.Module):
        shared: Any
        own: Any

        @nn.compact
        def __call__(self, x):
            return self.own(self.shared(x)) + nn.Dense(4)(x)

    class Both(nn.Module):
        def setup(self):
            shared = nn.Dense(4)
            self.shared = shared
            self.first = User(shared, nn.Dense(4))
            self.second = User(shared, nn.Dense(4))

        def __call__(self, x):
            return self.second(self.first(x))

    return Both()


def modules_as_fields(nn):
    shared = nn.Dense(4)

    class Wrapper(nn.Module):
        one: Any
        many: Any
        extra: Any = None

        @nn.compact
        def __call__(self, x):
            for layer in (self.one, *self.many.values()):
                x = jnp.sin(layer(x))
            return nn.Dense(2)(x)

    return Wrapper(shared, {"a": nn.Dense(4, name="ignored"), "same": shared})


def late_first_use(nn):
    class Lazy(nn.Module):
        def setup(self):
            self.a = nn.Dense(3)
            self.unused = nn.Dense(100)
            self.b = nn.Dense(3)

        def __call__(self, x):
            return self.b(x) + self.a(x)

    return Lazy()


def inheritance(nn):
    class Base(nn.Module):
        features: int = 3

        def setup(self):
            self.dense = nn.Dense(self.features)

        def __call__(self, x):
            return self.dense(x)

    class Child(Base):
        extra: int = 2

        def setup(self):
            super().setup()
            self.more = nn.Dense(self.extra)

        def __call__(self, x):
            return self.more(super().__call__(x))

    class Compact(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x)

    class CompactChild(Compact):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(super().__call__(nn.Dense(4)(x)))

    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Child()(x) + CompactChild()(x)

    return Both()


def random_streams(nn):
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            noise = jax.random.normal(self.make_rng("noise"), x.shape) + jax.random.normal(self.make_rng("noise"), ())
            offset = self.param("offset", nn.initializers.normal(), x.shape)
            again = jax.random.normal(self.make_rng(), x.shape) if self.is_initializing() else 0.0
            return x + noise + offset + 0 * again

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            inner = Noisy()
            return inner(inner(x)) + Noisy(name="other")(x)

    return Model()


def state_variables(nn):
    class Counter(nn.Module):
        @nn.compact
        def __call__(self, x):
            first = not self.has_variable("state", "count")
            count = self.variable("state", "count", lambda: jnp.zeros((), jnp.int32))
            if not first and self.is_mutable_collection("state"):
                count.value += 1
            self.sow("intermediates", "x", x)
            self.sow("intermediates", "x", 2 * x)
            self.sow("losses", "l2", x.sum(), reduce_fn=lambda a, b: a + b, init_fn=lambda: 0.0)
            return self.perturb("p", x) * (1 + count.value)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Counter()(Counter()(x))

    return Model()


def loops_and_partials(nn):
    Dense = functools.partial(nn.Dense, 4, use_bias=False)

    class Model(nn.Module):
        layer: Any = Dense
        act: Any = jnp.tanh

        @nn.compact
        def __call__(self, x):
            layers = [self.layer(name=f"layer_{i}") for i in range(11)]
            for layer in layers:
                x = self.act(layer(x))
            return x

    return Model()


def helper_methods(nn):
    class Model(nn.Module):
        features: int = 3

        @nn.nowrap
        def make(self, name):
            return nn.Dense(self.features, name=name)

        @nn.compact
        def block(self, x, name):
            return self.make(name)(x)

        @nn.compact
        def __call__(self, x):
            return self.block(x, "a") + self.block(x, "b") + self.static(1) + self.doubled

        @staticmethod
        def static(x):
            return x

        @property
        def doubled(self):
            return 2 * self.features

    return Model()


def shared_scope(nn):
    class LoRA(nn.Module):
        base: Any
        rank: int = 2

        def setup(self):
            nn.share_scope(self, self.base)

        @nn.compact
        def __call__(self, x):
            a = self.param("A", nn.initializers.normal(), (x.shape[-1], self.rank))
            b = self.param("B", nn.initializers.normal(), (self.rank, self.base.features))
            return self.base(x) + x @ a @ b

    class Own(nn.Module):
        def setup(self):
            self.child = nn.Dense(3)
            nn.share_scope(self, self.child)

        @nn.compact
        def __call__(self, x):
            return self.child(x) * self.param("scale", nn.initializers.ones, (3,))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return LoRA(nn.Dense(4))(x).sum() + Own()(x)

    return Model()


def named_in_setup(nn):
    class Model(nn.Module):
        def setup(self):
            self.a = nn.Dense(3, name="explicit")
            shared = nn.Dense(4)
            self.b = shared
            self.also_b = shared
            self.later = (self.a, nn.Dense(2))

        def __call__(self, x):
            return self.later[1](self.a(self.also_b(self.b(x))))

    return Model()


def post_init(nn):
    class Model(nn.Module):
        features: int
        inner: Any = None

        def __post_init__(self):
            if self.inner is None:
                self.inner = nn.Dense(self.features)
            super().__post_init__()

        def __call__(self, x):
            return self.inner(x)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Model(3)(Model(4)(x))

    return Outer()


PROGRAMS = [
    compact_names,
    setup_attributes,
    shared_submodule,
    shared_between_modules,
    modules_as_fields,
    late_first_use,
    inheritance,
    random_streams,
    loops_and_partials,
    helper_methods,
    named_in_setup,
    post_init,
    shared_scope,
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_program_is_the_same_as_under_flax(same_as_flax, program):
    keys = {"params": jax.random.key(1), "noise": jax.random.key(2)}
    same_as_flax(program, X, rngs=keys, rtol=2e-6)


@pytest.mark.parametrize("mutable", [["state", "intermediates"], True, ["losses"], []])
def test_state_is_the_same_as_under_flax(same_as_flax, mutable):
    same_as_flax(state_variables, X, mutable=mutable)


@pytest.mark.parametrize("program", [compact_names, setup_attributes, modules_as_fields, shared_between_modules])
def test_captured_intermediates_are_the_same_as_under_flax(flax_nn, program):
    captured = []
    for library in (nn, flax_nn):
        module = program(library)
        variables = module.init(KEY, X)
        captured.append(module.apply(variables, X, capture_intermediates=True)[1])
        some = module.apply(variables, X, capture_intermediates=lambda m, _: type(m).__name__ == "Dense")[1]
        captured.append(some)
    for mine, other in zip(captured[:2], captured[2:], strict=True):
        assert jax.tree.structure(mine) == jax.tree.structure(other)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), mine, other)


@pytest.mark.parametrize("program", [p for p in PROGRAMS if p is not loops_and_partials])  # shows a module's path
def test_repr_is_the_same_as_under_flax(flax_nn, program):
    assert repr(program(nn)) == repr(program(flax_nn))
