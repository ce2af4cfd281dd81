"""Optimisers, metrics and averages, against Flax and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff.frontend import nnx

flax_nnx = pytest.importorskip("flax.nnx")


def model(nnx):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.kernel = nnx.Param(rngs.params.normal((3, 2)), note="kept")
            self.scale = nnx.Param(jnp.ones(2))
            self.mean = nnx.BatchStat(jnp.zeros(2))

        def __call__(self, x):
            return jnp.tanh(x @ self.kernel[...]) * self.scale[...] + self.mean[...]

    return Model(nnx.Rngs(3))


def values(nnx, *nodes):
    return [
        {"/".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(node))}
        for node in nodes
    ]


def assert_same(mine, other):
    for a, b in zip(mine, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_allclose(a[name], b[name], rtol=1e-6, atol=1e-6, err_msg=name)


TRANSFORMATIONS = {
    "adam": lambda: optax.adam(1e-2),
    "momentum": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.sgd(optax.cosine_decay_schedule(0.1, 5), 0.9)
    ),
    "adamw": lambda: optax.adamw(1e-2, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
}


@pytest.mark.parametrize("wrt", ["all", "kernel"])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_optimizer_steps_are_those_of_flax(name, wrt):
    x = jax.random.normal(jax.random.key(0), (4, 3))

    def train(nnx):
        m = model(nnx)
        of = nnx.Param if wrt == "all" else nnx.All(nnx.Param, nnx.PathContains("kernel"))
        optimizer = nnx.Optimizer(m, TRANSFORMATIONS[name](), wrt=of)
        for _ in range(3):
            grads = nnx.grad(lambda m: (m(x) ** 2).mean(), argnums=nnx.DiffState(0, of))(m)
            updates = optimizer.update(m, grads)
        return [*values(nnx, m, optimizer), {"updates": np.asarray(jax.tree.leaves(updates)[0])}]

    assert_same(train(nnx), train(flax_nnx))


def test_line_search_sees_arrays():
    """What transformations are given besides gradients may be states: their variables are taken out."""
    x, y = np.random.default_rng(0).normal(size=(2, 8, 3)).astype(np.float32)
    found = []
    for lib in (nnx, flax_nnx):
        linear = lib.Linear(3, 3, rngs=lib.Rngs(0))
        graphdef, optimizer = lib.graphdef(linear), lib.Optimizer(linear, optax.lbfgs(), wrt=lib.Param)

        def loss(model):
            return ((model(x) - y) ** 2).mean()

        for _ in range(3):
            value, grads = lib.value_and_grad(loss)(linear)
            search = dict(grad=grads, value=value, value_fn=lambda s, g=graphdef, m=lib.merge: loss(m(g, s)))
            optimizer.update(linear, grads, **search)
        found.append(values(lib, linear)[0] | {"value": np.asarray(value)})
    for name in found[1]:
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-4, atol=1e-5)


def test_optimizer_state_mirrors_the_variables():
    m = model(nnx)
    optimizer = nnx.Optimizer(m, optax.adam(1e-2), wrt=nnx.Param)
    moments = optimizer.opt_state[0].mu
    assert isinstance(moments["kernel"], nnx.OptVariable) and moments["kernel"].note == "kept"
    assert isinstance(optimizer.opt_state[0].count, nnx.OptArray)
    assert optimizer.step[...].dtype == jnp.uint32


def test_model_and_optimizer():
    m = model(nnx)
    both = nnx.ModelAndOptimizer(m, optax.sgd(0.5))
    before = np.asarray(m.scale[...])
    both.update(nnx.grad(lambda m: m.scale[...].sum())(m))
    assert both.model is m
    np.testing.assert_allclose(m.scale[...], before - 0.5)


def test_optimizer_errors_say_what_to_pass():
    m = model(nnx)
    with pytest.raises(TypeError, match=r"wrt=nnx\.Param"):
        nnx.Optimizer(m, optax.sgd(0.1))
    optimizer = nnx.Optimizer(m, optax.sgd(0.1), wrt=nnx.Param)
    with pytest.raises(TypeError, match=r"update\(model, grads\)"):
        optimizer.update(m)
    with pytest.raises(AttributeError, match="ModelAndOptimizer"):
        _ = optimizer.model
    kernel = nnx.DiffState(0, nnx.PathContains("kernel"))
    with pytest.raises(ValueError, match=r"Without a gradient.*scale"):
        optimizer.update(m, nnx.grad(lambda m: m.kernel[...].sum(), argnums=kernel)(m))
    assert optimizer.step[...] == 0


batches = st.lists(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=6), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None)
@given(batches, st.integers(0, 2**30))
def test_average_and_welford_are_those_of_all_values(batches, seed):
    average, welford = nnx.metrics.Average("x"), nnx.metrics.Welford("x")
    masked, masked_welford = nnx.metrics.Average("x"), nnx.metrics.Welford("x")
    kept = []
    for i, batch in enumerate(batches):
        mask = np.random.default_rng((seed, i)).random(len(batch)) < 0.7
        for metric in (average, welford):
            metric.update(x=jnp.array(batch), unrelated=3)
        for metric in (masked, masked_welford):
            metric.update(x=jnp.array(batch), mask=mask)
        kept += [x for x, m in zip(batch, mask, strict=True) if m]
    everything = np.concatenate(batches)
    close = dict(rtol=2e-5, atol=2e-3)
    np.testing.assert_allclose(average.compute(), everything.mean(), **close)
    for metric, seen in ((welford, everything), (masked_welford, np.array(kept))):
        if not len(seen):
            assert np.isnan(metric.compute().standard_deviation)
            continue
        found = metric.compute()
        np.testing.assert_allclose(found.mean, seen.mean(), **close)
        np.testing.assert_allclose(found.standard_deviation, seen.std(), **close)
        np.testing.assert_allclose(found.standard_error_of_mean, seen.std() / np.sqrt(len(seen)), **close)
    assert np.isnan(masked.compute()) if not kept else np.isclose(masked.compute(), np.mean(kept), **close)


def test_a_mask_is_broadcast_to_the_values():
    metric = nnx.metrics.Average()
    metric.update(values=jnp.array([[1.0, 2, 3], [4, 5, 6]]), mask=jnp.array([True, False, True]))
    assert metric.compute() == 3.5


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_accuracy_is_that_of_flax(threshold):
    key = jax.random.key(1)
    logits = jax.random.normal(key, (7, 3) if threshold is None else (7,))
    labels = jax.random.randint(key, (7,), 0, 2)
    mask = jax.random.bernoulli(key, 0.6, (7,))
    for kwargs in ({}, {"mask": mask}):
        mine, other = nnx.metrics.Accuracy(threshold), flax_nnx.metrics.Accuracy(threshold)
        for metric in (mine, other):
            metric.update(logits=logits, labels=labels, **kwargs)
            metric.update(logits=-logits, labels=labels, **kwargs)
        np.testing.assert_allclose(mine.compute(), other.compute())
        assert 0 < mine.compute() < 1


def test_metric_errors():
    with pytest.raises(TypeError, match="'loss'"):
        nnx.metrics.Average("loss").update(values=1)
    with pytest.raises(ValueError, match="integer labels"):
        nnx.metrics.Accuracy().update(logits=jnp.ones((2, 3)), labels=jnp.ones(2))
    with pytest.raises(ValueError, match=r"logits.ndim == labels.ndim \+ 1"):
        nnx.metrics.Accuracy().update(logits=jnp.ones((2, 3)), labels=jnp.ones((2, 1), int))
    with pytest.raises(ValueError, match="'reset'"):
        nnx.MultiMetric(reset=nnx.metrics.Average())
    with pytest.raises(TypeError, match="float"):
        nnx.metrics.Accuracy(threshold=1)
    for metric in (nnx.metrics.Average(), nnx.metrics.Welford()):
        with pytest.raises(ValueError, match="should be a jax array"):
            metric.update(values=2.0, mask=jnp.ones(3))


def test_multi_metric():
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))
    logits, labels = jnp.eye(4), jnp.array([0, 1, 0, 0])
    metrics.update(logits=logits, labels=labels, loss=jnp.array([1.0, 2, 3, 6]))
    assert metrics.compute() == {"accuracy": 0.5, "loss": 3.0}
    metrics.reset()
    masks = {"accuracy": jnp.array([1, 1, 0, 0]), "loss": jnp.array([0, 0, 0, 1])}
    metrics.update(logits=logits, labels=labels, loss=jnp.array([1.0, 2, 3, 6]), mask=masks)
    assert metrics.compute() == {"accuracy": 1.0, "loss": 6.0}
    assert len(jax.tree.leaves(nnx.state(metrics, nnx.metrics.MetricState))) == 4


def test_metrics_under_jit():
    @nnx.jit
    def add(metric, x):
        metric.update(values=x)

    metric = nnx.metrics.Average()
    add(metric, jnp.arange(4.0))
    add(metric, jnp.arange(4.0) + 4)
    assert metric.compute() == 3.5


@pytest.mark.parametrize("only", [..., "Param"])
def test_ema(only):
    def averaged(nnx):
        m = model(nnx)
        ema = nnx.EMA(m, 0.75, only=... if only is ... else nnx.Param)
        shadow = ema.apply_to(m)
        for i in range(3):
            m.kernel[...] += 1
            m.mean[...] += i
            ema.update(m)
        return m, ema, shadow

    m, ema, shadow = averaged(nnx)
    assert_same(values(nnx, ema, shadow), values(flax_nnx, *averaged(flax_nnx)[1:]))
    assert shadow.kernel is ema.params["kernel"] and shadow.kernel is not m.kernel
    expected = m.kernel[...] - 3 + sum(0.25 * 0.75 ** (2 - i) * (i + 1) for i in range(3))
    np.testing.assert_allclose(shadow.kernel[...], expected, rtol=1e-6)
    with pytest.raises(ValueError, match="Missing"):
        ema.update(nnx.state(m, nnx.PathContains("kernel")))


def test_train_state():
    m = model(nnx)
    graphdef, params, rest = nnx.split(m, nnx.Param, ...)

    class State(nnx.TrainState):
        rest: nnx.State

    state = State.create(graphdef, params=params, tx=optax.sgd(0.5), rest=rest)
    x = jnp.ones((1, 3))
    output, _ = state.apply("params", "rest")(x)
    np.testing.assert_allclose(output, m(x))
    state = jax.jit(lambda state: state.apply_gradients(jax.tree.map(jnp.ones_like, state.params)))(state)
    assert state.step == 1
    np.testing.assert_allclose(state.params["scale"][...], 0.5)
