"""Train state, loss scaling, early stopping, schedules and small helpers, against Flax."""

import itertools
import math
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tree_equality import assert_trees_equal

from distaff.frontend import linen as nn
from distaff.frontend import serialization
from distaff.frontend.training import common_utils, dynamic_scale, early_stopping, lr_schedule, train_state
from distaff.frontend.training.prefetch_iterator import PrefetchIterator

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (8, 5))
Y = jnp.arange(8) % 3


def of_flax(name):
    return pytest.importorskip(f"flax.training.{name}")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(6)(x))
        return nn.Dense(3)(nn.relu(x))


class BatchState(train_state.TrainState):
    batch_stats: Any


OPTIMISERS = {
    "clipped, scheduled adam": lambda: optax.chain(
        optax.clip_by_global_norm(0.1), optax.adamw(optax.cosine_decay_schedule(1e-2, 10))
    ),
    "accumulated momentum": lambda: optax.MultiSteps(optax.sgd(0.1, momentum=0.9), every_k_schedule=2),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_training_with_batch_statistics_is_that_of_flax(name):
    flax_state = of_flax("train_state")

    class FlaxBatchState(flax_state.TrainState):
        batch_stats: Any

    model = Net()
    variables = model.init(KEY, X, train=False)

    @jax.jit
    def step(state):
        def loss(params):
            logits, updates = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats}, X, train=True, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean(), updates

        (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, batch_stats=updates["batch_stats"]), value

    ends = []
    for cls in (BatchState, FlaxBatchState):
        state = cls.create(
            apply_fn=model.apply,
            params=variables["params"],
            tx=OPTIMISERS[name](),
            batch_stats=variables["batch_stats"],
        )
        assert state.step == 0
        losses = []
        for _ in range(4):
            state, value = step(state)
            losses.append(float(value))
        assert losses[-1] < losses[0] and state.step == 4
        ends.append([state.params, state.opt_state, state.batch_stats, state.step, losses])
        if cls is BatchState:
            encoded = serialization.to_bytes(state)
            restored = serialization.from_bytes(jax.tree.map(jnp.zeros_like, state), encoded)
            assert_trees_equal(restored, jax.device_get(state))
    assert_trees_equal(*ends)


def test_collections_that_gradients_overwrite():
    flax_state = of_flax("train_state")
    params = {"params": {"w": jnp.ones(2)}, train_state.OVERWRITE_WITH_GRADIENT: {"scale": jnp.ones(1)}}
    grads = {"params": {"w": jnp.ones(2)}, train_state.OVERWRITE_WITH_GRADIENT: {"scale": jnp.full(1, 7.0)}}
    states = []
    for library in (train_state, flax_state):
        assert library.OVERWRITE_WITH_GRADIENT == train_state.OVERWRITE_WITH_GRADIENT
        state = library.TrainState.create(apply_fn=max, params=params, tx=optax.adam(0.1))
        state = state.apply_gradients(grads=grads)
        states.append([state.params, state.opt_state, state.step])
    assert_trees_equal(*states)
    assert states[0][0][train_state.OVERWRITE_WITH_GRADIENT]["scale"] == 7 and states[0][0]["params"]["w"][0] < 1


def test_a_single_array_can_be_trained_and_averaged():
    state = train_state.TrainState.create(apply_fn=jnp.sin, params=jnp.ones(3), tx=optax.sgd(0.5))
    average = optax.ema(0.5, debias=False)
    averaged = average.init(state.params)
    for _ in range(3):
        state = state.apply_gradients(grads=jax.grad(lambda p: jnp.sum(p**2) / 2)(state.params))
        mean, averaged = average.update(state.params, averaged)
    np.testing.assert_allclose(state.params, 0.125)
    np.testing.assert_allclose(mean, 0.5 / 8 + 0.25 / 4 + 0.125 / 2)


@settings(max_examples=25, deadline=None)
@given(
    finite=st.lists(st.booleans(), min_size=1, max_size=8),
    interval=st.integers(1, 3),
    minimum=st.sampled_from([None, 4.0]),
    scale=st.sampled_from([8.0, 1e38]),
)
def test_loss_scales_move_as_those_of_flax(finite, interval, minimum, scale):
    flax_scale = of_flax("dynamic_scale")
    results = []
    for library in (dynamic_scale, flax_scale):
        state = library.DynamicScale(growth_interval=interval, minimum_scale=minimum, scale=scale, growth_factor=4.0)
        seen = []
        for ok in finite:
            result = state.value_and_grad(lambda x, y: (x * y, y), argnums=(0, 1), has_aux=True)(
                jnp.float32(1e-3), jnp.float32(0.5 if ok else jnp.inf)
            )
            state = result.dynamic_scale
            seen.append([result.finite, result.aux, result.grad, state.scale, state.fin_steps])
        results.append(seen)
    for mine, other in zip(*results, strict=True):
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(a, b)
            assert jnp.result_type(a) == jnp.result_type(b)


