"""Axis names in collections of their own, and shardings by names, against Flax."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tree_equality import assert_trees_equal

from distaff.frontend import core, errors
from distaff.frontend import linen as nn
from distaff.frontend.core import spmd
from distaff.frontend.linen import partitioning

KEY = jax.random.key(0)
X = jnp.ones((2, 4))
RULES = (("batch", "data"), ("mlp", "model"), ("embed", None))


@pytest.fixture(scope="session")
def flax_modules():
    pytest.importorskip("flax")
    return tuple(importlib.import_module(f"flax.{name}") for name in ("linen", "linen.partitioning", "core.spmd"))


@pytest.fixture
def mesh():
    return jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def model(nn, partitioning):
    class Layer(nn.Module):
        features: int

        @nn.compact
        def __call__(self, x):
            normal = nn.initializers.normal()
            w = partitioning.param_with_axes("w", normal, (x.shape[-1], self.features), axes=("embed", "mlp"))
            b = partitioning.param_with_axes("b", nn.initializers.zeros, (self.features,))
            seen = partitioning.variable_with_axes(
                "stats", "seen", lambda shape: jnp.zeros(shape), (self.features,), axes=("mlp",)
            )
            y = x @ w + b
            if self.is_mutable_collection("stats"):
                seen.value = seen.value + y.sum(0)
            return partitioning.with_sharding_constraint(y, ("batch", "mlp"))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = Layer(4, name="shared")
            return Layer(3)(layer(layer(x)))

    return Model()


def test_axis_names_are_those_of_flax(flax_modules):
    flax_nn, flax_partitioning, _ = flax_modules
    found = []
    for library, names in ((nn, partitioning), (flax_nn, flax_partitioning)):
        module = model(library, names)
        variables = module.init(KEY, X)
        y, updates = module.apply(variables, X, mutable=["stats"])
        arrays = {col: variables[col] for col in ("params", "stats")}
        specs = {col: names.get_axis_names(variables[f"{col}_axes"]) for col in arrays}
        assert variables.keys() == {"params", "stats", "params_axes", "stats_axes"}
        found.append([arrays, y, updates])
        specs = {col: spec.unfreeze() for col, spec in specs.items()}
        assert specs["params"] == {"shared": {"w": P("embed", "mlp")}, "Layer_0": {"w": P("embed", "mlp")}}
        assert specs["stats"] == {"shared": {"seen": P("mlp")}, "Layer_0": {"seen": P("mlp")}}
    assert_trees_equal(*found)
    assert type(partitioning.get_axis_names({"w_axes": partitioning.AxisMetadata(None)})) is core.FrozenDict
    nested = partitioning.AxisMetadata({"a": ("x",), "b": None})
    assert partitioning.get_axis_names({"t_axes": nested})["t"].unfreeze() == {"a": P("x"), "b": None}


def test_variables_are_constrained_to_their_axes(mesh):
    module = model(nn, partitioning)
    variables = module.init(KEY, X)
    with jax.set_mesh(mesh), partitioning.axis_rules(RULES):
        jaxpr = jax.make_jaxpr(lambda v: module.apply(v, X, mutable=["stats"]))(variables)
    specs = [str(e.params["sharding"].spec) for e in jaxpr.eqns if e.primitive.name == "sharding_constraint"]
    assert {str(P(None, "model")), str(P("model")), str(P("data", "model"))} == set(specs)


def test_misuse_of_axes():
    class Clash(nn.Module):
        @nn.compact
        def __call__(self, first, second):
            partitioning.param_with_axes("w", nn.initializers.zeros, (2,), axes=first)
            self.scope.reservations.clear()
            self._state.children.clear()
            return partitioning.param_with_axes("w", nn.initializers.zeros, (2,), axes=second)

    Clash().init(KEY, ("a",), ("a",))
    with pytest.raises(ValueError, match="agree"):
        Clash().init(KEY, ("a",), ("b",))
    with pytest.raises(ValueError, match="no current module"):
        partitioning.param_with_axes("w", nn.initializers.zeros, (2,), axes=("a",))
    module = model(nn, partitioning)
    with pytest.raises(errors.ScopeVariableNotFoundError, match="seen"):
        module.apply({"params": module.init(KEY, X)["params"]}, X)


def test_names_are_replaced_as_in_flax(flax_modules, mesh):
    flax_spmd = flax_modules[2]
    rules = (("embed", "data"), ("mlp", ("data", "model")), ("model", "data"))
    shardings = [
        ("embed", None, "unknown"),
        P("mlp", P.UNCONSTRAINED),
        NamedSharding(mesh, P(None, "model")),
        (),
    ]
    for sharding in shardings:
        for own, context in ((rules, ()), (None, rules), (rules[:1], rules[1:]), (None, ())):
            specs = []
            for library in (spmd, flax_spmd):
                with library.logical_axis_rules(context):
                    try:
                        specs.append(library.get_pspec(sharding, own))
                    except ValueError:  # a mesh has no axis of that name
                        specs.append("refused")
            assert specs[0] == specs[1]
    for library in (spmd, flax_spmd):
        assert library.composite_rules(rules[:1], rules[1:]) == rules
        assert library.composite_rules((), None) == ()
        assert library.from_sharding_rules(("embed", None, "x"), rules) == ("data", None, "x")
        assert library.get_mesh(shardings[2]) == mesh and library.get_mesh(("a",)) is None
        with pytest.raises(ValueError):
            library.composite_rules((("a", "x"),), (("a", "y"),))
    with pytest.raises(TypeError, match="PartitionSpec"):
        spmd.map_sharding(str, "text")


def test_values_are_laid_out(mesh):
    rules = (("embed", "data"), ("mlp", "model"))
    assert spmd.shard_value(X, None, rules, None) is X
    with pytest.raises(ValueError, match="mesh is needed"):
        spmd.shard_value(X, ("embed", "mlp"), rules, None)
    expected = NamedSharding(mesh, P("data", "model"))
    assert spmd.shard_value(X, ("embed", "mlp"), rules, mesh).sharding == expected
    assert spmd.shard_value(X, expected, None, None).sharding == expected
    other = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match="another mesh"):
        spmd.shard_value(X, expected, None, other)
    explicit = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(explicit):
        assert jax.typeof(spmd.shard_value(X, ("embed", None), rules, None)).sharding.spec == P("data", None)
    mixed = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Explicit, AxisType.Auto))
    with pytest.raises(ValueError, match="all Auto or all Explicit"):
        spmd.shard_value(X, ("embed", None), rules, mixed)
    np.testing.assert_array_equal(X, 1)


def stacked(nn, partitioning, kind):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, scale):
            init = nn.initializers.normal()
            w = partitioning.param_with_axes("w", init, (x.shape[-1], 4), axes=("embed", "mlp"))
            tree = partitioning.param_with_axes("t", lambda key: {"a": jnp.ones(4)}, axes=None)
            seen = partitioning.variable_with_axes("stats", "seen", lambda: jnp.zeros(4), axes=("mlp",))
            y = jnp.tanh(x @ w * tree["a"]) * (2.0 if scale else 1.0)
            if self.is_mutable_collection("stats"):
                seen.value = seen.value + y.sum(0)
            return y, None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = partitioning.remat(Layer, static_argnums=(1,)) if kind == "remat" else Layer
            if kind == "vmap":
                return partitioning.vmap_with_axes(
                    layer,
                    variable_axes={"params": 0, "stats": 1},
                    split_rngs={"params": True},
                    in_axes=(0, None),
                    out_axes=(0, None),
                    partitioning_axis_names={"params": "experts", "stats": "experts"},
                )()(x, True)[0]
            if kind == "scan":
                return partitioning.scan_with_axes(
                    layer,
                    variable_axes={"params": 1, "stats": 0},
                    split_rngs={"params": True},
                    in_axes=(nn.broadcast,),
                    length=3,
                    axes_collections=("params", "stats"),
                )()(x, True)[0]
            return layer()(x, True)[0]

    return Model()


STACKED_SPECS = {
    "scan": (P("embed", "layers", "mlp"), P("layers", "mlp")),
    "vmap": (P("experts", "embed", "mlp"), P("mlp", "experts")),
    "remat": (P("embed", "mlp"), P("mlp")),
}


@pytest.mark.parametrize("kind", STACKED_SPECS)
def test_transforms_name_their_axis(flax_modules, kind):
    flax_nn, flax_partitioning, _ = flax_modules
    found = []
    for library, names in ((nn, partitioning), (flax_nn, flax_partitioning)):
        module = stacked(library, names, kind)
        variables = module.init(KEY, X)
        layer = next(iter(variables["params"]))
        specs = [
            names.get_axis_names(variables[f"{col}_axes"])[layer][name]
            for col, name in (("params", "w"), ("stats", "seen"))
        ]
        assert tuple(specs) == STACKED_SPECS[kind]
        arrays = {col: variables[col] for col in ("params", "stats")}
        y, updates = module.apply(variables, X, mutable=["stats"])
        gradient = jax.grad(lambda p, m=module, v=variables: m.apply({**v, "params": p}, X).sum())(variables["params"])
        found.append([arrays, y, updates["stats"], gradient])
    assert_trees_equal(*found, rtol=1e-6)
