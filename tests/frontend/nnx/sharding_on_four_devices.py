"""Layouts of layers, optimisers and states on a 2x2 mesh, as Flax lays them out. Run by test_four_devices.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from distaff.frontend import nnx

flax_nnx = pytest.importorskip("flax.nnx")
LIBRARIES = nnx, flax_nnx


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)


def specs(lib, state):
    """The layout of each array, by path; trailing axes that are not split are left out."""

    def spec(x):
        names = list(x.sharding.spec) if isinstance(x.sharding, NamedSharding) else []
        while names and names[-1] is None:
            names.pop()
        return tuple(names), x.shape

    return {path: spec(v.get_raw_value()) for path, v in lib.to_flat_state(state)}


NORMAL, ONES = nnx.initializers.lecun_normal(), nnx.initializers.ones_init()
MATRIX, ROW = ("data", "model"), ("model",)
LAYERS = {
    "Linear": lambda lib, p: lib.Linear(4, 8, kernel_init=p(NORMAL, MATRIX), bias_init=p(ONES, ROW), rngs=lib.Rngs(0)),
    "LinearGeneral": lambda lib, p: lib.LinearGeneral(
        4, (2, 8), kernel_init=p(NORMAL, ("data", None, "model")), rngs=lib.Rngs(0)
    ),
    "Einsum": lambda lib, p: lib.Einsum("ab,bc->ac", (4, 8), 8, kernel_init=p(NORMAL, MATRIX), rngs=lib.Rngs(0)),
    "Embed": lambda lib, p: lib.Embed(8, 4, embedding_init=p(NORMAL, MATRIX), rngs=lib.Rngs(0)),
    "Conv": lambda lib, p: lib.Conv(4, 8, 3, kernel_init=p(NORMAL, (None, "data", "model")), rngs=lib.Rngs(0)),
    "ConvTranspose": lambda lib, p: lib.ConvTranspose(
        4, 8, 3, kernel_init=p(NORMAL, (None, "data", "model")), rngs=lib.Rngs(0)
    ),
    "LayerNorm": lambda lib, p: lib.LayerNorm(8, scale_init=p(ONES, ROW), rngs=lib.Rngs(0)),
    "BatchNorm": lambda lib, p: lib.BatchNorm(8, scale_init=p(ONES, ROW), rngs=lib.Rngs(0)),
    "GroupNorm": lambda lib, p: lib.GroupNorm(8, 2, scale_init=p(ONES, ROW), rngs=lib.Rngs(0)),
    "RMSNorm by metadata": lambda lib, p: lib.RMSNorm(8, scale_metadata={"out_sharding": ROW}, rngs=lib.Rngs(0)),
    "Linear by metadata": lambda lib, p: lib.Linear(
        4, 8, kernel_metadata={"out_sharding": MATRIX}, bias_metadata={"out_sharding": ROW}, rngs=lib.Rngs(0)
    ),
    "MultiHeadAttention": lambda lib, p: lib.MultiHeadAttention(
        2, 8, kernel_init=p(NORMAL, ("data", "model", None)), out_kernel_init=p(NORMAL, ("model", None, "data")),
        decode=False, rngs=lib.Rngs(0),
    ),
    "LSTMCell": lambda lib, p: lib.LSTMCell(4, 8, kernel_init=p(NORMAL, MATRIX), rngs=lib.Rngs(0)),
    "GRUCell": lambda lib, p: lib.GRUCell(4, 8, recurrent_kernel_init=p(NORMAL, MATRIX), rngs=lib.Rngs(0)),
    "LoRA": lambda lib, p: lib.LoRA(4, 2, 8, a_initializer=p(NORMAL, ("data", None)), rngs=lib.Rngs(0)),
}  # fmt: skip


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_are_laid_out_as_by_flax(layer, compiled):
    laid_out = []
    for lib in LIBRARIES:
        with jax.set_mesh(mesh_of()):

            def make(lib=lib):
                return LAYERS[layer](lib, lib.with_partitioning)

            model = lib.jit(make)() if compiled else make()
        laid_out.append(specs(lib, lib.state(model)))
    assert laid_out[0] == laid_out[1]
    assert any(names for names, _ in laid_out[0].values())


class Layers:
    """A stack made by vmap and run by scan, with logical names, of either library."""

    def __init__(self, lib):
        rules = (("embed", "data"), ("mlp", "model"), ("layer", None))

        class Block(lib.Module):
            def __init__(self, rngs):
                init = lib.with_partitioning(NORMAL, ("embed", "mlp"), sharding_rules=rules)
                self.up = lib.Linear(8, 8, kernel_init=init, use_bias=False, rngs=rngs)
                self.down = lib.Param(
                    NORMAL(rngs.params(), (8, 8)), out_sharding=("mlp", "embed"), sharding_rules=rules
                )

            def __call__(self, x):
                return jnp.tanh(self.up(x)) @ self.down[...]

        class Model(lib.Module):
            def __init__(self, rngs):
                @lib.split_rngs(splits=4)
                @lib.vmap(transform_metadata={lib.PARTITION_NAME: "layer"})
                def blocks(rngs):
                    return Block(rngs)

                self.blocks = blocks(rngs)

            def __call__(self, x):
                @lib.scan(in_axes=(lib.Carry, 0), out_axes=lib.Carry, transform_metadata={lib.PARTITION_NAME: "layer"})
                def run(x, block):
                    return block(x)

                return run(x, self.blocks)

        self.lib = lib
        self.make = lambda: Model(lib.Rngs(0))


@pytest.mark.parametrize("compiled", [True, False])
def test_a_stack_trains_as_on_one_device_and_stays_laid_out(compiled):
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    found = []
    for lib, on_mesh in ((nnx, True), (nnx, False), (flax_nnx, True)):
        stack = Layers(lib)

        def step(model, optimizer, x, lib=lib):
            loss, grads = lib.value_and_grad(lambda model: ((model(x) - 1) ** 2).mean())(model)
            optimizer.update(model, grads)
            return loss

        def train(stack=stack, lib=lib, step=step):
            model = lib.jit(stack.make)() if compiled else stack.make()
            optimizer = lib.Optimizer(model, optax.adam(1e-2), wrt=lib.Param)
            run = lib.jit(step)
            losses = [float(run(model, optimizer, jax.device_put(x))) for _ in range(4)]
            return losses, model, optimizer

        if not on_mesh:
            with lib.use_eager_sharding(False):
                found.append((train()[0], None))
            continue
        with jax.set_mesh(mesh_of()):
            losses, model, optimizer = train()
            names = {path: v.get_metadata("out_sharding") for path, v in lib.to_flat_state(lib.state(model))}
            found.append((losses, (specs(lib, lib.state(model)), specs(lib, lib.state(optimizer)), names)))
    (mine, layout), (alone, _), (other, flax_layout) = found
    np.testing.assert_allclose(mine, alone, rtol=1e-4)
    np.testing.assert_allclose(mine, other, rtol=1e-4)
    assert mine[-1] < mine[0]
    assert layout == flax_layout
    assert layout[0][("blocks", "up", "kernel")] == ((None, "data", "model"), (4, 8, 8))
    assert layout[2][("blocks", "down")] == ("layer", "mlp", "embed")


@pytest.mark.parametrize("lib", LIBRARIES, ids=["distaff", "flax"])
def test_shardings_of_a_state_place_another(lib):
    """``get_named_sharding`` and ``get_abstract_model`` say what the arrays of the model itself are laid out as."""
    mesh = mesh_of()
    stack = Layers(lib)
    with jax.set_mesh(mesh):
        model = stack.make()
        shardings = lib.get_named_sharding(lib.state(model), mesh)
        on_host = jax.tree.map(np.asarray, lib.state(model))
        placed = jax.jit(lambda state: state, out_shardings=shardings)(on_host)
        _, abstract = lib.get_abstract_model(stack.make, mesh)
    wanted = specs(lib, lib.state(model))
    assert specs(lib, placed) == wanted and specs(lib, abstract) == wanted
    assert all(v.get_raw_value().sharding.mesh == mesh for _, v in lib.to_flat_state(abstract))
    assert all(len(v.get_raw_value().addressable_shards) == 4 for _, v in lib.to_flat_state(placed))


@pytest.mark.parametrize("lib", LIBRARIES, ids=["distaff", "flax"])
def test_other_metadata_of_axes_follows_transforms(lib):
    seen = []

    @lib.vmap(in_axes=0, axis_size=4, transform_metadata={lib.PARTITION_NAME: "layer", "roles": "depth"})
    def make(rngs):
        return lib.Param(jnp.ones((2, 3)), out_sharding=("a", "b"), roles=("in", "out"), eager_sharding=False)

    @lib.vmap(transform_metadata={lib.PARTITION_NAME: "layer", "roles": "depth"})
    def look(variable):
        seen.append((variable.get_metadata("out_sharding"), variable.get_metadata("roles")))
        return variable.sum()

    variable = make(lib.Rngs(0).fork(split=4))
    assert variable.get_metadata("roles") == ("depth", "in", "out")
    assert variable.get_metadata("out_sharding") == ("layer", "a", "b")
    look(variable)
    assert set(seen) == {(("a", "b"), ("in", "out"))}


@pytest.mark.parametrize("lib", LIBRARIES, ids=["distaff", "flax"])
def test_state_of_an_optimizer_can_be_laid_out_otherwise(lib):
    with jax.set_mesh(mesh_of()):
        metadata = {"out_sharding": ("data",), "optimizer_sharding": ("model",)}
        model = lib.Linear(4, 8, kernel_metadata=metadata, rngs=lib.Rngs(0))
        optimizer = lib.Optimizer(model, optax.adam(1e-2), wrt=lib.Param)
        lib.jit(lambda m, o: o.update(m, lib.grad(lambda m: m(jnp.ones((2, 4))).sum())(m)) and None)(model, optimizer)
    assert model.kernel.sharding.spec == P("data")
    kernels = [spec for path, spec in specs(lib, lib.state(optimizer)).items() if path[-1] == "kernel"]
    assert [names for names, _ in kernels] == [("model",)] * 2


@pytest.mark.parametrize("lib", LIBRARIES, ids=["distaff", "flax"])
def test_explicit_axes_follow_through_layers(lib):
    with jax.set_mesh(mesh_of(AxisType.Explicit)):
        first = lib.Linear(4, 8, kernel_metadata={"out_sharding": (None, "model")}, use_bias=False, rngs=lib.Rngs(0))
        second = lib.Linear(8, 4, kernel_metadata={"out_sharding": ("model", None)}, use_bias=False, rngs=lib.Rngs(1))
        x = jax.device_put(jnp.ones((4, 4)), P("data", None))
        h = jax.jit(lambda first, x: first(x))(first, x)
        y = jax.jit(lambda second, h: second(h, out_sharding=P("data", None)))(second, h)
        assert jax.typeof(h).sharding.spec == P("data", "model") and jax.typeof(y).sharding.spec == P("data", None)
    expected = np.asarray(x) @ np.asarray(first.kernel[...]) @ np.asarray(second.kernel[...])
    np.testing.assert_allclose(y, expected, rtol=1e-5)


def test_named_axes_without_a_mesh_are_refused_by_name():
    metadata = {"out_sharding": ("data", None)}
    with pytest.raises(ValueError, match=r"'data', None.*set_mesh"):
        nnx.Linear(4, 8, kernel_metadata=metadata, rngs=nnx.Rngs(0))
    with nnx.use_eager_sharding(False):
        model = nnx.eval_shape(lambda: nnx.Linear(4, 8, kernel_metadata=metadata, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"kernel.*set_mesh"):
        nnx.as_abstract(model)
