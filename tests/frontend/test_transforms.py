"""Lifted transforms: programs that must make the same variables, outputs and gradients as under Flax."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff.frontend import core, errors
from distaff.frontend import linen as nn

from .conftest import assert_same_tree

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4)), jnp.float32)
KEYS = {name: jax.random.key(i) for i, name in enumerate(("params", "dropout", "noise"))}


def plain(tree):
    """Frozen dicts as dicts: what Flax freezes is frozen there alone."""
    return jax.tree.map(lambda x: x, core.unfreeze(tree)) if isinstance(tree, dict) else tree


# Programs: each takes a library's nn and returns a module of one argument.


def vmap_own_parameters(nn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=1, out_axes=1)
            return dense(5)(x)

    return Model()


def vmap_of_modules_as_arguments(nn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(3)

            def both(module, dense, x):
                return dense(x) + nn.Dense(3)(x)

            call = nn.vmap(
                both, variable_axes={"params": None}, split_rngs={"params": False}, in_axes=(None, 0), out_axes=0
            )
            return call(self, dense, x) + nn.Dense(3)(dense(x)[..., :1])

    return Model()


def vmap_of_methods_with_options(nn):
    class Pair(nn.Module):
        def setup(self):
            self.up, self.down = nn.Dense(6), nn.Dense(4)

        def encode(self, x):
            return self.up(x)

        def decode(self, x, scale):
            return scale * self.down(x)

    axes = dict(variable_axes={"params": 0}, split_rngs={"params": True})
    pairs = nn.vmap(Pair, methods={"encode": dict(in_axes=0, **axes), "decode": dict(in_axes=(0, None), **axes)})

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            pair = pairs()
            return pair.decode(jnp.sin(pair.encode(x)), 2.0)

    return Model()


def vmap_of_partial_class_with_statistics(nn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = functools.partial(nn.BatchNorm, use_running_average=False, momentum=0.8, axis_name="batch")
            call = nn.vmap(
                norm,
                variable_axes={"params": None, "batch_stats": None},
                split_rngs={"params": False},
                axis_name="batch",
            )
            return call()(x)

    return Model()


def scan_over_a_sequence(nn):
    class Cell(nn.Module):
        @nn.compact
        def __call__(self, state, x):
            state = jnp.tanh(nn.Dense(4)(state) + nn.Dense(4, use_bias=False)(x))
            return state, 2 * state

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            rnn = nn.scan(Cell, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
            return rnn()(jnp.zeros((x.shape[0], 4)), x)

    return Model()


def scan_over_layers(nn):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, scale, shift):
            x = nn.Dropout(0.5, deterministic=False)(nn.Dense(4)(x)) * scale + shift
            return x, (x.sum(), scale)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                Block,
                variable_axes={"params": 1},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, 0),
                out_axes=(0, nn.broadcast),
                reverse=True,
            )
            return layers()(x, jnp.float32(1.5), jnp.arange(3.0))

    return Model()


def scan_of_a_function_with_state(nn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(4)
            count = self.variable("state", "count", jnp.zeros, ())
            dense(x[:, 0])

            def body(module, dense, carry, row):
                module.variable("state", "count").value += 1.0
                module.sow("seen", "row", row.sum())
                return dense(carry + row), row * module.get_variable("state", "count")

            def swapped(module, carry, row):
                return body(module, dense_of(module), carry, row)

            def dense_of(module):
                return nn.Dense(4, name="inner")

            scan = nn.scan(
                swapped,
                variable_broadcast="params",
                variable_carry="state",
                variable_axes={"seen": 0},
                split_rngs={"params": False},
                in_axes=1,
                out_axes=1,
            )
            return scan(self, x[:, 0], x), count.value

    return Model()


def scan_under_vmap_under_remat(nn):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.remat(nn.Dense, prevent_cse=False)(4)(jnp.sin(x)), None

    layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    stacks = nn.vmap(
        layers, variable_axes={"params": 1}, split_rngs={"params": True}, in_axes=(0, None), out_axes=(0, None)
    )

    class Model(nn.Module):
        @nn.remat
        @nn.compact
        def __call__(self, x):
            return stacks(name="stacks")(x, None)[0]

    return Model()


def remat_with_static_arguments(nn):
    class Block(nn.Module):
        def setup(self):
            self.dense = nn.Dense(4)

        def __call__(self, x, train, scale=1.0):
            return self.dense(x) if train else x * scale

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            block = nn.checkpoint(Block, static_argnums=(2,))()
            return block(block(x, True), False, scale=2.0)

    return Model()


def remat_scan(nn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat_scan(nn.Dense, lengths=(2, 1, 2))(4)(x)

    return Model()


def jit_of_setup_modules(nn):
    class Model(nn.Module):
        def setup(self):
            self.dense = nn.jit(nn.Dense)(4)
            self.drop = nn.jit(nn.Dropout)(0.5, deterministic=False)

        @nn.jit
        @nn.compact
        def __call__(self, x):
            x = self.drop(self.dense(self.dense(x)))
            return self.drop(nn.Dense(3)(self.helper(x)))

        @nn.jit
        def helper(self, x):
            return self.drop(x) + jax.random.normal(self.make_rng("noise"), x.shape)

    return Model()


def fold_rngs(nn):
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x) + jax.random.normal(self.make_rng("noise"))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            noisy = nn.fold_rngs(Noisy)()
            return noisy(x) + noisy(x) + nn.fold_rngs(lambda module, x: nn.Dense(3)(x))(self, x)

    return Model()


def map_variables_transposed(nn):
    def transpose(variables):
        return jax.tree.map(lambda x: x.T, variables)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            tied = nn.map_variables(nn.Dense, "params", transpose, transpose, init=True)
            return tied(4, use_bias=False)(x) + tied(4, use_bias=False, name="other")(x)

    return Model()


def map_variables_masked_in_setup(nn):
    class Causal(nn.Module):
        def mask(self, variables):
            return variables if self.is_initializing() else jax.tree.map(jnp.triu, variables)

        def setup(self):
            dense = nn.map_variables(nn.Dense, "params", self.mask, init=self.is_initializing())
            self.dense = dense(4, use_bias=False)

        def __call__(self, x):
            return self.dense(x)

    return Causal()


def derivatives_by_variables(nn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(3)
            dense(x)
            y, backward = nn.vjp(lambda module, x: module(x) ** 2, dense, x)
            by_variables, by_x = backward(jnp.ones_like(y))
            z, _, aux = nn.vjp(lambda module, x: (module(x), x.sum()), dense, x, has_aux=True)
            tangents = {"params": jax.tree.map(jnp.ones_like, by_variables["params"])}
            _, tangent = nn.jvp(lambda module, x: module(x), dense, (x,), (jnp.ones_like(x),), tangents)
            return y, jax.tree.leaves(by_variables), by_x, z, aux, tangent

    return Model()


def derivatives_by_arguments(nn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(3)
            value = nn.value_and_grad(lambda module, x, y: (module(x) * y).sum(), dense, x, 2.0)
            aux = nn.grad(lambda module, x: (module(x).sum(), x), dense, x, has_aux=True)
            return value, aux, nn.grad(lambda module, x: module(x).sum(), dense, x)

    return Model()


def custom_gradient(nn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            def f(module, scale, x):
                return module(scale * x)

            def forward(module, scale, x):
                return nn.vjp(functools.partial(lambda module, x, scale: f(module, scale, x), scale=scale), module, x)

            def backward(scale, vjp_fn, cotangent):
                params, x = vjp_fn(cotangent)
                return jax.tree.map(jnp.sign, params), scale * x

            call = nn.custom_vjp(f, forward, backward, nondiff_argnums=(1,))
            return call(nn.Dense(3), 3.0, x)

    return Model()


def while_loop_with_keys(nn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            def goes_on(module, state):
                return module.variables["state"]["count"] < 3

            def body(module, state):
                module.variable("state", "count", lambda: jnp.array(0)).value += 1
                return nn.Dense(4)(state) + jax.random.normal(module.make_rng("noise"))

            if self.is_initializing():
                return body(self, x)
            return nn.while_loop(
                goes_on, body, self, x, carry_variables="state", split_rngs={"noise": True, "params": False}
            )

    return Model()


def branches(nn):
    class Model(nn.Module):
        def setup(self):
            self.heads = [nn.Dense(3), nn.Sequential([nn.Dense(5), nn.Dense(3)])]

        @nn.compact
        def __call__(self, x):
            self.variable("state", "count", lambda: jnp.int32(0))

            def head(i):
                def call(module, x):
                    module.put_variable("state", "count", module.get_variable("state", "count") + i + 1)
                    return module.heads[i](x)

                return call

            if self.is_initializing():
                return [head(i)(self, x) for i in range(2)][1]
            return nn.cond(x.sum() > 100.0, head(0), head(1), self, x) + nn.switch(
                jnp.int32(0), [head(0), head(1)], self, x
            )

    return Model()


def modules_from_outside(nn):
    class Wrapper(nn.Module):
        inner: Any

        @nn.remat
        @nn.compact
        def __call__(self, x):
            return self.inner["a"](x) + nn.jit(lambda module, x: module.inner["b"][0](x))(self, x)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            shared = nn.Dense(4)
            wrapper = Wrapper({"a": shared, "b": [nn.Dense(4), shared]})
            stack = nn.vmap(Wrapper, variable_axes={"params": None}, split_rngs={"params": False})
            return wrapper(shared(x)) + stack({"a": shared, "b": [nn.Dense(4)]})(x)

    return Model()


def submodule_as_argument_of_a_lifted_helper(nn):
    class Model(nn.Module):
        def setup(self):
            self.dense = nn.Dense(4)
            self.other = nn.Dense(4)

        @nn.remat
        def helper(self, dense, x):
            return self.dense(x) + dense(x) + self.other(x)

        def __call__(self, x):
            return self.helper(self.other, self.dense(x))

    return Model()


def variables_as_arguments(nn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            total = self.variable("state", "total", jnp.zeros, (4,))

            def add(module, total, x):
                total.value += x.sum((0, 1))
                return x * total.value

            return nn.remat(add)(self, total, x)

    return Model()


def name_scopes(nn):
    class Model(nn.Module):
        @nn.compact_name_scope
        def up(self, x):
            return nn.Dense(3)(x)

        @nn.compact_name_scope
        def down(self, x):
            return nn.Dense(3)(nn.Dense(3)(x)) * self.scale

        def setup(self):
            self.scale = self.param("scale", nn.initializers.ones, ())

        def __call__(self, x):
            return self.up(x) + self.down(x) + self.up(2 * x)

    return Model()


STATELESS = [
    vmap_own_parameters,
    vmap_of_modules_as_arguments,
    vmap_of_methods_with_options,
    scan_over_a_sequence,
    scan_over_layers,
    scan_under_vmap_under_remat,
    remat_with_static_arguments,
    remat_scan,
    jit_of_setup_modules,
    fold_rngs,
    map_variables_transposed,
    map_variables_masked_in_setup,
    derivatives_by_variables,
    derivatives_by_arguments,
    custom_gradient,
    modules_from_outside,
    submodule_as_argument_of_a_lifted_helper,
    name_scopes,
]
STATEFUL = [
    vmap_of_partial_class_with_statistics,
    scan_of_a_function_with_state,
    while_loop_with_keys,
    branches,
    variables_as_arguments,
]


@pytest.mark.parametrize("program", STATELESS, ids=lambda program: program.__name__)
def test_program_is_the_same_as_under_flax(same_as_flax, program):
    same_as_flax(program, X, rngs=KEYS, rtol=3e-6)


@pytest.mark.parametrize("program", STATEFUL, ids=lambda program: program.__name__)
def test_state_is_the_same_as_under_flax(same_as_flax, program):
    gradients = program is not while_loop_with_keys  # JAX has none of while loops
    same_as_flax(program, X, rngs=KEYS, mutable=["state", "batch_stats", "seen"], gradients=gradients, rtol=3e-6)


@pytest.mark.parametrize("program", [vmap_own_parameters, scan_over_layers, jit_of_setup_modules])
def test_intermediates_under_transforms_are_the_same_as_under_flax(flax_nn, program):
    captured = []
    for library in (nn, flax_nn):
        module = program(library)
        variables = module.init(KEYS, X)
        captured.append(module.apply(variables, X, rngs=KEYS, capture_intermediates=True)[1])
    assert_same_tree(*map(plain, captured), rtol=1e-6)


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
