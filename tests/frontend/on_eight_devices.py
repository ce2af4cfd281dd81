"""What needs several devices. Not collected by itself: test_eight_devices.py runs it in a process that has eight."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tree_equality import assert_trees_equal

from distaff.frontend import jax_utils
from distaff.frontend import linen as nn
from distaff.frontend.training import checkpoints, common_utils
from distaff.frontend.training.train_state import TrainState

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")

TOKENS = jax.random.randint(jax.random.key(1), (8, 6), 0, 16)


def test_there_are_eight_devices():
    assert jax.device_count() == 8


class Block(nn.Module):
    """Attention and MLP whose parameters and activations have logical names."""

    @nn.compact
    def __call__(self, x):
        def dense(features, axis, names, name):
            init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), names)
            return nn.DenseGeneral(features, axis=axis, use_bias=False, kernel_init=init, name=name)

        q, k, v = (dense((4, 2), -1, ("embed", "heads", "head_dim"), name)(x) for name in ("q", "k", "v"))
        q = nn.with_logical_constraint(q, ("batch", "length", "heads", "head_dim"))
        attended = nn.dot_product_attention(q, k, v, mask=nn.make_causal_mask(x[..., 0]))
        x = x + dense(8, (-2, -1), ("heads", "head_dim", "embed"), "out")(attended)
        hidden = nn.with_logical_constraint(nn.relu(dense(16, -1, ("embed", "mlp"), "up")(x)), ("batch", None, "mlp"))
        return x + dense(8, -1, ("mlp", "embed"), "down")(hidden)


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
        embed = nn.Embed(16, 8, embedding_init=init)
        x = nn.with_logical_constraint(embed(tokens), ("batch", "length", "embed"))
        return embed.attend(Block()(x))


def mesh_of(data, model):
    devices = jax.devices()[: data * model]
    return jax.make_mesh((data, model), ("data", "model"), devices=devices, axis_types=(AxisType.Auto,) * 2)


def loss(variables):
    logits = Model().apply(variables, TOKENS)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:]).mean(), logits


DATA_PARALLEL = (("batch", "data"),)
TENSOR_PARALLEL = (("batch", "data"), ("heads", "model"), ("mlp", "model"), ("vocab", "model"))
FULLY_SHARDED = (("batch", "data"), ("embed", "data"), ("mlp", "model"), ("heads", "model"))

LAYOUTS = [
    ((1, 1), TENSOR_PARALLEL, P(None, "model")),
    ((2, 1), DATA_PARALLEL, P()),
    ((2, 2), FULLY_SHARDED, P("data", "model")),
    ((2, 4), TENSOR_PARALLEL, P(None, "model")),
]


def test_one_model_on_any_mesh_with_only_the_rules_changed():
    boxed = jax.jit(Model().init)(jax.random.key(0), TOKENS)
    variables = nn.unbox(boxed)
    (expected, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)
    for shape, rules, up_spec in LAYOUTS:
        mesh = mesh_of(*shape)
        shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules)
        placed = jax.device_put(variables, shardings)
        sharded = nn.meta.replace_boxed(boxed, placed)
        with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
            (value, outputs), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(sharded)
        for tree in (placed, nn.unbox(slopes)):
            kernel = tree["params"]["Block_0"]["up"]["kernel"]
            assert len(kernel.sharding.device_set) == mesh.size
            if tree is placed:
                assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, up_spec), 2)
                pieces = np.prod([mesh.shape[axis] for axis in jax.tree.leaves(tuple(up_spec))], initial=1)
                assert kernel.addressable_shards[0].data.size * pieces == kernel.size
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        assert_trees_equal(jax.device_get(outputs), jax.device_get(logits), rtol=1e-5)
        assert_trees_equal(jax.device_get(nn.unbox(slopes)), jax.device_get(gradient), rtol=1e-5)
    assert placed["params"]["Block_0"]["q"]["kernel"].sharding.spec == P(None, "model", None)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        made = jax.jit(Model().init, out_shardings=shardings)(jax.random.key(0), TOKENS)
    assert_trees_equal(jax.tree.map(lambda x: x.sharding, nn.unbox(made)), jax.tree.map(lambda x: x.sharding, placed))
    assert_trees_equal(jax.device_get(nn.unbox(made)), jax.device_get(variables), rtol=1e-6)


@functools.cache
def host_state():
    params = jax.jit(Model().init)(jax.random.key(0), TOKENS)["params"]
    state = TrainState.create(apply_fn=Model().apply, params=params, tx=optax.adam(0.1))
    return jax.device_get(state.replace(step=jnp.int32(0)))


def state_on(mesh, rules):
    specs = nn.get_partition_spec(host_state())
    placed = jax.device_put(nn.unbox(host_state()), nn.logical_to_mesh_sharding(specs, mesh, rules))
    return nn.meta.replace_boxed(host_state(), placed)


@jax.jit
def train(state):
    value, gradient = jax.value_and_grad(lambda params: loss({"params": params})[0])(state.params)
    return state.apply_gradients(grads=gradient), value


@pytest.mark.parametrize("in_background", [False, True])
def test_training_goes_on_on_another_mesh(tmp_path, in_background):
    first, second = mesh_of(2, 1), mesh_of(2, 2)
    checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler()) if in_background else None
    state = state_on(first, DATA_PARALLEL)
    with jax.set_mesh(first), nn.logical_axis_rules(DATA_PARALLEL):
        key = jax.device_put(jax.random.key(3), NamedSharding(first, P()))
        saved = {"state": state, "key": key}
        checkpoints.save_checkpoint(tmp_path, saved, 1, orbax_checkpointer=checkpointer)
        straight, expected = train(state)

    target = state_on(second, FULLY_SHARDED)
    everywhere = NamedSharding(second, P())
    for concrete in (True, False):
        place = {"state": target, "key": jax.device_put(jax.random.key(0), everywhere)}
        if not concrete:
            place = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), place)
        restored = checkpoints.restore_checkpoint(tmp_path, place, orbax_checkpointer=checkpointer)
        assert_trees_equal(restored["key"], jax.random.key(3))
        assert_trees_equal(jax.device_get(nn.unbox(restored["state"].params)), jax.device_get(nn.unbox(state.params)))
        kernel = nn.unbox(restored["state"].opt_state[0].mu)["Block_0"]["up"]["kernel"]
        assert kernel.sharding == NamedSharding(second, P("data", "model"))
    with jax.set_mesh(second), nn.logical_axis_rules(FULLY_SHARDED):
        resumed, value = train(restored["state"])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert int(resumed.step) == int(straight.step) == 1
    kernel = nn.unbox(resumed.params)["Block_0"]["up"]["kernel"]
    np.testing.assert_allclose(kernel, nn.unbox(straight.params)["Block_0"]["up"]["kernel"], atol=1e-3)


def test_replicas_and_metrics_of_eight_devices():
    flax_utils = pytest.importorskip("flax.jax_utils")
    flax_common = pytest.importorskip("flax.training.common_utils")
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": np.float32(2)}
    mine, other = jax_utils.replicate(tree), flax_utils.replicate(tree)
    assert_trees_equal(mine, other)
    assert mine["a"].sharding.device_set == set(jax.devices()) and mine["a"].shape == (8, 2, 3)
    assert_trees_equal(jax.device_get(jax_utils.unreplicate(mine)), tree | {"a": np.asarray(tree["a"])})
    some = jax_utils.replicate(tree, devices=jax.devices()[:2])
    assert some["b"].shape == (2,)
    whole = jax.device_put(tree["a"], NamedSharding(mesh_of(8, 1), P()))
    assert jax_utils.unreplicate(whole).shape == flax_utils.unreplicate(whole).shape

    metrics = [jax.pmap(lambda x: {"loss": jax.lax.pmean(x, "i")}, "i")(jnp.arange(8.0) + i) for i in range(3)]
    assert_trees_equal(common_utils.get_metrics(metrics), flax_common.get_metrics(metrics))
    np.testing.assert_array_equal(common_utils.get_metrics(metrics)["loss"], [3.5, 4.5, 5.5])
    assert common_utils.shard(jnp.zeros((16, 3))).shape == (8, 2, 3)
    keys = common_utils.shard_prng_key(jax.random.key(0))
    assert_trees_equal(keys, flax_common.shard_prng_key(jax.random.key(0)))


def test_batches_over_eight_devices():
    batches = ({"x": np.arange(16).reshape(8, 2) + i} for i in range(3))
    for i, batch in enumerate(jax_utils.prefetch_to_device(batches, 2)):
        assert [int(shard.data[0, 0]) for shard in batch["x"].addressable_shards] == [2 * d + i for d in range(8)]
    flax_utils = pytest.importorskip("flax.jax_utils")
    for size, least in itertools.product((3, 8, 11), (None, 3)):
        x = np.arange(2.0 * size).reshape(size, 2)
        results = [
            library.pad_shard_unpad(jax.pmap(lambda w, x: (w * x, x.sum(1)), in_axes=(None, 0)))(
                2.0, x, min_device_batch=least
            )
            for library in (jax_utils, flax_utils)
        ]
        assert_trees_equal(*results)
        np.testing.assert_array_equal(results[0][0], 2 * x)
