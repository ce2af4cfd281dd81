"""Modules: naming, sharing, binding, copies; programs that must make the same variables and outputs as under Flax."""

import copy
import dataclasses
import functools
import gc
import pickle
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff.frontend import errors, struct
from distaff.frontend import linen as nn

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4)), jnp.float32)


class MLP(nn.Module):
    features: int = 3

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features)(nn.relu(nn.Dense(5, name="hidden")(x)))


class AutoEncoder(nn.Module):
    def setup(self):
        self.encoder = MLP(2)
        self.decoder = nn.Dense(4)

    def __call__(self, x):
        return self.decoder(self.encode(x))

    def encode(self, x):
        return self.encoder(x)


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


# Naming and construction.


@pytest.mark.smoke
def test_init_makes_the_tree_that_apply_takes():
    variables = AutoEncoder().init(KEY, X)
    shapes = jax.tree.map(jnp.shape, variables)
    assert shapes == {
        "params": {
            "encoder": {
                "hidden": {"kernel": (4, 5), "bias": (5,)},
                "Dense_0": {"kernel": (5, 2), "bias": (2,)},
            },
            "decoder": {"kernel": (2, 4), "bias": (4,)},
        }
    }
    assert AutoEncoder().apply(variables, X).shape == (2, 4)
    assert jax.tree.map(jnp.shape, jax.eval_shape(AutoEncoder().init, KEY, X)) == shapes


@pytest.mark.smoke
def test_methods_by_name_by_function_and_of_submodules():
    variables = AutoEncoder().init(KEY, X)
    model = AutoEncoder()
    expected = model.apply(variables, X, method="encode")
    for method in (model.encode, AutoEncoder.encode, lambda module, x: module.encode(x)):
        np.testing.assert_array_equal(model.apply(variables, X, method=method), expected)

    class Holder(nn.Module):
        inner: nn.Module

        def __call__(self, x):
            return self.inner(x)

    held = Holder(MLP())
    variables = held.init(KEY, X)
    np.testing.assert_array_equal(held.apply(variables, X, method="inner"), held.apply(variables, X))
    only_encoder = AutoEncoder().init(KEY, X, method="encode")
    assert set(only_encoder["params"]) == {"encoder"}


def test_dataclass_semantics():
    @dataclasses.dataclass
    class Config:
        size: int = 2

    class Base(nn.Module):
        a: int
        b: int = 2

    class KeywordOnly(nn.Module, kw_only=True):
        a: int = 1
        b: int

    class Child(Base):
        c: int = 3
        config: Config = dataclasses.field(default_factory=Config)
        later: int = dataclasses.field(init=False)
        name: str = "a default that counts as None"

    child = Child(1, 5, 6, name="x")
    assert (child.a, child.b, child.c, child.name, child.config.size) == (1, 5, 6, "x", 2)
    assert Child(1).name is None and Child(1).parent is None
    assert KeywordOnly(b=3).a == 1
    with pytest.raises(TypeError):
        KeywordOnly(1, 2)
    with pytest.raises(TypeError):
        Base()
    assert Base(1) == Base(1) != Base(2)
    assert Base(1) != Child(1)
    assert hash(Base(1)) == hash(Base(1))
    assert "later" not in repr(child)
    assert dataclasses.replace(Base(1), b=7).b == 7


def test_unhashable_modules_say_why():
    with pytest.raises(TypeError, match="cannot be hashed"):
        hash(nn.Sequential([nn.Dense(2)]))
    with pytest.raises(TypeError, match="hold variables"):
        hash(nn.Dense(2).bind({}))


def test_custom_hash_and_eq_are_kept():
    class Custom(nn.Module):
        a: Any

        def __hash__(self):
            return 42

        def __eq__(self, other):
            return True

    assert hash(Custom([1])) == 42 and Custom(1) == Custom(2)


def test_attribute_containers_are_frozen():
    class Model(nn.Module):
        sizes: Any

        def setup(self):
            self.lists = [1, {"a": [2]}]

        def __call__(self, x):
            assert self.lists == (1, nn.FrozenDict({"a": (2,)}))
            assert isinstance(self.sizes, nn.FrozenDict) and self.sizes["b"] == (3, 4)
            return x

    Model({"b": [3, 4]}).apply({}, X)


