"""``vmap`` and ``scan`` over drawn axes, collections and random streams, against Flax and against a Python loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distaff.frontend import linen as nn

from .conftest import assert_same_tree

SIZE, WIDTH = 3, 2
KEYS = {name: jax.random.key(i) for i, name in enumerate(("params", "noise"))}
SETTINGS = settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def block(nn, carries):
    """A module with a parameter matrix, a count, a sown value and noise; ``(carry, x) -> (carry, y)`` if it carries."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, *args):
            x = args[-1]
            kernel = self.param("kernel", nn.initializers.normal(), (WIDTH, WIDTH))
            count = self.variable("state", "count", jnp.zeros, (WIDTH,))
            y = x @ kernel + jax.random.normal(self.make_rng("noise"), (WIDTH,)) + count.value
            if self.is_mutable_collection("state"):
                count.value += 1.0
            self.sow("seen", "y", 2 * y)
            return (args[0] * 0.5 + y, jnp.outer(y, y)) if carries else jnp.outer(y, y)

    return Block


axes = st.sampled_from([0, 1, -1])


@st.composite
def vmap_options(draw):
    parameters = draw(st.sampled_from([None, 0, 1, 2, -1]))
    return dict(
        variable_axes={
            "params": parameters,
            "state": draw(st.sampled_from([0, 1, -1])),
            "seen": draw(st.sampled_from([0, 1])),
        },
        split_rngs={"params": parameters is not None, "noise": draw(st.booleans())},
        in_axes=draw(axes),
        out_axes=draw(st.sampled_from([0, 1, 2, -1])),
        axis_size=draw(st.sampled_from([None, SIZE])),
    )


@st.composite
def scan_options(draw):
    parameters, state = draw(st.sampled_from(["axis", "broadcast"])), draw(st.sampled_from(["axis", "carry"]))
    variable_axes = {"seen": draw(st.sampled_from([0, 1]))}
    if parameters == "axis":
        variable_axes["params"] = draw(st.sampled_from([0, 1, 2]))
    if state == "axis":
        variable_axes["state"] = draw(st.sampled_from([0, 1]))
    return dict(
        variable_axes=variable_axes,
        variable_broadcast="params" if parameters == "broadcast" else False,
        variable_carry="state" if state == "carry" else False,
        split_rngs={"params": parameters == "axis", "noise": draw(st.booleans())},
        in_axes=draw(axes),
        out_axes=draw(st.sampled_from([0, 1, 2])),
        reverse=draw(st.booleans()),
        unroll=draw(st.sampled_from([1, 2])),
        check_constancy_invariants=True if parameters == "broadcast" else draw(st.booleans()),
    )


def run(library, transform, options, args):
    module = getattr(library, transform)(block(library, transform == "scan"), **options)()
    # A carry that a scan makes must exist before it.
    given = {"state": {"count": jnp.zeros((WIDTH,))}} if options.get("variable_carry") == "state" else {}
    variables = (
        {**module.apply(given, *args, rngs=KEYS, mutable=["params", "state"])[1]} if given else module.init(KEYS, *args)
    )
    output, changed = module.apply(variables, *args, rngs=KEYS, mutable=["state", "seen"])

    def loss(params):
        rest = {**variables, "params": params}
        output, changed = module.apply(rest, *args, rngs=KEYS, mutable=["state", "seen"])
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves((output, changed["seen"])))

    return variables, output, changed, jax.grad(loss)(variables["params"])


def compare(flax_nn, transform, options, args):
    both = [jax.jit(lambda args, library=library: run(library, transform, options, args)) for library in (nn, flax_nn)]
    assert_same_tree(*(of_library(args) for of_library in both), rtol=1e-5)


@SETTINGS
@given(options=vmap_options(), seed=st.integers(0, 3))
def test_vmap_is_the_same_as_under_flax(flax_nn, options, seed):
    rows = np.random.default_rng(seed).standard_normal((SIZE, WIDTH)).astype(np.float32)
    args = (jnp.moveaxis(jnp.asarray(rows), 0, options["in_axes"]),)
    compare(flax_nn, "vmap", options, args)


@SETTINGS
@given(options=scan_options(), seed=st.integers(0, 3))
def test_scan_is_the_same_as_under_flax(flax_nn, options, seed):
    rows = np.random.default_rng(seed).standard_normal((SIZE, WIDTH)).astype(np.float32)
    args = (jnp.ones((WIDTH,)), jnp.moveaxis(jnp.asarray(rows), 0, options["in_axes"]))
    compare(flax_nn, "scan", options, args)


@pytest.mark.smoke
def test_a_scan_is_a_loop_over_its_layers():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, scale):
            x = jnp.sin(nn.Dense(WIDTH)(x)) * scale
            return x, x.sum()

    scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True})()
    x, scales = jnp.ones((1, WIDTH)), jnp.arange(1.0, SIZE + 1)
    variables = scan.init(KEYS, x, scales)
    carry, ys = scan.apply(variables, x, scales)
    sums = []
    for i in range(SIZE):
        x, y = Layer().apply(jax.tree.map(lambda leaf, i=i: leaf[i], variables), x, scales[i])
        sums.append(y)
    np.testing.assert_allclose(carry, x, rtol=1e-6)
    np.testing.assert_allclose(ys, jnp.stack(sums), rtol=1e-6)
    kernels = variables["params"]["Dense_0"]["kernel"]
    assert not np.allclose(kernels[0], kernels[1])


@pytest.mark.smoke
def test_a_vmap_is_a_loop_over_its_rows():
    dense = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(4)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((SIZE, 5, WIDTH)), jnp.float32)
    variables = dense.init(KEYS, x)
    rows = [nn.Dense(4).apply(jax.tree.map(lambda leaf, i=i: leaf[i], variables), x[i]) for i in range(SIZE)]
    np.testing.assert_allclose(dense.apply(variables, x), jnp.stack(rows), rtol=1e-5)
