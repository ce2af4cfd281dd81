"""Variables, objects and containers: the same programs, with either library's ``nnx``."""

from __future__ import annotations

import copy
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff.frontend import errors, nnx


@pytest.fixture(scope="module", params=["distaff", "flax"])
def lib(request):
    warnings.simplefilter("ignore", DeprecationWarning)
    return nnx if request.param == "distaff" else pytest.importorskip("flax.nnx")


def box(lib, **attributes):
    class Box(lib.Module):
        def __init__(self):
            for name, value in attributes.items():
                setattr(self, name, value)

    return Box()


# Variables.


def test_values_and_arithmetic(lib):
    v = lib.Param(jnp.array([[1.0, 2.0], [3.0, 4.0]]), note="x")
    assert v.shape == (2, 2) and v.ndim == 2 and v.note == "x" and v.T.shape == (2, 2)
    v[0, 1] = 5.0
    v[...] += 1
    np.testing.assert_array_equal(v, [[2, 6], [4, 5]])
    for got, want in [(v + 1, v[...] + 1), (1 - v, 1 - v[...]), (v @ v, v[...] @ v[...]), (-v, -v[...])]:
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.ones(2) * v, v[...])
    np.testing.assert_array_equal(jnp.sin(v), jnp.sin(v[...]))
    with pytest.raises(NotImplementedError):
        v += 1


@pytest.mark.parametrize("value", [0, jnp.zeros(2, jnp.int32), jnp.zeros(2, jnp.bfloat16), [1.0, 2.0], np.zeros(2)])
def test_assignment_keeps_the_dtype(lib, value):
    v = lib.Param(jnp.ones(2, jnp.float32))
    v[...] = value
    assert v.dtype == jnp.float32 and v.shape == (2,) and not v.get_raw_value().weak_type
    with pytest.raises(ValueError, match="broadcast"):
        v[...] = jnp.zeros(3)


def test_metadata(lib):
    v = lib.Param(1, a=1)
    v.set_metadata(b=2)
    v.set_metadata("c", 3)
    assert v.get_metadata(exclude_required=True) == {"a": 1, "b": 2, "c": 3}
    v.set_metadata({"d": 4})
    v.del_metadata("d")
    assert v.get_metadata(exclude_required=True) == {} and v.get_metadata("e", 7) == 7
    with pytest.raises(KeyError):
        v.get_metadata("e")
    with pytest.raises(AttributeError):
        v.a = 2
    assert lib.Param(1, sharding=("x",), eager_sharding=False).sharding_names == ("x",)


def test_hooks(lib):
    class Hooked(lib.Variable):
        def on_get_value(self, value):
            return value + 1

        def on_set_value(self, value):
            return value * 2

    v = Hooked(jnp.array([2.0, 3.0]))
    np.testing.assert_array_equal(v[...], [3, 4])
    v[0] = 5.0
    np.testing.assert_array_equal(v.get_raw_value(), [10, 3])
    init = lib.with_metadata(jnp.ones, on_set_value=(lambda v, x: x * 2, lambda v, x: x + 1), note=1)
    p = lib.Param(init(2))
    p[...] = jnp.zeros(2)
    np.testing.assert_array_equal(p.get_raw_value(), 1)
    assert p.note == 1


def test_mutable_arrays(lib):
    v = lib.Param(jnp.ones(2), ref=True)
    v[0] = 3.0
    lib.jit(lambda v: v.set_value(v[...] * 2))(v)
    np.testing.assert_array_equal(v[...], [6, 2])
    assert v.ref and not lib.with_vars(box(lib, v=v), ref=False).v.ref


def test_names_of_types(lib):
    assert lib.variable_name_from_type(lib.BatchStat) == "batch_stats"
    assert lib.variable_type_from_name("params") is lib.Param
    with pytest.raises(ValueError, match=r"not registered|No type"):
        lib.variable_type_from_name("unheard of")


# Objects.


@pytest.mark.parametrize("value", [[1, "p"], ("p",), {"k": {"l": "p"}}])
def test_containers_of_data_must_be_marked(lib, value):
    value = jax.tree.map(lambda x: lib.Param(1.0) if x == "p" else x, value)
    with pytest.raises(ValueError, match="Found data on value of type"):
        box(lib, x=value)
    assert 1.0 in jax.tree.leaves(box(lib, x=lib.data(value)))

    class Free(lib.Module, pytree=False):
        def __init__(self):
            self.x = value

    assert len(lib.to_flat_state(lib.state(Free()))) == 1


def test_status_of_an_attribute_stays(lib):
    made = box(lib, a=lib.Param(1.0), b=3, c=lib.data(4))
    with pytest.raises(ValueError, match="Cannot assign data value"):
        made.b = lib.Param(1.0)
    made.b = lib.data(lib.Param(2.0))
    made.a, made.c = None, 5
    assert sorted(jax.tree.leaves(made)) == [2.0, 5]
    made.a = lib.Param(7.0)
    assert sorted(jax.tree.leaves(made)) == [2.0, 5, 7.0]
    with pytest.raises(ValueError, match=r"annotated with nnx\.static"):
        made.d = lib.static(jnp.ones(1))


def test_lists_filled_during_init_are_checked_after_it(lib):
    class Late(lib.Module):
        def __init__(self):
            self.layers = []
            self.layers.append(lib.Param(1.0))

    with pytest.raises(ValueError, match=r"Found.* data on value of type"):
        Late()