def test_modules_in_struct_dataclasses_and_named_tuples():
    @struct.dataclass
    class Pair:
        first: Any
        second: Any

    class Model(nn.Module):
        def setup(self):
            self.pair = Pair(nn.Dense(2), nn.Dense(3))

        def __call__(self, x):
            return self.pair.second(self.pair.first(x))

    assert set(Model().init(KEY, X)["params"]) == {"pair_first", "pair_second"}


def test_keys_that_would_share_a_name_are_refused():
    class Model(nn.Module):
        def setup(self):
            self.layers = {1: nn.Dense(2), "1": nn.Dense(2)}

        def __call__(self, x):
            return x

    with pytest.raises(ValueError, match="same text"):
        Model().init(KEY, X)


def test_preserve_adopted_names():
    class Model(nn.Module):
        layer: Any
        preserve_adopted_names = True

        def __call__(self, x):
            return self.layer(x)

    assert set(Model(nn.Dense(2, name="mine")).init(KEY, X)["params"]) == {"mine"}


def test_plain_callables_in_a_class_body_are_no_methods():
    class Model(nn.Module):
        features: int = 2
        activation = jax.nn.relu
        make = functools.partial(nn.Dense, 2)

        @nn.compact
        def __call__(self, x):
            return type(self).activation(self.make()(x))

    assert Model().init_with_output(KEY, X)[0].min() >= 0


# Binding and copies.


def test_bind_and_unbind():
    variables = AutoEncoder().init(KEY, X)
    bound = AutoEncoder().bind(variables)
    np.testing.assert_array_equal(bound(X), AutoEncoder().apply(variables, X))
    np.testing.assert_array_equal(bound.decoder.get_variable("params", "bias"), variables["params"]["decoder"]["bias"])
    assert bound.encoder.path == ("encoder",) and bound.path == ()
    assert bound.variables.keys() == {"params"}
    encoder, encoder_variables = bound.encoder.unbind()
    assert encoder.scope is None and encoder.name is None
    np.testing.assert_array_equal(encoder.apply(encoder_variables, X), bound.encode(X))


def test_put_variable_and_mutable_bind():
    variables = nn.Dense(2).init(KEY, X)
    bound = nn.Dense(2).bind(variables, mutable=["params"])
    bound.put_variable("params", "bias", jnp.ones(2))
    assert bound.variables["params"]["bias"][0] == 1
    assert variables["params"]["bias"][0] == 0  # the given tree is not changed


def test_clone_and_copy():
    model = MLP(3, name="m")
    assert model.clone(features=4).features == 4 and model.clone().name == "m"
    assert model.copy().name is None

    class Model(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, x):
            return self.inner.copy()(x) + self.inner.copy(name="named", features=4)(x)

    params = Model(nn.Dense(4)).init(KEY, X)["params"]
    assert set(params) == {"Dense_0", "named"}


def test_applying_does_not_bind_the_modules_given():
    inner = nn.Dense(4)
    model = nn.Sequential([inner, inner])
    variables = model.init(KEY, X)
    assert set(variables["params"]) == {"layers_0"}
    assert inner.scope is None and model.scope is None and inner.parent is None
    model.apply(variables, X)
    assert model.layers[0] is inner


def test_modules_pickle_and_copy():
    for module in (MLP(3), nn.Sequential([nn.Dropout(0.5), nn.GroupNorm(2)])):
        assert pickle.loads(pickle.dumps(module)) == module
        assert copy.deepcopy(module) == module
        assert copy.copy(module) == module


def test_bound_modules_are_freed_without_the_collector():
    gc.collect()
    gc.disable()
    try:
        module = AutoEncoder().bind(AutoEncoder().init(KEY, X))
        module(X)
        scope = weakref.ref(module.scope)
        child = weakref.ref(module.encoder)
        del module
        assert scope() is None and child() is None
    finally:
        gc.enable()


# Calls.


def test_frozen_dicts_are_taken_and_plain_dicts_returned():
    variables = MLP().init(KEY, X)
    frozen = nn.FrozenDict(variables)
    np.testing.assert_array_equal(MLP().apply(frozen, X), MLP().apply(variables, X))
    _, updates = MLP().apply(frozen, X, mutable=["params"])
    assert type(variables) is dict and type(updates["params"]["hidden"]) is dict


