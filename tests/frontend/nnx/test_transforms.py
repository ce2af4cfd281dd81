"""Transforms of functions of objects: the same programs with either library's ``nnx``, in all three modes."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify

from distaff.frontend import nnx

flax_nnx = pytest.importorskip("flax.nnx")

SIZE, WIDTH = 3, 2
MODES = {"updates": {}, "graph": {"graph_updates": False}, "tree": {"graph": False}}
SETTINGS = settings(max_examples=12, deadline=None)
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
axes = st.sampled_from([0, 1, -1])


def arrays(tree):
    """Types of leaves and values of a result or an object, comparable between the libraries."""
    if isinstance(tree, (nnx.Variable, flax_nnx.Variable)):
        return type(tree).__name__, arrays(tree.get_raw_value())
    if isinstance(tree, (nnx.Module, flax_nnx.Module, nnx.Rngs, flax_nnx.Rngs)):
        library = nnx if isinstance(tree, nnx.Pytree) else flax_nnx
        return type(tree).__name__, arrays(library.state(tree))
    if isinstance(tree, (nnx.State, flax_nnx.State)):
        library = nnx if isinstance(tree, nnx.State) else flax_nnx
        return {path: arrays(value) for path, value in library.to_flat_state(tree)}
    if isinstance(tree, dict):
        return {key: arrays(value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return [arrays(value) for value in tree]
    if hasattr(tree, "dtype"):
        if jnp.issubdtype(tree.dtype, jax.dtypes.prng_key):
            tree = jax.random.key_data(tree)
        return str(tree.dtype), np.asarray(tree)
    return tree


def assert_same(mine, other, where="result"):
    assert type(mine) is type(other), (where, mine, other)
    if isinstance(mine, dict):
        assert mine.keys() == other.keys(), where
        for key in mine:
            assert_same(mine[key], other[key], f"{where}[{key!r}]")
    elif isinstance(mine, (tuple, list)):
        assert len(mine) == len(other), where
        for i, (a, b) in enumerate(zip(mine, other, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(mine, np.ndarray):
        np.testing.assert_allclose(mine, other, rtol=1e-6, atol=1e-6, err_msg=where)
    else:
        assert mine == other, where


def same(program, *args):
    """Run a program with both libraries and compare what it returns."""
    assert_same(arrays(program(nnx, *args)), arrays(program(flax_nnx, *args)))


def block(nnx, axes=None, seed=0):
    """A module of a matrix, a count and noise; ``axes``: where each variable has an axis of ``SIZE``, if it has one."""
    rng = np.random.default_rng(seed)

    class Block(nnx.Module):
        def __init__(self):
            places = dict(kernel=None, count=None) if axes is None else axes
            shapes = {"kernel": (WIDTH, WIDTH), "count": (WIDTH,)}
            values = {}
            for name, shape in shapes.items():
                values[name] = rng.normal(size=shape)
                if places[name] is not None:
                    values[name] = np.stack([values[name] + i for i in range(SIZE)], places[name])
            self.kernel = nnx.Param(jnp.asarray(values["kernel"], jnp.float32))
            self.count = nnx.BatchStat(jnp.asarray(values["count"], jnp.float32))
            self.scale = 2.0

        def __call__(self, x):
            self.count[...] += 1
            return jnp.tanh(x @ self.kernel[...]) * self.scale + self.count[...]

    return Block()


@SETTINGS
@given(
    kernel=st.sampled_from([None, 0, 1, 2, -1]),
    count=st.sampled_from([None, 0, 1, -1]),
    in_axis=axes,
    out_axis=axes,
    updates=st.booleans(),
    size=st.sampled_from([None, SIZE]),
)
def test_vmap_over_drawn_axes(kernel, count, in_axis, out_axis, updates, size):
    x = np.random.default_rng(1).normal(size=(4, WIDTH)).astype(np.float32)
    x = jnp.asarray(np.stack([x * (i + 1) for i in range(SIZE)], in_axis))

    def program(nnx):
        model = block(nnx, {"kernel": kernel, "count": count})
        by = {nnx.Param: kernel, nnx.BatchStat: count}
        spec = nnx.StateAxes(by) if updates else nnx.prefix(model, by)
        mapped = nnx.vmap(
            lambda m, x: m(x), in_axes=(spec, in_axis), out_axes=out_axis, axis_size=size, graph_updates=updates
        )
        return mapped(model, x), model

    if not updates:  # a prefix of Flax is for what it was made of, with another order of references
        assert_same(arrays(program(nnx)), arrays(same_with_updates(program, kernel, count, in_axis, out_axis, x)))
        return
    same(program)


def same_with_updates(program, kernel, count, in_axis, out_axis, x):
    model = block(flax_nnx, {"kernel": kernel, "count": count})
    spec = flax_nnx.StateAxes({flax_nnx.Param: kernel, flax_nnx.BatchStat: count})
    return flax_nnx.vmap(lambda m, x: m(x), in_axes=(spec, in_axis), out_axes=out_axis)(model, x), model


@SETTINGS
@given(
    kernel=st.sampled_from([0, 1, 2, -1]),
    count=st.sampled_from([0, 1, "carry"]),
    y_axis=axes,
    reverse=st.booleans(),
    unroll=st.sampled_from([1, 2]),
    first=st.booleans(),
)
def test_scan_over_drawn_axes(kernel, count, y_axis, reverse, unroll, first):
    x = jnp.ones((4, WIDTH)) / 3

    def program(nnx):
        model = block(nnx, {"kernel": kernel, "count": None if count == "carry" else count})
        spec = nnx.StateAxes({nnx.Param: kernel, ...: nnx.Carry if count == "carry" else count})
        order = (lambda a, b: (a, b)) if first else (lambda a, b: (b, a))

        @nnx.scan(in_axes=order(nnx.Carry, spec), out_axes=order(nnx.Carry, y_axis), reverse=reverse, unroll=unroll)
        def forward(*args):
            x, m = order(*args)
            y = m(x)
            return order(y, y[0] * 2)

        return forward(*order(x, model)), model

    same(program)


@modes
def test_vmap_makes_returns_and_shares(mode):
    def program(nnx):
        made = nnx.vmap(lambda x: block(nnx), axis_size=2, **mode)(jnp.ones(2))
        model = block(nnx, {"kernel": 0, "count": 0})
        by_name = nnx.vmap(lambda x, m=None: m(x), **mode)(jnp.ones((SIZE, WIDTH)), m=model)
        pair = {"m": block(nnx), "x": jnp.ones((2, SIZE))}
        nested = nnx.vmap(lambda d: d["m"](d["x"]), in_axes=({"m": None, "x": 1},), out_axes=1, **mode)(pair)
        variable = nnx.vmap(lambda v: v[...] * 2, **mode)(model.count)
        return made, by_name, model, nested, pair["m"], variable

    same(program)


def test_structure_changes_leave_the_transforms_that_pass_them_on():
    def program(nnx):
        def add(m):
            m.new, m.flag = nnx.Intermediate(m.kernel * 2), "set"
            del m.count
            return m.kernel.sum()

        model = block(nnx, {"kernel": 0, "count": 0})
        seen = nnx.vmap(add)(model), model, model.flag, hasattr(model, "count")
        other = block(nnx)
        seen += nnx.grad(add)(other), other, other.flag
        third = block(nnx)
        nnx.cond(jnp.array(True), lambda m: add(m), lambda m: add(m), third)
        return *seen, third

    same(program)


def test_objects_given_are_the_objects_returned():
    model = block(nnx, {"kernel": 0, "count": 0})
    assert nnx.vmap(lambda m: m)(model) is model
    assert nnx.vmap(lambda m: [m.kernel])(model)[0] is model.kernel
    single = block(nnx)
    carried, _ = nnx.scan(lambda m, x: (m, m(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(
        single, jnp.ones((4, WIDTH))
    )
    assert carried is single
    assert nnx.while_loop(lambda v: v[1] > 0, lambda v: (v[0], v[1] - 1), (single, 2))[0] is single
    assert nnx.cond(jnp.array(True), lambda m: m, lambda m: m, single) is single
    assert nnx.remat(lambda m: m)(single) is single


@modes
def test_scan_in_all_modes(mode):
    def program(nnx):
        layers, shared, carried = block(nnx, {"kernel": 0, "count": 0}), block(nnx, seed=5), block(nnx, seed=6)
        x = jnp.ones((4, WIDTH)) / 3
        stacked = nnx.scan(lambda x, m: m(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, **mode)(x, layers)
        again = nnx.scan(
            lambda x, m: (m(x), x.sum()), in_axes=(nnx.Carry, None), out_axes=(nnx.Carry, 0), length=3, **mode
        )(x, shared)
        along, ys = nnx.scan(lambda m, x: (m, m(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0), **mode)(
            carried, jnp.ones((3, WIDTH))
        )
        rngs = nnx.Rngs(0)
        noise = nnx.scan(
            lambda c, r: c + r.normal(()), in_axes=(nnx.Carry, None), out_axes=nnx.Carry, length=3, **mode
        )(0.0, rngs)
        return stacked, layers, again, shared, along, ys, noise, rngs

    same(program)


@modes
def test_loops(mode):
    def program(nnx):
        model = block(nnx)

        def body(v):
            m, x, n = v
            return m, m(x), n - 1

        looped = nnx.while_loop(lambda v: v[2] > v[0].count[...][0] - 9, body, (model, jnp.ones(WIDTH), 4.0), **mode)
        counted = nnx.fori_loop(2, 5, lambda i, v: (v[0], v[0](v[1]) + i), (model, jnp.ones(WIDTH)), **mode)
        return looped, counted, model

    same(program)


@modes
@pytest.mark.parametrize("which", [0, 1, 2])
def test_branches(mode, which):
    def program(nnx):
        def counts(m, x):
            m.count[...] += x
            return m.kernel.sum(), {"y": x}

        def calls(m, x):
            return m(x).sum(), {"y": x * 2}

        def reads(m, x):
            return m.kernel.sum() * 3, {"y": x * 3}

        model, other = block(nnx), block(nnx, seed=3)
        x = jnp.ones(WIDTH)
        chosen = nnx.switch(which, [counts, calls, reads], model, x, **mode)
        branch = nnx.jit(lambda m, x: nnx.cond(which > 0, counts, reads, m, x, **mode))(other, x)
        return chosen, model, branch, other

    same(program)


@modes
def test_gradients(mode):
    x = jnp.ones((4, WIDTH)) / 3

    def program(nnx):
        def loss(m, x):
            return (m(x) ** 2).mean()

        seen = []
        for argnums in (0, 1, (0, 1), -1):
            model = block(nnx)
            seen += [nnx.grad(loss, argnums=argnums, **mode)(model, x), model]
        model = block(nnx)
        seen += [
            nnx.value_and_grad(lambda d, x: (loss(d["m"], x), x * 2), has_aux=True, **mode)({"m": model, "z": x}, x)
        ]
        seen += [nnx.grad(lambda v: v.sum() * 3, **mode)(model.count)]
        seen += [nnx.grad(lambda m, x: nnx.remat(loss, **mode)(m, x), **mode)(model, x), model]
        return seen

    same(program)


def test_gradients_by_filter_and_of_shared_variables():
    x = jnp.ones(WIDTH)

    def program(nnx):
        by_count = nnx.DiffState(0, nnx.BatchStat)
        model = block(nnx)
        chosen = nnx.grad(lambda m: (m.count * m.kernel.sum()).sum(), argnums=by_count)(model)
        both = nnx.grad(lambda a, b: (a(x) * b(x)).sum(), argnums=(0, 1))(model, model)
        with_model = nnx.value_and_grad(lambda m: (m(x).sum(), m), has_aux=True)(model)
        return chosen, both, with_model, model

    same(program)


@pytest.mark.parametrize("mode", [MODES["graph"], MODES["tree"]])
def test_vjp_and_jvp(mode):
    x = jnp.ones((4, WIDTH)) / 3

    def program(nnx):
        model = block(nnx)
        out, backward = nnx.vjp(lambda m, x: m(x), model, x, **mode)
        seen = [out, backward(jnp.ones_like(out)), model]
        out, backward, aux = nnx.vjp(lambda m, x: ({"y": m(x)}, x + 1), model, x, has_aux=True, **mode)
        seen += [out, backward({"y": out["y"]}), aux, model]
        tangents = (jax.tree.map(jnp.ones_like, model), x)
        seen += [nnx.jvp(lambda m, x: m(x), (model, x), tangents, **mode), model]
        return [*seen, nnx.jvp(lambda m, x: (m(x), x.sum()), (model, x), tangents, has_aux=True, **mode)]

    same(program)


@modes
def test_custom_vjp(mode):
    updates = not mode

    def program(nnx):
        @nnx.custom_vjp(**mode)
        def f(m, z):
            m.count[...] += 1
            return jnp.sin(m.kernel[...]).sum() * z

        def forward(m, z):
            return f(m, z), (jnp.cos(m.kernel[...]), m, z)

        def backward(residuals, g):
            cos, m, z = residuals
            if updates:
                (of_m, _), g = g
                of_m = jax.tree.map(lambda x: x, of_m)
                of_m["kernel"][...] = 7 * cos * g * z
                return of_m, g
            of_m = jax.tree.map(jnp.zeros_like, m)
            of_m.kernel[...] = 7 * cos * g * z
            return of_m, g

        f.defvjp(forward, backward)
        model = block(nnx)
        return nnx.grad(f, argnums=(0, 1), **mode)(model, 3.0), model, f(model, 2.0), model

    same(program)


@modes
def test_checkify(mode):
    def program(nnx):
        model = block(nnx)
        model.kernel[...] = model.kernel[...] * jnp.inf
        error, out = nnx.checkify(lambda m: jnp.sin(m.kernel[...]), errors=checkify.float_checks, **mode)(model)
        return error.get() is not None, "sin" in error.get(), out

    same(program)


@pytest.mark.parametrize("transform", ["vmap", "scan", "jit_vmap", "pmap"])
def test_streams_under_transforms_give_the_keys_of_flax(transform):
    def program(nnx):
        rngs = nnx.Rngs(0, noise=1)
        spec = nnx.StateAxes({"noise": 0, ...: None})

        def draw(rngs):
            return rngs.noise(), rngs.noise.normal((2,)), rngs.params.normal((2,))

        size = 1 if transform == "pmap" else SIZE
        with nnx.split_rngs(rngs, splits=size, only="noise"):
            if transform == "scan":
                drawn = nnx.scan(draw, in_axes=(spec,), out_axes=0)(rngs)
            elif transform == "pmap":
                mapped = nnx.pmap(draw, in_axes=(spec,))
                drawn = mapped(rngs), mapped(rngs)
            else:
                mapped = nnx.vmap(draw, in_axes=(spec,))
                drawn = (nnx.jit(mapped) if transform == "jit_vmap" else mapped)(rngs)
        return drawn, rngs

    same(program)


def test_layers_are_made_and_scanned():
    def program(nnx):
        @nnx.split_rngs(splits=SIZE)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def create(rngs):
            return nnx.Dict(
                kernel=nnx.Param(rngs.params.normal((WIDTH, WIDTH)), out_sharding=("a", "b"), eager_sharding=False)
            )

        layers = create(nnx.Rngs(0))
        names = layers.kernel.get_metadata("out_sharding")
        y = nnx.scan(
            lambda x, m: x @ m.kernel[...],
            in_axes=(nnx.Carry, 0),
            out_axes=nnx.Carry,
            transform_metadata={nnx.PARTITION_NAME: "layers"},
        )(jnp.ones(WIDTH), layers)
        return layers, tuple(names), y, tuple(layers.kernel.get_metadata("out_sharding"))

    same(program)


def test_names_of_axes_that_do_not_fit():
    v = nnx.Param(jnp.ones((2, 2)), out_sharding=("a", "b"), eager_sharding=False)
    with pytest.raises(ValueError, match="'a', but the transform removes 'layers'"):
        nnx.vmap(lambda v: v.sum(), transform_metadata={nnx.PARTITION_NAME: "layers"})(v)
    made = nnx.vmap(
        lambda x: nnx.Param(jnp.ones((2, 2)), out_sharding=("a", "b"), eager_sharding=False),
        out_axes=-1,
        transform_metadata={nnx.PARTITION_NAME: "layers"},
    )(jnp.ones(3))
    assert made.sharding_names == ("a", "b", "layers")


def error_of(call):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    return str(caught.value)


def test_errors_name_the_variable_where_it_was_made_and_the_fix():
    here = r"test_transforms.py:\d+"

    def add_input(m, x):
        m.count[...] += x
        return x

    model = block(nnx)
    x = jnp.ones((SIZE, WIDTH))
    text = error_of(lambda: nnx.vmap(add_input, in_axes=(None, 0))(model, x))
    assert re.search(rf"BatchStat 'count' \(made at .*{here}.*give it an axis in in_axes", text)
    assert model.count.shape == (WIDTH,) and not isinstance(model.count[...], jax.core.Tracer)
    text = error_of(lambda: nnx.vmap(lambda m, x: x)(model, x))
    assert "inconsistent sizes" in text and "'count'" in text
    text = error_of(lambda: nnx.vmap(lambda a, b: 0, in_axes=(0, None))(model, model))
    assert "Inconsistent aliasing" in text and "count" in text
    text = error_of(lambda: nnx.vmap(lambda m, x: x, in_axes=(0, 0, 0))(model, x))
    assert "3 entries for 2" in text
    text = error_of(lambda: nnx.vmap(lambda m: m, graph=False)(model))
    assert "Duplicate BatchStat" in text and "nnx.clone" in text
    text = error_of(lambda: nnx.vmap(lambda m: 0, in_axes=nnx.StateAxes({...: 0}), graph=False)(model))
    assert "StateAxes" in text and "nnx.prefix" in text
    whole = block(nnx)
    whole.steps = nnx.Param(jnp.array(1))
    text = error_of(lambda: nnx.grad(lambda m: m.kernel.sum())(whole))
    assert "Param 'steps'" in text and "int32" in text and "allow_int" in text


def test_errors_of_carries():
    model = block(nnx)
    loop = dict(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    xs = jnp.ones((3, WIDTH))

    def add(m, x):
        m.new = nnx.Param(x)
        return m, x

    assert "added the Param 'new'" in error_of(lambda: nnx.scan(add, **loop)(model, xs))
    model = block(nnx)
    assert "same between iterations" in error_of(lambda: nnx.scan(lambda m, x: (block(nnx), x), **loop)(model, xs))
    assert "at the start" in error_of(lambda: nnx.scan(lambda c, x: (jnp.ones(3), x), **loop)(jnp.ones(2), xs))
    assert "other must also" in error_of(lambda: nnx.scan(lambda c, x: c, in_axes=(nnx.Carry, 0), out_axes=0))
    assert "multiple Carry" in error_of(lambda: nnx.scan(lambda c, x: c, in_axes=(nnx.Carry,) * 2, out_axes=nnx.Carry))
    assert "cannot be nested" in error_of(lambda: nnx.scan(lambda c: c, in_axes=({"a": nnx.Carry},), out_axes=0))
    assert "broadcast" in error_of(
        lambda: nnx.scan(lambda c, x: (c, x), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, None))
    )
    assert "length" in error_of(lambda: nnx.scan(lambda c: c, in_axes=nnx.Carry, out_axes=nnx.Carry)(xs))
    assert "removed" in error_of(
        lambda: nnx.while_loop(lambda m: True, lambda m: (delattr(m, "count"), m)[1], block(nnx))
    )
    assert "structure of their operands" in error_of(
        lambda: nnx.cond(jnp.array(True), lambda m: setattr(m, "flag", 1), lambda m: None, block(nnx))
    )


def test_methods_must_be_given_the_object():
    model = block(nnx)
    for transform in (nnx.vmap, nnx.grad, nnx.remat, nnx.scan):
        with pytest.raises(ValueError, match="bound methods"):
            transform(model.__call__)
