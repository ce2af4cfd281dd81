"""Modules of Linen in NNX and of NNX in Linen: parameters and values as in Flax, and round trips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff.frontend import linen as nn
from distaff.frontend import nnx
from distaff.frontend.core import meta
from distaff.frontend.nnx import bridge
from distaff.frontend.nnx.bridge import variables as bridge_variables

flax_nn = pytest.importorskip("flax.linen")
flax_nnx = pytest.importorskip("flax.nnx")

X = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)
LIBRARIES = [(nnx, nn), (flax_nnx, flax_nn)]


def linen_net(nn):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.Dense(5, name="dense")(x)
            x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
            self.sow("intermediates", "h", x)
            return nn.Dropout(0.5, deterministic=not train)(x)

        def double(self, x):
            return x * 2

    return Net()


def nnx_net(nnx):
    class Net(nnx.Module):
        def __init__(self, size, rngs):
            self.dense = nnx.Linear(size, 5, rngs=rngs)
            self.norm = nnx.BatchNorm(5, use_running_average=False, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.norm(self.dense(x)))

        def double(self, x):
            return x * 2

    return Net


def flat(tree):
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def assert_equal(mine, other):
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        np.testing.assert_allclose(value, other[name], rtol=1e-6, atol=1e-6, err_msg=name)


def attributes(nnx, model):
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): np.asarray(v[...]) for path, v in params}


def test_a_linen_module_in_nnx_has_the_values_of_flax():
    seen = []
    for nnx_, nn_ in LIBRARIES:
        model = nnx_.bridge.ToNNX(linen_net(nn_), rngs=nnx_.Rngs(0, dropout=1)).lazy_init(X)
        results = {f"param {k}": v for k, v in attributes(nnx_, model).items()}
        results["plain"] = np.asarray(model(X))
        results["trained"] = np.asarray(model(X, train=True, mutable=["batch_stats"]))
        results["mean"] = np.asarray(model.norm["mean"][...])
        results["again"] = np.asarray(model(X))
        results["double"] = np.asarray(model(X, method="double"))
        model(X, mutable=["intermediates"])
        assert hasattr(model, "h")
        seen.append(results)
    assert_equal(*seen)


def test_a_linen_module_in_nnx_is_an_nnx_module():
    model = bridge.ToNNX(nn.Dense(5), rngs=nnx.Rngs(0)).lazy_init(X)
    assert isinstance(model.kernel, nnx.Param) and model.kernel.shape == (3, 5)
    grads = nnx.grad(lambda m: (m(X) ** 2).sum())(model)
    assert grads["kernel"].shape == (3, 5)
    np.testing.assert_allclose(nnx.jit(lambda m: m(X))(model), model(X), rtol=1e-6)

    class Outer(nnx.Module):
        def __init__(self, rngs):
            self.inner = bridge.ToNNX(nn.Dense(5), rngs=rngs)
            self.last = nnx.Linear(5, 2, rngs=rngs)

        def __call__(self, x):
            return self.last(self.inner(x))

    outer = bridge.lazy_init(Outer(nnx.Rngs(0)), X)
    assert outer(X).shape == (4, 2)
    with pytest.raises(ValueError, match="method of one"):
        bridge.lazy_init(lambda x: x, X)
    with pytest.raises(AttributeError, match="nothing"):
        _ = outer.inner.nothing


def test_an_nnx_module_in_linen_has_the_values_of_flax():
    seen = []
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    for nnx_, _ in LIBRARIES:
        model = nnx_.bridge.to_linen(nnx_net(nnx_), 3)
        variables = model.init(keys, X)
        results = flat(variables)
        out, updates = model.apply(variables, X, mutable=["batch_stats"], rngs={"dropout": jax.random.key(2)})
        results |= {"out": np.asarray(out), **{f"update{k}": v for k, v in flat(updates).items()}}
        results["double"] = np.asarray(model.apply(variables, X, nnx_method="double"))
        results["plain"] = np.asarray(model.apply(variables, X, rngs={"dropout": jax.random.key(2)}))
        seen.append(results)
    assert_equal(*seen)


def test_an_nnx_module_inside_linen_and_made_by_a_class():
    Linear = bridge.to_linen_class(nnx.Linear, use_bias=False)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(Linear(args=(3, 5), name="inner")(x))

    variables = Outer().init(jax.random.key(0), X)
    assert set(variables["params"]) == {"inner", "Dense_0"} and set(variables["params"]["inner"]) == {"kernel"}
    assert Outer().apply(variables, X).shape == (4, 2)
    with pytest.raises(TypeError, match="no method"):
        bridge.to_linen(nnx.Linear, 3, 5).init(jax.random.key(0), X, nnx_method="missing")


def test_parameters_survive_the_round_trip():
    inner = bridge.to_linen(nnx.Linear, 3, 5)
    both = bridge.ToNNX(inner, rngs=nnx.Rngs(0)).lazy_init(X)
    linear = nnx.Linear(3, 5, rngs=nnx.Rngs(1))
    both.kernel[...], both.bias[...] = linear.kernel[...], linear.bias[...]
    np.testing.assert_allclose(both(X), linear(X), rtol=1e-6)
    attrs = {"kernel": linear.kernel, "inner": {"mean": nnx.BatchStat(jnp.ones(2))}}
    variables = bridge_variables.nnx_attrs_to_linen_vars(attrs)
    assert set(variables) == {"params", "batch_stats"}
    back = bridge_variables.linen_vars_to_nnx_attrs(variables)
    assert isinstance(back["inner"]["mean"], nnx.BatchStat)
    np.testing.assert_array_equal(back["kernel"][...], linear.kernel[...])
    with pytest.raises(ValueError, match="is no variable"):
        bridge_variables.nnx_attrs_to_linen_vars({"a": 1})
    with pytest.raises(ValueError, match="another"):
        bridge_variables.linen_vars_to_nnx_attrs({"params": {"a": 1}, "cache": {"a": 2}})


@pytest.mark.parametrize(
    "box",
    [
        nn.Partitioned(jnp.ones((2, 3)), ("a", None)),
        nn.LogicallyPartitioned(jnp.ones((2, 3)), ("a", "b"), rules=(("a", "x"),)),
    ],
)
def test_boxes_survive_the_round_trip(box):
    variable = bridge_variables.to_nnx_var("params", box)
    assert isinstance(variable, nnx.Param) and variable.get_metadata("out_sharding") == box.names
    back = bridge_variables.to_linen_var(variable)
    assert type(back) is type(box) and back.names == box.names
    other = getattr(flax_nn, type(box).__name__)(**{k: getattr(box, k) for k in ("value", "names", "mesh")})
    assert other.to_nnx_metadata().keys() - {"sharding_rules"} == box.to_nnx_metadata().keys() - {"sharding_rules"}


def test_metadata_of_variables_survives_in_a_box():
    variable = nnx.Param(jnp.ones((2, 3)), out_sharding=("a", None), note=3, eager_sharding=False)
    box = bridge_variables.to_linen_var(variable)
    assert isinstance(box, bridge.NNXMeta) and box.get_partition_spec() == jax.sharding.PartitionSpec("a", None)
    params = {meta.PARTITION_NAME: "layers"}
    grown = box.replace_boxed(jnp.ones((2, 3))).add_axis(0, params)
    assert grown.metadata["out_sharding"] == ("layers", "a", None)
    assert grown.remove_axis(0, params).metadata["out_sharding"] == ("a", None)
    back = bridge_variables.to_nnx_var("params", box)
    assert back.note == 3 and type(back) is nnx.Param
    assert bridge_variables.is_vanilla_variable(nnx.Param(1.0)) and not bridge_variables.is_vanilla_variable(variable)


def test_functional_modules():
    for nnx_, _ in LIBRARIES:
        model = nnx_.bridge.functional(nnx_.Linear)(3, 5)
        state = model.init(rngs=nnx_.Rngs(0))
        out, (_, new_state) = model.apply(state)(X)
        expected = nnx_.Linear(3, 5, rngs=nnx_.Rngs(0))(X)
        np.testing.assert_array_equal(out, expected)
        assert set(new_state) == {"kernel", "bias"}
    with pytest.raises(ValueError, match="init"):
        bridge.functional(nnx.Linear)(3, 5).apply({})


def test_methods_and_arguments_of_wrapped_modules_are_reached():
    class Coder(nn.Module):
        def setup(self):
            self.embed = bridge.to_linen(nnx.Embed, 7, 4)

        def __call__(self, tokens):
            return self.embed(tokens)

        def attend(self, x):
            return self.embed.attend(x), self.embed.num_embeddings

    tokens = jnp.arange(3)
    wrapped = bridge.to_linen(nnx.Embed, num_embeddings=7, features=4)
    assert wrapped.num_embeddings == 7
    variables = wrapped.init(jax.random.key(0), tokens)
    table = variables["params"]["embedding"]
    np.testing.assert_allclose(wrapped.apply(variables, table, method=lambda m, x: m.attend(x)), table @ table.T)
    with pytest.raises(AttributeError, match="nothing"):
        _ = wrapped.nothing
    coder = Coder()
    with pytest.raises(AttributeError, match="num_embeddings"):  # it was given by position
        coder.apply(coder.init(jax.random.key(0), tokens), table, method="attend")

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(x)

        def twice(self, x):
            return self(x) * 2

    both = bridge.ToNNX(Two(), rngs=nnx.Rngs(0))
    bridge.lazy_init(both.twice, X)
    np.testing.assert_allclose(both.twice(X), 2 * both(X), rtol=1e-6)


def test_variables_that_apply_is_not_given_are_those_of_a_new_module():
    for nnx_, _ in LIBRARIES:

        class Counting(nnx_.Module):
            def __init__(self, rngs, nnx=nnx_):
                self.w, self.n = nnx.Param(rngs.params.normal((3,))), nnx.BatchStat(jnp.full((), 7.0))

            def __call__(self, x):
                return x * self.w[...] + self.n[...]

        model = nnx_.bridge.to_linen(Counting)
        params = {"w": jnp.arange(3.0)}
        np.testing.assert_allclose(model.apply({"params": params}, X), X * jnp.arange(3.0) + 7)
        with pytest.warns(UserWarning, match="unknown module paths in incoming state"):
            model.apply({"params": {**params, "other": jnp.ones(2)}}, X)


def test_classes_of_linen_made_of_classes_of_nnx():
    Linear = bridge.to_linen_class(nnx.Linear, use_bias=False)
    assert isinstance(Linear, type) and issubclass(Linear, bridge.ToLinen)

    class Wide(Linear):
        pass

    for cls in (Linear, Wide):
        model = cls(in_features=3, out_features=5, name="x").clone()
        assert set(model.init(jax.random.key(0), X)["params"]) == {"kernel"}
        model = cls(args=(3, 5), kwargs={"use_bias": True})
        assert set(model.init(jax.random.key(0), X)["params"]) == {"kernel", "bias"}
    with_head = Linear(nnx_class=nnx.LinearGeneral, in_features=3, out_features=(2, 5))
    assert with_head.init(jax.random.key(0), X)["params"]["kernel"].shape == (3, 2, 5)
