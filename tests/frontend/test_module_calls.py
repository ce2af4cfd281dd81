"""What calls of modules take and return, and what surrounds them: interceptors, JAX transforms, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_modules import KEY, MLP, AutoEncoder, X

from distaff.frontend import errors
from distaff.frontend import linen as nn


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
