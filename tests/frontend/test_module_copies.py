"""Modules bound, unbound, cloned, copied and pickled."""

import copy
import gc
import pickle
import weakref

import jax.numpy as jnp
import numpy as np
from small_modules import KEY, MLP, AutoEncoder, X

from distaff.frontend import ids
from distaff.frontend import linen as nn


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


def test_a_deep_copy_shares_nothing_with_its_original(flax_nn):
    for library in (nn, flax_nn):
        dense = library.Dense(4)
        assert set(library.Sequential([dense, dense]).init(KEY, X)["params"]) == {"layers_0"}
        pair = library.Sequential([dense, copy.deepcopy(dense)])
        assert set(pair.init(KEY, X)["params"]) == {"layers_0", "layers_1"}


def test_ids_differ_in_copies():
    one, other = ids.uuid(), ids.uuid()
    assert one == one and len({one, other, copy.copy(one), copy.deepcopy(one)}) == 4
    assert repr(one) == f"FlaxId({one.id})"