def test_annotations_and_dataclasses(lib):
    class Annotated(lib.Pytree):
        __annotations__ = {"x": lib.Data[list], "y": lib.Static[int]}

        def __init__(self):
            self.x, self.y = [1, 2], 3

    @lib.dataclass
    class Fields(lib.Pytree):
        n: int
        x: jax.Array
        items: list = lib.data(default_factory=list)
        name: str = lib.static(default="yes", kw_only=True)

    made = Fields(1, jnp.array(2.0), [7])
    assert jax.tree.leaves(made) == [7, 2.0] and made.name == "yes"
    assert jax.tree.leaves(Annotated()) == [1, 2]


def test_pytree_paths_and_copies(lib):
    made = box(lib, w=lib.Param(jnp.ones(2)), items=lib.List([jnp.zeros(1), "x"]), n=1)
    made.own = lib.data({"again": made.w})
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(made)[0]]
    assert paths == [".items[0]", ".own['again'].value", ".w.value"]
    assert jax.tree.structure(made) == jax.tree.structure(jax.tree.map(lambda x: x + 1, made))
    for copied in (copy.deepcopy(made), lib.clone(made)):
        assert copied.own["again"] is copied.w and copied.w is not made.w
    assert copy.copy(made).w is made.w
    restored = pickle.loads(pickle.dumps(lib.List([lib.Param(jnp.ones(2), note=1)])))
    assert restored[0].note == 1


def test_containers(lib):
    items = lib.List([1, 2, 3])
    items.insert(1, 9)
    items.extend([4])
    del items[0]
    items.reverse()
    items[-1] = 8
    assert list(items) == [4, 3, 2, 8] and items.pop() == 8 and items[0:2] == [4, 3] and items == lib.List([4, 3, 2])
    with pytest.raises(IndexError):
        items[5]
    named = lib.Dict({"a": 1})
    named.update(b=2)
    assert named.b == 2 and dict(named) == {"a": 1, "b": 2} and named == {"a": 1, "b": 2}
    with pytest.raises(KeyError):
        named["c"]
    assert lib.Sequential(lambda x: (x, x + 1), lambda a, b: {"c": a + b}, lambda c: c * 2)(1) == 6
    assert lib.Sequential()(1) == 1


def test_modules_sow_and_switch(lib):
    made = box(lib, inner=box(lib, deterministic=False), deterministic=False)
    made.eval()
    assert made.deterministic and made.inner.deterministic
    lib.with_attributes(made, deterministic=False)
    assert made.inner.deterministic
    with pytest.raises(ValueError, match="at least one instance"):
        made.set_attributes(nothing=1)
    made.sow(lib.Intermediate, "h", 1)
    made.sow(lib.Intermediate, "h", 2)
    assert lib.pop(made, lib.Intermediate)["h"].get_value() == (1, 2) and not hasattr(made, "h")
    with pytest.raises(ValueError, match="Expected 'deterministic' to be a Variable"):
        made.sow(lib.Intermediate, "deterministic", 1)


def test_objects_do_not_change_inside_a_transform():
    made = box(nnx, w=nnx.Param(1.0))

    @jax.jit
    def assign():
        made.x = 1

    with pytest.raises(errors.TraceContextError, match="different trace level"):
        assign()
    assert not hasattr(made, "x")


# States.


def test_state_functions(lib):
    state = lib.State({"a": {0: lib.Param(1.0), 1: 2}, "b": lib.BatchStat(3.0)})
    assert lib.to_pure_dict(state) == {"a": {0: 1.0, 1: 2}, "b": 3.0}
    assert lib.to_flat_state(state).paths == (("a", 0), ("a", 1), ("b",))
    params, rest = lib.split_state(state, lib.Param, ...)
    assert lib.to_pure_dict(lib.merge_state(params, rest)) == lib.to_pure_dict(state)
    assert lib.to_pure_dict(lib.filter_state(state, lib.BatchStat)) == {"b": 3.0}
    lib.replace_by_pure_dict(state, {"a": {1: 9}, "b": 4.0})
    assert lib.to_pure_dict(state) == {"a": {0: 1.0, 1: 9}, "b": 4.0}
    with pytest.raises(ValueError, match="not available in state"):
        lib.replace_by_pure_dict(state, {"c": 1})
    assert lib.restore_int_paths({"0": {"1": 2}, "a": 3}) == {0: {1: 2}, "a": 3}
    doubled = lib.map_state(lambda path, x: (path, 2), state)
    assert doubled["a"][0] == (("a", 0), 2)
    assert jax.tree.leaves(state) == [1.0, 9, 4.0] and state.b is state["b"]
    assert lib.to_pure_dict(lib.from_flat_state({("p", 1): 1, ("p", 0): 2})) == {"p": {1: 1, 0: 2}}


def test_merge_says_what_is_missing():
    graphdef, _ = nnx.split(box(nnx, w=nnx.Param(1.0), inner=box(nnx, v=nnx.Param(2.0))))
    with pytest.raises(ValueError, match=r"Missing: \['inner\.v'\]\. Not in the graph: \['u'\]"):
        nnx.merge(graphdef, {"w": 1.0, "u": 2.0})


def test_text_of_objects_is_that_of_flax(flax_nnx):
    """Attributes in the order of their assignment, private ones left out, what is shared once, sizes of all within."""
    texts = []
    for lib in (nnx, flax_nnx):

        class Model(lib.Module):
            def __init__(self, lib=lib):
                self.metrics = lib.MultiMetric(accuracy=lib.metrics.Accuracy(), loss=lib.metrics.Average())
                self._private = 3
                self.items = lib.List([lib.Param(jnp.array(1.0), note="x"), lib.Dict(q=lib.BatchStat(1), r=2)])
                self.sizes = (1, "two")
                self.stream = lib.Rngs(3).params

        model = Model()
        texts.append(str(model))
        model.again = model.metrics
        assert "again=MultiMetric(...)" in str(model)
    assert texts[0] == texts[1]
