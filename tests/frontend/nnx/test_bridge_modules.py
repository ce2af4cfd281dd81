"""``bridge.Module``: modules of NNX written as in Linen have the parameters, names and values that Flax gives them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tree_equality import assert_trees_equal

from distaff.frontend import linen as nn
from distaff.frontend import nnx
from distaff.frontend.nnx import bridge

flax_nn = pytest.importorskip("flax.linen")
flax_nnx = pytest.importorskip("flax.nnx")

X = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)
LIBRARIES = [(nnx, nn), (flax_nnx, flax_nn)]


def flat(tree):
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def written_as_linen(nnx, nn):
    bridge = nnx.bridge

    class Affine(bridge.Module):
        features: int = 5

        @bridge.compact
        def __call__(self, x):
            kernel = self.param("kernel", jax.nn.initializers.normal(), (x.shape[-1], self.features))
            calls = self.variable("batch_stats", "calls", lambda: jnp.zeros(()))
            calls[...] += 1
            return x @ kernel[...] + jax.random.normal(self.make_rng("noise"), (self.features,))

    class WithSetup(bridge.Module):
        def setup(self):
            self.a = Affine(3)
            self.b = Affine(2)

        def __call__(self, x):
            return self.b(self.a(x))

    class WithCompact(bridge.Module):
        @bridge.compact
        def __call__(self, x):
            return Affine(2, name="last")(Affine(4)(Affine(3)(x)))

    return Affine(), WithSetup(), WithCompact()


def test_modules_written_as_in_linen():
    seen = []
    for nnx_, nn_ in LIBRARIES:
        results = {}
        for i, model in enumerate(written_as_linen(nnx_, nn_)):
            for rngs in (3, {"params": jax.random.key(0), "noise": jax.random.key(1)}):
                variables = model.init(rngs, X)
                results |= {f"{i} {type(rngs)} {k}": v for k, v in flat(variables).items()}
            keys = {"noise": jax.random.key(2)}
            out, changed = model.apply(variables, X, rngs=keys, mutable=["batch_stats"])
            results |= {f"{i} out": np.asarray(out), **{f"{i} changed {k}": v for k, v in flat(changed).items()}}
            results[f"{i} plain"] = np.asarray(model.apply(variables, X, rngs=keys))
        seen.append(results)
    assert_trees_equal(*seen, rtol=1e-6)
    with pytest.raises(ValueError, match="init"):
        written_as_linen(nnx, nn)[0](X)


def modules_within(nnx, nn):
    """Modules of NNX and of Linen inside ones of the bridge, in compact methods and in ``setup``."""
    bridge = nnx.bridge

    class Plain(nnx.Module):
        def __init__(self, size, rngs):
            self.linear = nnx.Linear(size, 4, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, deterministic=False, rngs=rngs)
            self.calls = nnx.BatchStat(jnp.zeros(()))

        def __call__(self, x):
            if not bridge.current_module().is_initializing():
                self.calls[...] += 1
            return self.dropout(self.linear(x))

    class OfLinen(nn.Module):
        @nn.compact
        def __call__(self, x):
            if not self.is_initializing():
                self.sow("intermediates", "calls", 1.0, init_fn=lambda: 0.0, reduce_fn=lambda a, b: a + b)
            return nn.Dropout(0.5, deterministic=False)(nn.Dense(4)(x))

    class Compact(bridge.Module):
        @bridge.compact
        def __call__(self, x):
            x = bridge.nnx_in_bridge_mdl(lambda rngs: Plain(3, rngs))(x)
            x = bridge.nnx_in_bridge_mdl(lambda rngs: Plain(4, rngs), name="second")(x)
            return bridge.linen_in_bridge_mdl(OfLinen(), name="last")(bridge.linen_in_bridge_mdl(OfLinen())(x))

    class Setup(bridge.Module):
        def setup(self):
            self.first = bridge.nnx_in_bridge_mdl(lambda rngs: Plain(3, rngs))
            self.last = bridge.linen_in_bridge_mdl(OfLinen())

        def __call__(self, x):
            return self.last(self.first(x))

    return Compact(), Setup()


def test_modules_of_both_kinds_inside_ones_of_the_bridge():
    seen = []
    for nnx_, nn_ in LIBRARIES:
        results = {}
        for i, model in enumerate(modules_within(nnx_, nn_)):
            variables = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X)
            keys = {"params": jax.random.key(2), "dropout": jax.random.key(3)}
            out, changed = model.apply(variables, X, rngs=keys, mutable=True)
            others = model.apply(variables, X, rngs=keys | {"dropout": jax.random.key(4)})
            assert not np.array_equal(out, others)
            results |= {f"{i} out": np.asarray(out), f"{i} others": np.asarray(others)}
            results |= {f"{i} {k}": v for k, v in flat(variables).items()}
            results |= {f"{i} changed {k}": v for k, v in flat(changed).items()}
        seen.append(results)
    assert_trees_equal(*seen, rtol=1e-6)
    assert seen[0]["0 changed ['batch_stats']['Plain_0']['calls']"] == 1
    with pytest.raises(ValueError, match=r"only in a bridge\.Module"):
        bridge.nnx_in_bridge_mdl(lambda rngs: nnx.Linear(3, 4, rngs=rngs))


def shared_and_named(nnx, nn):
    bridge = nnx.bridge

    class Dense(bridge.Module):
        features: int

        @bridge.compact
        def __call__(self, x):
            return x @ self.param("w", jax.nn.initializers.normal(), (x.shape[-1], self.features))

    class Shared(bridge.Module):
        def setup(self):
            self.zzz = Dense(3)
            self.set_attr_priority("zzz", bridge.AttrPriority.HIGH)
            self.aaa = self.zzz

        def __call__(self, x):
            return self.aaa(x)

    class Aliased(bridge.Module):
        @bridge.compact
        def __call__(self, x):
            self.a = Dense(3)  # Dense_0 all the same
            return self.a(x)

    class Layers(bridge.Module):
        def setup(self):
            self.layers = [Dense(3, name=f"layer_{i}") for i in range(2)]

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    class Stacked(bridge.Module):
        def setup(self):
            @nnx.split_rngs(splits=2, graph=True, graph_updates=True)
            @nnx.vmap(
                in_axes=(nnx.StateAxes({nnx.RngState: 0, ...: None}),), axis_size=2, graph=True, graph_updates=True
            )
            def make(parent):
                parent.block = Dense(3)

            make(self)

        def __call__(self, x):
            @nnx.split_rngs(splits=2, graph=True, graph_updates=True)
            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry, graph=True, graph_updates=True)
            def run(block, x):
                return block(x)

            return run(self.block, x)

    return {"zzz": Shared(), "Dense_0": Aliased(), "layer_0 layer_1": Layers(), "block": Stacked()}


def test_names_of_shared_named_and_stacked_modules():
    seen = []
    for nnx_, nn_ in LIBRARIES:
        results = {}
        for names, model in shared_and_named(nnx_, nn_).items():
            variables = model.init(0, X)
            assert sorted(variables["params"]) == names.split()
            results |= {f"{names} {k}": v for k, v in flat(variables).items()}
            results[f"{names} out"] = np.asarray(model.apply(variables, X))
        seen.append(results)
    assert_trees_equal(*seen, rtol=1e-6)


def test_a_bridge_module_names_what_is_wrong():
    class Dense(bridge.Module):
        features: int

        @bridge.compact
        def __call__(self, x):
            self.variable("batch_stats", "w", lambda: jnp.zeros(()))
            return self.param("w", jax.nn.initializers.normal(), (x.shape[-1], self.features))

    class Parent(bridge.Module):
        @bridge.compact
        def __call__(self, x):
            return Dense(3, parent=Dense(2, parent=None)) if x is None else Dense(3, name=4)

    with pytest.raises(ValueError, match="Expected 'w' to be a Param, got BatchStat"):
        Dense(3).init(0, X)
    with pytest.raises(ValueError, match="can only be None"):
        Parent().init(0, None)
    with pytest.raises(ValueError, match="'name' must be a 'str', got int"):
        Parent().init(0, X)
    with pytest.raises(ValueError, match="init"):
        Dense(3)(X)
    with pytest.raises(ValueError, match="init"):
        Dense(3).make_rng("noise")
