"""The programs of the published guides of NNX, in our words: what a user does first has to work after the import."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff.frontend import linen as nn
from distaff.frontend import nnx
from distaff.frontend.nnx import bridge


class Block(nnx.Module):
    def __init__(self, din, dout, *, rngs):
        self.linear = nnx.Linear(din, dout, rngs=rngs)
        self.norm = nnx.BatchNorm(dout, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.dropout(self.norm(self.linear(x))))


class MLP(nnx.Module):
    def __init__(self, din, dmid, dout, *, rngs):
        self.block = Block(din, dmid, rngs=rngs)
        self.head = nnx.Linear(dmid, dout, rngs=rngs)

    def __call__(self, x):
        return self.head(self.block(x))


def test_basics_a_stateful_counter_and_surgery():
    class Counter(nnx.Module):
        def __init__(self):
            self.count = nnx.Variable(jnp.array(0))

        def __call__(self):
            self.count[...] += 1

    counter = Counter()
    nnx.jit(lambda c: c())(counter)
    counter()
    assert counter.count[...] == 2

    class LoRA(nnx.Module):
        def __init__(self, linear, rank, rngs):
            self.linear = linear
            self.a = nnx.Param(rngs.params.normal((linear.in_features, rank)))
            self.b = nnx.Param(jnp.zeros((rank, linear.out_features)))

        def __call__(self, x):
            return self.linear(x) + x @ self.a[...] @ self.b[...]

    rngs = nnx.Rngs(0)
    model = MLP(4, 8, 2, rngs=rngs)
    model.eval()
    x = jnp.ones((1, 4))
    before = model(x)
    model.block.linear = LoRA(model.block.linear, 2, rngs)
    np.testing.assert_allclose(model(x), before, rtol=1e-6)
    assert {path[-1] for path, _ in nnx.to_flat_state(nnx.state(model, nnx.PathContains("linear")))} == {
        "a",
        "b",
        "kernel",
        "bias",
    }


def test_transforms_an_ensemble_and_scanned_layers():
    @nnx.split_rngs(splits=5)
    @nnx.vmap
    def create(rngs):
        return Block(4, 4, rngs=rngs)

    layers = create(nnx.Rngs(0))
    assert layers.linear.kernel.shape == (5, 4, 4)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, layer):
        return layer(x)

    assert forward(jnp.ones((3, 4)), layers).shape == (3, 4)
    assert layers.norm.mean.shape == (5, 4)
    rows = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, jnp.ones((3, 4)))
    assert rows.shape == (5, 3, 4)


def test_randomness_dropout_masks_follow_the_seed():
    model = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=42))
    x = jnp.ones((2, 32))
    first, second = model(x), model(x)
    assert not (first == second).all()
    nnx.reseed(model, dropout=7)
    third = model(x)
    nnx.reseed(model, dropout=7)
    assert (model(x) == third).all()

    class Noise(nnx.Module):
        def __init__(self, rngs):
            self.rngs = rngs

        def __call__(self):
            return self.rngs.noise.normal(())

    model = Noise(nnx.Rngs(0))
    draws = [float(nnx.jit(lambda m: m())(model)) for _ in range(3)]
    assert len(set(draws)) == 3
    again = Noise(nnx.Rngs(0))
    assert [float(again()) for _ in range(3)] == pytest.approx(draws)


def test_filters_split_a_model_into_groups():
    model = MLP(4, 8, 2, rngs=nnx.Rngs(0))
    graphdef, params, stats, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    assert {type(v) for _, v in nnx.to_flat_state(params)} == {nnx.Param}
    assert len(nnx.to_flat_state(stats)) == 2 and len(nnx.to_flat_state(rest)) == 2
    kernels = nnx.state(model, nnx.All(nnx.Param, lambda path, v: path[-1] == "kernel"))
    assert len(nnx.to_flat_state(kernels)) == 2
    merged = nnx.merge(graphdef, params, stats, rest)
    merged.eval()
    model.eval()
    np.testing.assert_array_equal(merged(jnp.ones((1, 4))), model(jnp.ones((1, 4))))
    with pytest.raises(ValueError, match="remainder"):
        nnx.split(model, nnx.Param)


def test_checkpointing_with_orbax(tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint")
    model = MLP(4, 8, 2, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", params)
        checkpointer.wait_until_finished()
        other = MLP(4, 8, 2, rngs=nnx.Rngs(1))
        graphdef, state, rest = nnx.split(other, nnx.Any(nnx.Param, nnx.BatchStat), ...)
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(np.zeros_like, nnx.to_pure_dict(state)))
    nnx.replace_by_pure_dict(state, restored)
    loaded = nnx.merge(graphdef, state, rest)
    for m in (loaded, model):
        m.eval()
    np.testing.assert_array_equal(loaded(jnp.ones((1, 4))), model(jnp.ones((1, 4))))


def test_sharding_by_names():
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    class Sharded(nnx.Module):
        def __init__(self, rngs):
            init = nnx.with_partitioning(jax.nn.initializers.lecun_normal(), ("embed", "mlp"))
            self.up = nnx.Linear(4, 8, kernel_init=init, rngs=rngs)

        def __call__(self, x):
            return self.up(x)

    with jax.set_mesh(mesh), nnx.logical_axis_rules([("embed", "data"), ("mlp", "model")]):
        model = nnx.jit(lambda: Sharded(nnx.Rngs(0)))()
        specs = nnx.get_partition_spec(nnx.state(model))
        assert specs["up"]["kernel"].get_raw_value() == jax.sharding.PartitionSpec("data", "model")
        shardings = nnx.get_named_sharding(nnx.state(model), mesh)
        assert shardings["up"]["kernel"].get_raw_value().mesh == mesh
        _, abstract = nnx.get_abstract_model(lambda: Sharded(nnx.Rngs(0)), mesh)
        assert abstract["up"]["kernel"].get_raw_value().sharding.spec == jax.sharding.PartitionSpec("data", "model")
        assert model(jnp.ones((2, 4))).shape == (2, 8)


def test_performance_the_functional_loop_is_the_same():
    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(8, 4)).astype(np.float32), rng.integers(0, 2, 8)) for _ in range(4)]

    def loss_of(model, batch):
        return optax.softmax_cross_entropy_with_integer_labels(model(batch[0]), batch[1]).mean()

    def start():
        model = MLP(4, 8, 2, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    def step(model, optimizer, batch):
        loss, grads = nnx.value_and_grad(loss_of)(model, batch)
        optimizer.update(model, grads)
        return loss

    model, optimizer = start()
    train = nnx.jit(step)
    losses = [float(train(model, optimizer, batch)) for batch in batches]
    graphdef, state = nnx.split(start())

    @jax.jit
    def functional(state, batch):
        model, optimizer = nnx.merge(graphdef, state)
        loss = step(model, optimizer, batch)
        return loss, nnx.state((model, optimizer))

    for batch, loss in zip(batches, losses, strict=True):
        found, state = functional(state, batch)
        np.testing.assert_allclose(found, loss, rtol=1e-5)
    partial_train = nnx.cached_partial(train, *start())
    np.testing.assert_allclose([float(partial_train(batch)) for batch in batches], losses, rtol=1e-5)


def test_bridge_a_linen_layer_inside_an_nnx_model_trains():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.dense = bridge.ToNNX(nn.Dense(8), rngs=rngs)
            self.head = nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x):
            return self.head(jnp.tanh(self.dense(x)))

    x = jnp.linspace(-1, 1, 16)[:, None]
    model = bridge.lazy_init(Model(nnx.Rngs(0)), x)
    optimizer = nnx.Optimizer(model, optax.adam(0.05), wrt=nnx.Param)

    @nnx.jit
    def train(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: ((m(x) - x**2) ** 2).mean())(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(train(model, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.2 * losses[0]


def test_tutorial_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    images, labels = (digits.images / 16.0).astype(np.float32)[..., None], digits.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(images))
    train_at, test_at = order[:1500], order[1500:]

    class CNN(nnx.Module):
        def __init__(self, *, rngs):
            self.conv = nnx.Conv(1, 16, kernel_size=(3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(16, rngs=rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)
            self.head = nnx.Linear(4 * 4 * 16, 10, rngs=rngs)
            self.pool = partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))

        def __call__(self, x):
            x = self.pool(jax.nn.relu(self.norm(self.conv(x))))
            return self.head(self.dropout(x.reshape(x.shape[0], -1)))

    model = CNN(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(5e-3, 0.9), wrt=nnx.Param)
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))

    def loss_fn(model, image, label):
        logits = model(image)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean(), logits

    @nnx.jit
    def train_step(model, optimizer, metrics, image, label):
        (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, image, label)
        metrics.update(loss=loss, logits=logits, labels=label)
        optimizer.update(model, grads)

    for _ in range(3):
        for i in range(0, 1500, 100):
            at = train_at[i : i + 100]
            train_step(model, optimizer, metrics, images[at], labels[at])
        trained = metrics.compute()
        metrics.reset()
    evaluated = nnx.view(model, deterministic=True, use_running_average=True)
    _, logits = nnx.jit(loss_fn)(evaluated, images[test_at], labels[test_at])
    metrics.update(loss=0.0, logits=logits, labels=labels[test_at])
    assert float(trained["accuracy"]) > 0.9
    assert float(metrics.compute()["accuracy"]) > 0.9
