"""Lifted transforms: what they trace, share, refuse and name."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff.frontend import core, errors, serialization, struct
from distaff.frontend import linen as nn

from .conftest import KEYS, X, assert_same_tree


def test_remat_recomputes_and_keeps_less():
    class Model(nn.Module):
        remat: bool

        @nn.compact
        def __call__(self, x):
            def block(module, x):
                return jnp.sin(jnp.sin(nn.Dense(4)(x)))

            return (nn.remat(block) if self.remat else block)(self, x).sum()

    counts = []
    for remat in (False, True):
        model = Model(remat)
        variables = model.init(KEYS, X)
        text = str(jax.make_jaxpr(jax.grad(model.apply))(variables, X))
        counts.append(text.count(" sin "))
    assert counts[1] > counts[0]


def test_jit_traces_once_for_equal_modules_and_replays_what_the_trace_did():
    traces = []

    class Noisy(nn.Module):
        features: int

        @nn.compact
        def __call__(self, x):
            traces.append(self.features)
            return nn.Dense(self.features)(x) + jax.random.normal(self.make_rng("noise"), ())

    compiled = nn.jit(Noisy)

    class Model(nn.Module):
        features: int = 4

        @nn.compact
        def __call__(self, x):
            first = compiled(self.features, name="a")
            return first(x), compiled(self.features, name="b")(x), first(x)

    model = Model()
    variables = model.init(KEYS, X)
    traces.clear()
    outputs = [model.apply(variables, X, rngs=KEYS) for _ in range(2)]
    # The second call of "a" has drawn a key already, which is another state.
    assert traces == [4, 4]
    assert_same_tree(*outputs)
    a, _, again = outputs[0]
    assert not np.allclose(a, again)
    Model(5).init(KEYS, X)
    assert set(traces) == {4, 5}


def test_jit_refuses_fields_that_cannot_be_compared():
    class Model(nn.Module):
        table: Any

        @nn.jit
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x)

    with pytest.raises(ValueError, match="'table' is not hashable"):
        Model(jnp.ones(3)).init(KEYS, X)
    assert Model(np.ones(3)).init(KEYS, X)


def test_functions_of_scopes_are_lifted():
    def dense(scope, x, features=3):
        kernel = scope.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], features))
        return x @ kernel

    def model(scope, x):
        inner = scope.child(dense, "inner")
        y, backward = core.lift.vjp(lambda scope, x: dense(scope, x), scope.push("vjp"), x)
        by_variables, _ = backward(jnp.ones_like(y))
        own = core.vmap(dense, variable_axes={"params": 0}, split_rngs={"params": True})(scope.push("own"), x)
        return inner(x) + y + own, by_variables

    x = X[0]
    _, variables = core.init(model)(jax.random.key(0), x)
    output, by_variables = core.apply(model)(variables, x)
    params = variables["params"]
    np.testing.assert_allclose(by_variables["params"]["kernel"], jnp.broadcast_to(x.sum(0)[:, None], (4, 3)), rtol=1e-6)
    expected = x @ params["inner"]["kernel"] + x @ params["vjp"]["kernel"]
    expected += jnp.einsum("bi,bio->bo", x, params["own"]["kernel"])
    np.testing.assert_allclose(output, expected, rtol=1e-5)


def test_swapped_collections():
    def body(scope):
        return scope.get_variable("a", "x"), scope.get_variable("b", "x")

    swapped = core.apply(core.lift.swap_collection(body, "a", "b"))
    assert swapped({"a": {"x": 1}, "b": {"x": 2}}) == (2, 1)


def test_scopes_below_one_another_cross_together():
    def model(scope, x):
        child = scope.push("child")

        def both(scopes, x):
            outer, inner = scopes
            inner.put_variable("state", "y", x)
            assert outer.get_variable("state", "child")["y"] is inner.get_variable("state", "y")
            outer.put_variable("state", "z", 2 * x)
            return x

        return core.remat(both)((scope, child), x)

    _, state = core.apply(model, mutable=["state"])({}, jnp.float32(3))
    assert jax.tree.map(float, state) == {"state": {"child": {"y": 3.0}, "z": 6.0}}


def test_one_way_collections():
    def body(scope, x):
        scope.put_variable("out", "y", x + scope.get_variable("in", "b"))
        return x

    lifted = core.vmap(body, variable_axes={"in": core.lift.In(None), "out": core.lift.Out(0)}, split_rngs={})
    _, state = core.apply(lifted, mutable=["in", "out"])({"in": {"b": jnp.float32(1)}}, jnp.arange(3.0))
    np.testing.assert_array_equal(state["out"]["y"], [1, 2, 3])
    assert state["in"] == {"b": jnp.float32(1)}


def test_keyword_arguments_are_refused_aloud():
    dense = nn.vmap(nn.Dense, variable_axes={"params": None}, split_rngs={"params": False})(3)
    with pytest.warns(RuntimeWarning, match="vmap takes no keyword arguments"):
        dense.init(KEYS, X, inputs=2)


@pytest.mark.parametrize("transform", ["vmap", "scan"])
def test_metadata_boxes_get_and_lose_the_axis(flax_nn, transform):
    shapes = []
    for library in (nn, flax_nn):
        init = library.with_partitioning(library.initializers.lecun_normal(), ("in", "out"))

        class Block(library.Module):
            @library.compact
            def __call__(self, x, _=None, library=library, init=init):
                x = library.Dense(4, kernel_init=init, use_bias=False)(x)
                return (x, None) if transform == "scan" else x

        options = dict(
            variable_axes={"params": 1},
            split_rngs={"params": True},
            metadata_params={library.PARTITION_NAME: "layers"},
        )
        block = library.scan(Block, length=2, **options)() if transform == "scan" else library.vmap(Block, **options)()
        args = (X, None) if transform == "scan" else (X,)
        variables = block.init(KEYS, *args)
        block.apply(variables, *args)
        kernel = variables["params"]["Dense_0"]["kernel"]
        shapes.append((kernel.names, kernel.value.shape))
        named = library.add_metadata_axis(Block, {"params": 0}, {library.PARTITION_NAME: "extra"})()
        shapes.append(named.init(KEYS, X)["params"]["Dense_0"]["kernel"].names)
    assert shapes[:2] == shapes[2:]
    assert shapes[0] == (("in", "layers", "out"), (4, 2, 4))


def test_an_unnamed_axis_of_a_partitioned_variable_is_refused():
    init = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
    dense = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(3, kernel_init=init)
    with pytest.raises(errors.PartitioningUnspecifiedError):
        dense.init(KEYS, X)


def test_named_calls_reach_the_program():
    class Model(nn.Module):
        @nn.named_call
        def special(self, x):
            return jnp.sin(x)

        def __call__(self, x):
            return self.special(x)

    model = Model()
    with nn.override_named_call(False):
        lowered = jax.jit(lambda x: model.apply({}, x)).lower(X)
    assert "Model.special" in lowered.as_text(debug_info=True)


def test_filters_are_keys_of_split_rngs():
    module = nn.Module().bind({}, rngs={"noise": jax.random.key(0)})

    def body(module, state):
        return state[0] + 1, jax.random.normal(module.make_rng("noise"))

    splits = {"params": False, nn.DenyList(("params",)): True}
    steps, last = nn.while_loop(lambda m, s: s[0] < 3, body, module, (0, jnp.zeros(())), split_rngs=splits)
    assert steps == 3 and last != 0


def test_jit_of_a_method_that_binds_the_module_itself():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(x)

        @nn.jit
        def init_with_output(self, rngs, *args, **kwargs):
            return super().init_with_output(rngs, *args, **kwargs)

    output, variables = Model().init_with_output(jax.random.key(0), X)
    np.testing.assert_allclose(output, Model().apply(variables, X), rtol=1e-6)


def test_jit_compares_serializable_fields_by_their_state():
    class Config:
        __hash__ = None

        def __init__(self, size):
            self.size = size

    serialization.register_serialization_state(Config, lambda c: {"size": c.size}, lambda c, s: Config(s["size"]))
    traced = []

    class Model(nn.Module):
        config: Config

        @nn.jit
        @nn.compact
        def __call__(self, x):
            traced.append(self.config.size)
            return x * self.config.size

    for size in (2, 2, 3):
        assert Model(Config(size)).apply({}, 1.0) == size
    assert traced == [2, 3]


def test_boxes_may_have_no_axis_inside_vmap(flax_nn):
    """The size of the axis is that of the boxes' own making, as ``remove_axis`` gives it."""

    class Mean(struct.PyTreeNode, core.AxisMetadata):
        value: Any

        def unbox(self):
            return self.value

        def replace_boxed(self, val):
            return self.replace(value=val)

        def add_axis(self, index, params):
            return self.replace(value=jnp.mean(self.value, axis=index))

        def remove_axis(self, index, params):
            return self.replace(value=jnp.broadcast_to(self.value, (params["axis_size"],)))

    class Row(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x * self.variable("aux", "v", lambda: Mean(jnp.ones(()))).value

    rows = nn.vmap(Row, variable_axes={"aux": 0}, metadata_params={"axis_size": 2})()
    output, variables = rows.init_with_output(jax.random.key(0), X)
    assert variables["aux"]["v"].value.shape == ()
    np.testing.assert_array_equal(rows.apply(variables, X), output)