def test_scaled_gradients_in_float16():
    def loss(w):
        return (w.astype(jnp.float16) * jnp.float16(1e-4)) ** 2

    w = jnp.float32(1e-2)
    assert jax.grad(loss)(w) == 0, "vanishes without scaling"
    scaled = jax.jit(lambda scale, w: scale.value_and_grad(loss)(w))
    too_large = scaled(dynamic_scale.DynamicScale(), w)
    assert not too_large.finite and too_large.dynamic_scale.scale == 32768
    scale, finite, value, grad = scaled(too_large.dynamic_scale, w)
    assert finite and grad.dtype == jnp.float32 and scale.fin_steps == 1
    np.testing.assert_allclose(grad, 2e-10, rtol=0.05)
    np.testing.assert_allclose(value, loss(w), atol=1e-7)
    mapped = jax.vmap(
        lambda x: dynamic_scale.DynamicScale().value_and_grad(jnp.square, axis_name="i")(x).grad, axis_name="i"
    )(jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(mapped, [4.0, 4.0])


@given(
    metrics=st.lists(st.sampled_from([0.0, 1.0, 1.05, 2.0, math.inf]), max_size=8),
    delta=st.sampled_from([0, 0.1]),
    patience=st.integers(0, 2),
)
def test_early_stopping_is_that_of_flax(metrics, delta, patience):
    mine, other = (
        library.EarlyStopping(min_delta=delta, patience=patience)
        for library in (early_stopping, of_flax("early_stopping"))
    )
    for metric in metrics:
        mine, other = mine.update(metric), other.update(metric)
        assert vars(mine) == vars(other)
    assert vars(mine.reset()) == vars(other.reset())


@settings(max_examples=20, deadline=None)
@given(warmup=st.sampled_from([0.0, 1.5]), steps=st.integers(1, 4), at=st.integers(0, 20))
def test_schedules_are_those_of_flax(warmup, steps, at):
    flax_schedule = of_flax("lr_schedule")
    for name, further in (
        ("constant", ()),
        ("stepped", ([[1, 0.5], [2.6, 0.1]],)),
        ("cosine", (5,)),
    ):
        rates = [
            getattr(library, f"create_{name}_learning_rate_schedule")(0.3, steps, *further, warmup_length=warmup)(at)
            for library in (lr_schedule, flax_schedule)
        ]
        np.testing.assert_allclose(*rates, rtol=1e-6)


@pytest.mark.parametrize("labels", [[0], [-1, 3, 4, 2], [[1, 2], [0, 3]]])
def test_one_hot_is_that_of_flax(labels):
    labels = jnp.array(labels)
    other = of_flax("common_utils")
    for values in ((1.0, 0.0), (0.9, 0.025)):
        a, b = (library.onehot(labels, 4, *values) for library in (common_utils, other))
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype and a.shape == (*labels.shape, 4)


def test_forests_are_stacked():
    forest = [{"loss": jnp.float32(i), "n": np.arange(2) + i} for i in range(3)]
    stacked = common_utils.stack_forest(forest)
    assert_trees_equal(stacked, of_flax("common_utils").stack_forest(forest))
    assert stacked["n"].shape == (3, 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("size", [1, 3])
def test_items_are_read_ahead_in_order(size):
    read = []

    def source():
        for i in range(5):
            read.append(i)
            yield i
        raise KeyError("broken")

    iterator = PrefetchIterator(source(), size)
    assert [next(iterator) for _ in range(5)] == list(range(5)) == read
    for _ in range(2):
        with pytest.raises(KeyError, match="broken"):
            next(iterator)
    assert list(PrefetchIterator(iter("abc"), size)) == ["a", "b", "c"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_reading_ahead_stops_at_its_limit_and_when_closed():
    before = threading.active_count()
    taken = iter(itertools.count())
    iterator = PrefetchIterator(taken, 2)
    assert next(iterator) == 0
    iterator.close()
    left = list(iterator)
    assert left == list(range(1, 1 + len(left))) and len(left) <= 2
    assert next(taken) <= 4
    for _ in range(100):
        if threading.active_count() <= before:
            break
        threading.Event().wait(0.02)
    assert threading.active_count() <= before, "the thread ends"
    with pytest.warns(DeprecationWarning):
        PrefetchIterator(iter(()))
