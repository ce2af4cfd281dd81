"""``nnx.jit``: the same programs with either library's ``nnx``; what is kept of a structure is never stale."""

from __future__ import annotations

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff.frontend import errors, nnx
from distaff.frontend.nnx.structure import Structure


@pytest.fixture(scope="module", params=["distaff", "flax"])
def lib(request):
    return nnx if request.param == "distaff" else pytest.importorskip("flax.nnx")


def net(lib):
    class Net(lib.Module):
        def __init__(self):
            self.w = lib.Param(jnp.arange(3.0))
            self.scale, self.offset = 2, jnp.zeros(3)
            self.layers = lib.List([lib.Param(jnp.ones(3))])

    return Net()


def test_mutations_reach_the_objects(lib):
    model = net(lib)
    before = model.w

    @lib.jit
    def step(model, x):
        model.w[...] = model.w[...] + x
        model.offset = model.offset + 1
        model.scale = model.scale + 1
        model.new = lib.BatchStat(x)
        model.layers.append(lib.Param(x * 2))
        return model.w[...].sum()

    assert step(model, jnp.ones(3)) == 6
    assert model.w is before and model.scale == 3 and model.new.shape == (3,) and len(model.layers) == 2
    np.testing.assert_array_equal(model.offset, 1)
    assert step(model, jnp.ones(3)) == 9
    assert model.scale == 4 and len(model.layers) == 3


def test_objects_are_returned_by_identity(lib):
    model = net(lib)

    @lib.jit
    def both(model):
        model.twin = model.w
        return {"same": model, "fresh": lib.List([model.w, lib.Param(jnp.ones(2))])}

    out = both(model)
    assert out["same"] is model and model.twin is model.w and out["fresh"][0] is model.w
    assert out["fresh"][1].shape == (2,)


def test_arrays_in_containers_are_updated(lib):
    model = net(lib)
    model.plain = lib.data([jnp.zeros(2), (jnp.ones(1), {"x": lib.Param(1.0)})])

    @lib.jit(donate_argnums=0)
    def step(model):
        model.plain[0] = model.plain[0] + 1

    for count in (1, 2):
        step(model)
        np.testing.assert_array_equal(model.plain[0], count)
        np.testing.assert_array_equal(model.plain[1][0], 1)


def test_sharing_between_arguments(lib):
    a, b = net(lib), net(lib)

    @lib.jit
    def share(a, b):
        a.w = b.w

    share(a, b)
    assert a.w is b.w

    @lib.jit
    def add(a, b):
        a.w[...] += 1
        return b.w[...]

    np.testing.assert_array_equal(add(a, b), jnp.arange(3.0) + 1)


@pytest.mark.parametrize("graph", [True, False])
def test_without_graph_updates_only_variables_change(lib, graph):
    model = net(lib)

    @lib.jit(graph=graph, graph_updates=False)
    def step(model):
        model.w[...] = model.w[...] * 0
        model.w.set_metadata(note=1)
        model.scale, model.offset, model.new = 7, model.offset + 1, lib.Param(1)

    step(model)
    assert not model.w[...].any() and model.w.get_metadata("note") == 1
    assert model.scale == 2 and not model.offset.any() and not hasattr(model, "new")
    with pytest.raises(ValueError, match="Duplicate Param"):
        lib.jit(lambda model: model.w, graph=graph, graph_updates=False)(model)


def test_tree_mode_refuses_shared_variables(lib):
    model = net(lib)
    with pytest.raises(ValueError, match="Duplicate"):
        lib.jit(lambda a, b: None, graph=False, graph_updates=False)(model, model)


def test_static_and_donated_arguments(lib):
    model = net(lib)

    @lib.jit(static_argnames="times", donate_argnames="model")
    def step(model, x, times=1):
        model.w[...] += x * times

    old = model.w[...]
    step(model, 1.0, times=3)
    np.testing.assert_array_equal(model.w[...], jnp.arange(3.0) + 3)
    np.testing.assert_array_equal(model.layers[0][...], 1)
    assert old.is_deleted()


def test_methods_and_stages(lib):
    class Counter(lib.Module):
        def __init__(self):
            self.count = lib.Variable(jnp.array(0))

        @lib.jit
        def add(self, n):
            self.count[...] += n
            return self.count[...]

    counter = Counter()
    assert counter.add(2) == 2 and counter.count[...] == 2
    compiled = Counter.add.lower(counter, 1).compile()
    assert compiled(counter, 5) == 7 and counter.count[...] == 7
    assert lib.jit(lambda c: c.count[...] + 1).eval_shape(counter).shape == ()


def test_errors_name_the_variable_and_where_it_was_made():
    outside = nnx.Param(jnp.ones(2))

    @nnx.jit
    def step():
        outside[...] = jnp.zeros(2)

    with pytest.raises(errors.TraceContextError, match=r"Param.*test_jit\.py:\d+ \(test_errors.*as an argument"):
        step()
    with pytest.raises(ValueError, match=r"nnx\.jit\(Net\.train\)"):
        nnx.jit(net(nnx).train)


# What is kept of a structure.


def traced_forms(model):
    """A function that counts its traces, and gives what it sees of the model."""
    traces = []

    @nnx.jit
    def look(model):
        traces.append(nnx.graphdef(model))
        return nnx.as_pure(nnx.state(model))

    return look, traces


class Config:
    """Hashable, changeable."""

    def __init__(self, size):
        self.size = size

    def __eq__(self, other):
        return self.size == other.size

    def __hash__(self):
        return hash(self.size)


