"""Names and construction of modules: what ``init`` makes, dataclass semantics, modules in containers."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_modules import KEY, MLP, AutoEncoder, X

from distaff.frontend import core, struct
from distaff.frontend import linen as nn


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


def test_shared_modules_take_the_first_name_in_alphabetical_order(flax_nn):
    trees = []
    for library in (nn, flax_nn):

        class Sum(library.Module):
            parts: Any

            @library.compact
            def __call__(self, x):
                return sum(part(x) for part in jax.tree.leaves(self.parts, is_leaf=callable))

        shared, other = library.Dense(2), library.Dense(2)
        parts = {"foo": shared, "bar": [other, shared], "baz": {"b": other, "a": shared}}
        trees.append(jax.tree.structure(Sum(parts).init(KEY, X)))
        many = [shared] * 3 + [other] * 8 + [shared]  # names are compared as text: 10 before 2
        trees.append(jax.tree.structure(Sum(many).init(KEY, X)))
    assert trees[:2] == trees[2:]


def test_submodules_on_the_same_scope_are_adopted():
    class Outer(nn.Module):
        inner: nn.Module

    scope = core.Scope({}, {"params": KEY}, mutable=["params"], path=["root"])
    outer = Outer(MLP(parent=scope), parent=scope)
    assert outer.path == ("root",) and outer.inner.path == ("root", "inner")
    assert outer._state.setup_called is nn.module.SetupState.NEW


def test_fields_come_before_parent_and_name(flax_nn):
    for library in (nn, flax_nn):
        base = type("Base", (library.Module,), {"__annotations__": {"bar": int}})
        derived = type("Derived", (base,), {"__annotations__": {"baz": int}})
        assert list(derived.__dataclass_fields__) == ["bar", "baz", "parent", "name"]
