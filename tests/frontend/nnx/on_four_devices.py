"""What needs several devices. Not collected by itself: test_four_devices.py runs it in a process that has four."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from distaff.frontend import nnx


@pytest.fixture(params=["distaff", "flax"])
def lib(request):
    return nnx if request.param == "distaff" else pytest.importorskip("flax.nnx")


@pytest.fixture
def mesh():
    return jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))


def make(lib):
    class Model(lib.Module):
        def __init__(self):
            self.w, self.mean, self.n = (
                lib.Param(jnp.arange(8.0)),
                lib.BatchStat(jnp.zeros(2)),
                lib.Variable(jnp.array(0)),
            )

    return Model()


def test_shard_map_by_filter(lib, mesh):
    specs = lib.StateSharding({lib.Param: P("d"), ...: P()})

    @lib.shard_map(mesh=mesh, in_specs=(specs, P("d")), out_specs=P("d"))
    def step(model, x):
        assert model.w.shape == (2,)
        model.mean[...] = model.mean[...] + 1
        model.w[...] = model.w[...] * 2
        return model.w[...] + x

    model = make(lib)
    np.testing.assert_array_equal(step(model, jnp.ones(8)), 2 * jnp.arange(8.0) + 1)
    np.testing.assert_array_equal(model.w[...], 2 * jnp.arange(8.0))
    assert model.w.sharding.spec == P("d") and model.mean.sharding.spec == P()
    with pytest.raises(ValueError, match="Inconsistent aliasing"):
        step(model, model)


def test_jit_shardings_by_filter(lib, mesh):
    shardings = lib.StateSharding({lib.Param: NamedSharding(mesh, P("d")), ...: NamedSharding(mesh, P())})
    model = lib.jit(lambda: make(lib), out_shardings=shardings)()
    assert model.w.sharding.spec == P("d") and model.mean.sharding.spec == P()

    @lib.jit(in_shardings=(shardings, None), static_argnums=1)
    def step(model, times, x):
        model.w[...] = model.w[...] * times + x
        return times

    model = make(lib)
    assert step(model, 3, 1.0) == 3
    np.testing.assert_array_equal(model.w[...], jnp.arange(8.0) * 3 + 1)
    assert model.w.sharding.spec == P("d")


def test_jit_shardings_of_whole_objects(lib, mesh):
    model = make(lib)

    def step(model, x):
        model.w[...] = model.w[...] + x

    everywhere = NamedSharding(mesh, P())
    lib.jit(step, in_shardings=(everywhere, None), donate_argnums=0)(model, 1.0)
    np.testing.assert_array_equal(model.w[...], jnp.arange(8.0) + 1)
    assert model.w.sharding == everywhere and model.mean.sharding == everywhere


def test_pmap(lib):
    model, given = make(lib), jnp.arange(8.0).reshape(4, 2)
    model.w = lib.Param(given + 0)
    axes = lib.StateAxes({lib.Param: 0, ...: None})

    @lib.pmap(in_axes=(axes, 0, None), out_axes=0, axis_name="d", donate_argnums=0, static_broadcasted_argnums=2)
    def step(model, x, times):
        model.w[...] = model.w[...] + jax.lax.psum(x, "d") * times
        model.mean[...] = model.mean[...] + jax.lax.pmean(x, "d")
        return model.w[...].sum() + jax.lax.axis_index("d")

    for call in (1, 2):
        y = step(model, jnp.arange(4.0), 10)
        np.testing.assert_array_equal(model.w[...], given + 60 * call)
        np.testing.assert_array_equal(model.mean[...], jnp.full(2, 1.5 * call))
        np.testing.assert_array_equal(y, model.w[...].sum(1) + jnp.arange(4))
    assert model.n[...] == 0


def test_pmap_makes_a_model_on_each_device(lib):
    @lib.split_rngs(splits=4)
    @lib.pmap(in_axes=0, out_axes=0)
    def create(rngs):
        return lib.Linear(2, 3, rngs=rngs)

    model = create(lib.Rngs(0))
    assert model.kernel.shape == (4, 2, 3) and len(model.kernel[...].devices()) == 4
    one = lib.Linear(2, 3, rngs=lib.Rngs(lib.Rngs(0).split(4).default.key[...][1]))
    np.testing.assert_array_equal(model.kernel[1], one.kernel[...])