def changing():
    model = net(nnx)
    model.inner = net(nnx)
    model.plain = nnx.data([jnp.ones(1), {"x": nnx.Param(1.0)}])
    model.sizes, model.table, model.config = [1, 2], {"a": 1}, Config(1)
    model.flag = nnx.data(3)
    model.empty, model.last = nnx.Dict(), nnx.Param(jnp.ones(1))
    return model


CHANGES = {
    "static attribute": lambda m: setattr(m, "scale", 5),
    "static attribute of a child": lambda m: setattr(m.inner, "scale", 5),
    "equal number of another type": lambda m: setattr(m, "scale", 2.0),
    "new attribute": lambda m: setattr(m, "more", nnx.Param(jnp.ones(1))),
    "removed attribute": lambda m: delattr(m, "w"),
    "replaced variable": lambda m: setattr(m, "w", nnx.Param(jnp.full(3, 7.0, float))),
    "variable of another type": lambda m: setattr(m, "w", nnx.BatchStat(jnp.arange(3.0))),
    "variable now shared": lambda m: setattr(m, "w", m.inner.w),
    "child now shared": lambda m: setattr(m, "other", m.inner),
    "cycle": lambda m: setattr(m.inner, "back", m),
    "metadata": lambda m: m.w.set_metadata(note=1),
    "list append": lambda m: m.layers.append(nnx.Param(jnp.ones(2))),
    "list item": lambda m: m.layers.__setitem__(0, nnx.Param(jnp.full(3, 9.0, float))),
    "list removal": lambda m: m.layers.pop(),
    "list insertion": lambda m: m.layers.insert(0, 3),
    "plain list append": lambda m: m.plain.append(jnp.ones(2)),
    "plain list item": lambda m: m.plain.__setitem__(0, jnp.full(1, 8.0, float)),
    "variable in a plain dict": lambda m: m.plain[1].__setitem__("x", nnx.Param(5.0)),
    "key in a plain dict": lambda m: m.plain[1].__setitem__("y", nnx.Param(5.0)),
    "static list in place": lambda m: m.sizes.append(3),
    "static dict in place": lambda m: m.table.update(a=2),
    "changeable constant in place": lambda m: setattr(m.config, "size", 2),
    "array attribute by value": lambda m: setattr(m, "offset", jnp.full(3, 4.0, float)),
    "array attribute by shape": lambda m: setattr(m, "offset", jnp.ones((2, 2))),
    "array attribute to variable": lambda m: setattr(m, "offset", nnx.Param(jnp.ones(3))),
    "data attribute": lambda m: setattr(m, "flag", 4),
    "data attribute to None": lambda m: setattr(m, "flag", None),
    "static to data": lambda m: setattr(m, "scale", nnx.data(2)),
    "through __dict__": lambda m: vars(m).update(scale=6),
    "object.__setattr__": lambda m: object.__setattr__(m.inner, "scale", 6),
    "new __dict__": lambda m: setattr(m, "__dict__", {**vars(m), "scale": 8}),
    "renamed": lambda m: (setattr(m, "v", m.w), delattr(m, "w")),
    "moved to a child": lambda m: (setattr(m.empty, "last", m.last), delattr(m, "last")),
    "swapped": lambda m: (setattr(m, "keep", m.w), setattr(m, "w", m.inner.w), setattr(m.inner, "w", m.keep)),
    "another class": lambda m: setattr(m.inner, "__class__", type("Other", (nnx.Module,), {})),
    "value only": lambda m: m.w.set_value(jnp.full(3, 6.0, float)),
    "pop": lambda m: nnx.pop(m, nnx.Param),
    "update": lambda m: nnx.update(m, {"scale": 9, "w": jnp.full(3, 5.0, float)}),
}


SAME_STRUCTURE = {"replaced variable", "list item", "plain list item", "variable in a plain dict", "value only"}
SAME_STRUCTURE |= {"array attribute by value", "data attribute"}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(change):
    model = changing()
    look, traces = traced_forms(model)
    for _ in range(2):
        look(model)
    assert len(traces) == 1
    CHANGES[change](model)
    fresh = Structure((model,), True)
    seen = look(model)
    assert len(traces) == (1 if change in SAME_STRUCTURE else 2)
    assert nnx.graphdef(model) == fresh.graphdef and traces[-1] == fresh.graphdef
    wanted = jax.tree.leaves(fresh.values())
    assert len(jax.tree.leaves(seen)) == len(wanted)
    for got, want in zip(jax.tree.leaves(seen), wanted, strict=True):
        np.testing.assert_array_equal(got, want)


def test_undone_changes_are_not_traced_again():
    model = changing()
    look, traces = traced_forms(model)
    for flag in (True, False, True, False):
        model.scale = flag
        look(model)
    assert len(traces) == 2
    look(nnx.clone(model))
    assert len(traces) == 2


def test_nothing_is_kept_alive():
    model, other = net(nnx), net(nnx)
    add = nnx.jit(lambda a, b: a.w + b.w)
    add(model, other)
    gone = [weakref.ref(x) for x in (model, other, other.w, model.w)]
    gc.disable()
    try:
        del other
        assert gone[1]() is None and gone[2]() is None
        del model
        assert gone[0]() is None and gone[3]() is None
    finally:
        gc.enable()


def test_replaced_arrays_are_not_kept_alive():
    model = net(nnx)
    nnx.split(model)
    gone = weakref.ref(model.offset), weakref.ref(model.w[...])

    @nnx.jit
    def step(model):
        model.offset, model.w[...] = model.offset + 1, model.w[...] + 1

    step(model)
    gc.collect()
    assert gone[0]() is None and gone[1]() is None
