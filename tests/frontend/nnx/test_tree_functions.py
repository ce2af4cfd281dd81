"""Specifications, trees of states, captures and partial functions, with either library's ``nnx``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff.frontend import nnx


@pytest.fixture(scope="module", params=["distaff", "flax"])
def lib(request):
    return nnx if request.param == "distaff" else pytest.importorskip("flax.nnx")


def stack(lib, size=3):
    class Block(lib.Module):
        def __init__(self):
            self.w = lib.Param(jnp.arange(2.0 * size).reshape(size, 2))
            self.shared = lib.BatchStat(jnp.ones(2))

        def __call__(self, x):
            self.sow(lib.Intermediate, "seen", x)
            return x * self.w + self.shared

    return Block()


@pytest.mark.parametrize("graph", [False, True])
def test_prefixes(lib, graph):
    model = stack(lib)
    axes = lib.prefix(model, {lib.Param: 0, ...: None}, graph=graph)
    if graph:
        assert axes.state["w"] == 0 and axes.state["shared"] is None
    else:
        assert axes.w == 0 and axes.shared is None
        y = jax.vmap(lambda m, x: x * m.w + m.shared, in_axes=(axes, None))(model, jnp.ones(2))
        np.testing.assert_array_equal(y, model.w + 1)
    mapped = lib.vmap(lambda m, x: x * m.w + m.shared, in_axes=(axes, None), graph=graph, graph_updates=False)
    np.testing.assert_array_equal(mapped(model, jnp.ones(2)), model.w + 1)
    with pytest.raises(ValueError, match="No filter matched"):
        lib.prefix(model, {lib.Param: 0}, graph=graph)


def test_what_a_specification_may_not_have(lib):
    updates, tree = {"graph": True, "graph_updates": True}, {"graph": False}
    for transform, name, cls in ((lib.vmap, "in_axes", lib.StateAxes), (lib.jit, "in_shardings", lib.StateSharding)):
        with pytest.raises(ValueError, match="Graph nodes are not allowed as prefixes"):
            transform(len, **{name: stack(lib)}, **updates)
        with pytest.raises(ValueError, match=f"cannot contain `{cls.__name__}` objects"):
            transform(len, **{name: cls({...: None})}, **tree)
    with pytest.raises(ValueError, match="cannot contain `DiffState` objects"):
        lib.grad(len, argnums=lib.DiffState(0, ...), **tree)


def test_trees_with_prefixes(lib):
    model = stack(lib)
    given = []

    def split(context, path, prefix, x):
        given.append((jax.tree_util.keystr(path), prefix))
        return lib.NodeStates.from_split(*context.split(x, lib.Param, ...))

    tree = lib.to_tree((model, 1, {"again": model}), prefix=(0, None, 0), split_fn=split)
    assert given == [("[0]", 0), ("[2]['again']", 0)] and tree[1] == 1
    assert len(tree[0].states) == 2 and not lib.to_flat_state(tree[2]["again"].states[0])
    first, _, again = lib.from_tree(tree)
    assert first is again["again"] and first is not model
    with pytest.raises(ValueError, match="Inconsistent aliasing"):
        lib.to_tree((model, 1, {"again": model}), prefix=(0, None, 1))


def test_captures_go_through_transforms(lib):
    model = stack(lib)
    axes = lib.StateAxes({lib.Param: 0, lib.Intermediate: 0, ...: None})

    @lib.jit
    def rows(m, x):
        return lib.vmap(lambda m, x: m(x), in_axes=(axes, None), graph=True, graph_updates=True)(m, x)

    y, seen = lib.capture(rows, lib.Intermediate)(model, 2 * jnp.ones(2))
    np.testing.assert_array_equal(y, 2 * model.w + 1)
    np.testing.assert_array_equal(seen["seen"][0], jnp.full((3, 2), 2.0))
    assert not hasattr(model, "seen") and not hasattr(model, "__captures__")


def test_loops_are_traced_once(lib):
    model, traces = stack(lib), []

    @lib.scan(in_axes=(lib.Carry, 0), out_axes=(lib.Carry, 0))
    def forward(x, m):
        traces.append(x)
        return x + m, x

    for times in range(3):
        _, y = forward(jnp.full(2, float(times)), model.w[...])
        assert y.shape == (3, 2)
    assert len(traces) == 1


def test_partial_functions(lib):
    model = stack(lib)

    def count(m, x):
        m.shared[...] += x
        return m.shared.sum()

    partial = lib.jit_partial(count, model, graph=True, graph_updates=False)
    assert partial(1.0) == 4
    assert partial.lower(1.0).compile()(1.0) == 6
    np.testing.assert_array_equal(model.shared[...], [3, 3])

    cached = lib.cached_partial(lib.jit(lambda kept, m: kept), model)
    kept = cached(model)
    assert kept is not model and kept is cached(model) and kept.w is model.w


def test_shapes_of_compiled_functions(lib):
    model = stack(lib)

    @lib.jit(static_argnums=1, static_argnames="name")
    def grow(m, times, name):
        m.w[...] *= 2
        return {name: jnp.concatenate([m.w[...]] * times)}

    assert grow.eval_shape(model, 3, name="rows") == {"rows": jax.ShapeDtypeStruct((9, 2), jnp.float32)}
    np.testing.assert_array_equal(model.w[...], stack(lib).w[...])


def test_captured_and_aliased_results(lib):
    v = lib.Param(jnp.arange(3.0))
    with pytest.raises(ValueError, match="Cannot return captured Variable"):
        lib.vmap(lambda x: v, graph_updates=False)(jnp.ones(3))
    with pytest.raises(ValueError, match="different trace level"):
        lib.vmap(lambda x: lib.Dict(v=v), graph_updates=True, graph=True)(jnp.ones(3))
    with pytest.raises(ValueError, match="does not support Variable aliasing"):
        lib.jit(lambda v: v, graph=False)(v)
    with pytest.raises(ValueError, match="found at paths"):
        lib.jit(lambda a, b: None, graph=False)(v, v)
    twice = lib.jit(lambda: [lib.Param(jnp.ones(1))] * 2, graph_updates=False)()
    assert twice[0] is twice[1]


def test_streams_by_rules(lib):
    rngs = lib.Rngs(params=0, dropout=1)
    made = lib.with_rngs(rngs, split={"params": 3}, fork=..., graph_updates=False)
    assert made.params.key.shape == (3,) and made.dropout.key.shape == ()
    with pytest.raises(ValueError, match="multiple rules"):
        lib.with_rngs(rngs, split={"params": 3}, fork="params", graph_updates=False)

    left = []
    jax.jit(lambda: left.append(lib.Rngs(0)))()
    with pytest.raises(Exception, match="different trace level"):
        left[0]()


def test_states_with_definitions(lib):
    model = lib.Linear(2, 3, rngs=lib.Rngs(0))
    state = lib.unpack(model)
    paths, of_state = ([path for path, _ in jax.tree.leaves_with_path(x)] for x in (state, lib.state(model)))
    assert paths == of_state and len(paths) == 2
    state.bias = lib.Param(jnp.ones(3))
    np.testing.assert_array_equal(lib.merge(state).bias[...], jnp.ones(3))
    with pytest.raises(ValueError, match="GraphDef must be the same"):
        lib.merge(state, lib.unpack(lib.Dict(a=lib.Param(1))))
    with pytest.raises(ValueError, match="Expected GraphState object"):
        lib.merge(state, lib.state(model))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'state'"):
        lib.merge(lib.graphdef(model))


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(4)), drop=st.integers(0, 3))
def test_numbers_of_objects(order, drop):
    """What was split with numbers is changed in place by them, however the attributes were exchanged."""
    for lib in (nnx, pytest.importorskip("flax.nnx")):
        node = lib.Dict({f"x{i}": lib.Param(jnp.array(i)) for i in range(4)})
        variables = [node[f"x{i}"] for i in range(4)]
        numbers = lib.graphlib.RefMap()
        graphdef, state = lib.graphlib.flatten(node, ref_index=numbers, graph=True)
        assert len(numbers) == 5 and all(v in numbers for v in (node, *variables))

        inside = lib.graphlib.IndexMap()
        copy = lib.graphlib.unflatten(graphdef, state.to_nested_state(), index_ref=inside)
        for i, source in enumerate([copy[f"x{j}"] for j in order]):
            copy[f"x{i}"] = source
        del copy[f"x{drop}"]
        outer = lib.graphlib.RefMap.from_indexmap(inside)
        changed, state = lib.graphlib.flatten(copy, ref_index=lib.graphlib.RefMap(), ref_outer_index=outer, graph=True)
        outside = lib.graphlib.IndexMap.from_refmap(numbers)
        same = lib.graphlib.unflatten(changed, state.to_nested_state(), outer_index_outer_ref=outside)
        assert same is node and set(node) == {f"x{i}" for i in range(4) if i != drop}
        assert all(node[f"x{i}"] is variables[j] for i, j in enumerate(order) if i != drop)