def test_mutable_decides_what_is_returned():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.variable("a", "v", lambda: 1)
            self.variable("b", "v", lambda: 2)
            self.sow("intermediates", "x", x)
            return x

    assert set(Model().init(KEY, 1)) == {"a", "b"}
    assert set(Model().init(KEY, 1, mutable=["a", "b", "intermediates"])) == {"a", "b", "intermediates"}
    given = {"a": {"v": 1}, "b": {"v": 2}}
    assert Model().apply(given, 5) == 5
    assert Model().apply(given, 5, mutable="a") == (5, {"a": {"v": 1}})
    assert Model().apply(given, 5, mutable=nn.DenyList("b"))[1].keys() == {"a", "intermediates"}
    assert Model().apply(given, 5, mutable=[]) == (5, {})


def test_functions_of_modules():
    def both(module, x):
        return module.encode(x), module(x)

    model = AutoEncoder()
    (code, _), variables = nn.init_with_output(both, model)(KEY, X)
    assert jax.tree.structure(nn.init(both, model)(KEY, X)) == jax.tree.structure(variables)
    np.testing.assert_array_equal(jax.jit(nn.apply(both, model))(variables, X)[0], code)


def test_interceptors_wrap_calls_in_order():
    calls = []

    def logger(tag):
        def interceptor(next_method, args, kwargs, context):
            calls.append((tag, type(context.module).__name__, context.method_name))
            return next_method(*args, **kwargs) + 1

        return interceptor

    model, variables = nn.Dense(2), nn.Dense(2).init(KEY, X)
    with nn.intercept_methods(logger("outer")), nn.intercept_methods(logger("inner")):
        y = model.apply(variables, X)
    assert calls == [("outer", "Dense", "__call__"), ("inner", "Dense", "__call__")]
    np.testing.assert_allclose(y, model.apply(variables, X) + 2, rtol=1e-6)


def test_call_names_reach_the_program():
    def names(module):
        text = jax.jit(module.apply).lower(module.init(KEY, X), X).as_text(debug_info=True)
        return "MLP/hidden" in text

    assert names(MLP())
    with nn.override_named_call(False):
        assert not names(MLP())


def test_works_under_jit_grad_vmap_and_eval_shape():
    variables = MLP().init(KEY, X)
    expected = MLP().apply(variables, X)
    np.testing.assert_allclose(jax.jit(MLP().apply)(variables, X), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(MLP().apply, (None, 0))(variables, X), expected, rtol=1e-5)
    assert jax.jit(MLP().init)(KEY, X).keys() == {"params"}
    gradient = jax.grad(lambda v: MLP().apply(v, X).sum())(variables)
    np.testing.assert_allclose(gradient["params"]["Dense_0"]["bias"], 2.0)


def test_modules_as_static_arguments_hit_the_cache():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(module, variables, x):
        traces.append(1)
        return module.apply(variables, x)

    variables = MLP().init(KEY, X)
    run(MLP(), variables, X)
    run(MLP(), variables, X)
    assert len(traces) == 1


def test_exceptions_leave_no_trace():
    class Fails(nn.Module):
        @nn.compact
        def __call__(self, x):
            nn.Dense(2)(x)
            raise KeyError("mine")

    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            Fails().init(KEY, X)
    assert nn.Dense(2).parent is None  # no module is running any more


def test_merge_param():
    assert nn.merge_param("train", None, False) is False
    assert nn.merge_param("train", True, None) is True
    for both in ((None, None), (True, False)):
        with pytest.raises(ValueError, match="train"):
            nn.merge_param("train", *both)


def test_perturb_gives_gradients_of_intermediates():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="out")(self.perturb("h", nn.Dense(3)(x)))

    variables = Model().init(KEY, X)
    gradient = jax.grad(lambda v: Model().apply(v, X).sum())(variables)["perturbations"]["h"]
    expected = jnp.broadcast_to(variables["params"]["out"]["kernel"].sum(-1), (2, 3))
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="perturbations"):
        Model().apply({"params": variables["params"], "perturbations": {"other": 1}}, X)


def test_dir_and_hasattr_run_setup():
    bound = AutoEncoder().bind(AutoEncoder().init(KEY, X))
    assert "encoder" in dir(bound) and hasattr(bound, "decoder") and not hasattr(bound, "nothing")


def test_a_property_that_fails_is_blamed_itself():
    class Model(nn.Module):
        @property
        def broken(self):
            return self.does_not_exist

        def __call__(self, x):
            return self.broken

    with pytest.raises(errors.DescriptorAttributeError) as caught:
        Model().apply({}, X)
    assert "does_not_exist" in str(caught.value.__cause__)
