"""Struct dataclasses, state dicts, and bytes that Flax reads and writes too."""

import collections
import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tree_equality import assert_trees_equal

from distaff.frontend import core, serialization, struct
from distaff.frontend import linen as nn

Pair = collections.namedtuple("Pair", "first second")


@struct.dataclass
class Point:
    x: object
    label: str = struct.field(pytree_node=False, default="none")


class Node(struct.PyTreeNode, kw_only=True):
    value: object
    size: int = struct.field(pytree_node=False, metadata={"unit": "m"})


@pytest.fixture(scope="session")
def flax_serialization():
    return pytest.importorskip("flax.serialization")


DTYPES = ["float32", "float64", "float16", "bfloat16", "int8", "uint32", "bool", "complex64", "float8_e4m3fn", "int4"]
arrays = st.sampled_from(DTYPES).flatmap(
    lambda name: hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3).map(
        lambda shape: np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(jnp.dtype(name))
    )
)
leaves = st.one_of(
    arrays,
    arrays.map(jnp.asarray),
    st.integers(-(2**40), 2**40),
    st.floats(allow_nan=False),
    st.complex_numbers(allow_nan=False),
    st.booleans(),
    st.none(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.sampled_from([np.float32(1.5), np.int16(-3), np.bool_(True), np.complex64(1j)]),
)
trees = st.recursive(
    leaves, lambda items: st.dictionaries(st.text("ab", max_size=2), items, max_size=3) | st.lists(items, max_size=2)
)


@settings(max_examples=60, deadline=None)
@given(tree=trees)
def test_bytes_are_those_of_flax(flax_serialization, tree):
    encoded = serialization.msgpack_serialize(tree)
    assert encoded == flax_serialization.msgpack_serialize(tree)
    assert_trees_equal(tree, serialization.msgpack_restore(encoded))


@settings(max_examples=25, deadline=None)
@given(tree=st.dictionaries(st.text("ab", max_size=2), arrays | st.dictionaries(st.text("c"), arrays, max_size=2)))
def test_large_arrays_are_cut_as_flax_does_it(flax_serialization, tree):
    with pytest.MonkeyPatch.context() as patch:
        for library in (serialization, flax_serialization):
            patch.setattr(library, "MAX_CHUNK_SIZE", 12)
        encoded = serialization.msgpack_serialize(tree)
        assert encoded == flax_serialization.msgpack_serialize(tree)
    assert_trees_equal(tree, serialization.msgpack_restore(encoded))
    assert_trees_equal(tree, flax_serialization.msgpack_restore(encoded))


def test_large_arrays_in_lists_are_cut_too(monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 12)
    tree = [np.arange(7.0), {"a": [np.ones((2, 8), np.int8)]}, np.arange(9.0)[::2]]
    encoded = serialization.msgpack_serialize(tree)
    assert encoded.count(b"__msgpack_chunked_array__") == 3
    assert_trees_equal(tree, serialization.msgpack_restore(encoded))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_come_back_as_keys(flax_serialization, impl):
    tree = {"key": jax.random.key(3, impl=impl), "keys": jax.random.split(jax.random.key(4, impl=impl), (2, 3))}
    encoded = serialization.to_bytes(tree)
    restored = serialization.from_bytes(tree, encoded)
    for name, key in tree.items():
        assert restored[name].dtype == key.dtype and restored[name].shape == key.shape
        np.testing.assert_array_equal(jax.random.key_data(restored[name]), jax.random.key_data(key))
    seen_by_flax = flax_serialization.msgpack_restore(encoded)["key"]
    np.testing.assert_array_equal(seen_by_flax["data"], jax.random.key_data(tree["key"]))


def test_what_cannot_be_serialized_is_refused():
    for array in (np.array(["text"]), np.array([b"bytes"]), np.array([None]), np.zeros(2, [("a", int)])):
        with pytest.raises(ValueError, match="Only arrays of numbers"):
            serialization.msgpack_serialize({"a": array})
    with pytest.raises(TypeError):
        serialization.msgpack_serialize({"a": object()})
    with pytest.raises(ValueError):
        serialization.msgpack_restore(serialization.to_bytes({"a": np.ones(3)})[:-4])
    swapped = np.arange(3, dtype=">f4")
    np.testing.assert_array_equal(serialization.msgpack_restore(serialization.to_bytes(swapped)), swapped)


def state(library):
    """The same nested state, of either library's classes."""

    @library.struct.dataclass
    class Inner:
        x: object
        label: str = library.struct.field(pytree_node=False, default="none")

    return {
        "frozen": library.core.freeze({"a": {"b": jnp.ones(2)}, "c": 1}),
        "tuple": (1, [jnp.zeros((2, 1)), Inner(jnp.arange(3), "seen")]),
        "named": Pair({1: 2.5}, jnp.float32(4)),
        "partial": jax.tree_util.Partial(max, jnp.ones(1), key=jnp.zeros(())),
        "box": library.linen.Partitioned(jnp.ones((2, 2)), ("a", None)),
        "empty": {},
        "none": None,
    }


def both_libraries():
    flax = importlib.import_module("flax")
    importlib.import_module("flax.linen")
    ours = type("ours", (), {"struct": struct, "core": core, "linen": nn, "serialization": serialization})
    return ours, flax


def test_state_dicts_and_bytes_agree_with_flax(flax_serialization):
    ours, flax = both_libraries()
    mine, theirs = state(ours), state(flax)
    my_dict, their_dict = serialization.to_state_dict(mine), flax_serialization.to_state_dict(theirs)
    assert_trees_equal(my_dict, their_dict)
    assert serialization.to_bytes(mine) == flax_serialization.to_bytes(theirs)
    changed, same = (jax.tree.map(lambda x: x + 1, tree) for tree in (mine, theirs))
    for encoded in (serialization.to_bytes(changed), flax_serialization.to_bytes(same)):
        restored = serialization.from_bytes(mine, encoded)
        assert_trees_equal(restored, changed)
        assert type(restored["frozen"]) is core.FrozenDict and restored["named"].first == {1: 3.5}
        assert restored["tuple"][1][1].label == "seen" and restored["box"].names == ("a", None)
        assert restored["partial"].func is max
    # Restoring takes leaves as they come: of the state, whatever the target has.
    assert serialization.from_state_dict({"a": 1, "b": jnp.ones(2)}, {"a": "x", "b": 3, "more": 0}) == {
        "a": "x",
        "b": 3,
    }


MISFITS = [
    ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}}, r"contains keys {'c'} which are not present in state dict at path ./a"),
    ([1, 2], {"0": 1}, "do not match, got 2 and 1 at path ."),
    (Pair(1, 2), {"first": 1}, "do not match, got {'first'} and {'first', 'second'}"),
    ({"p": Point(1)}, {"p": {}}, "Missing field x in state dict while restoring an instance of Point, at path ./p"),
    (Point(1), {"x": 1, "y": 2}, r'Unknown field\(s\) "y" in state dict'),
]


@pytest.mark.parametrize(("target", "misfit", "message"), MISFITS)
def test_a_state_that_does_not_fit_is_refused_with_its_place(flax_serialization, target, misfit, message):
    with pytest.raises(ValueError, match=message):
        serialization.from_state_dict(target, misfit)
    assert serialization.current_path() == ""
    if not isinstance(target, Point) and "p" not in misfit:
        with pytest.raises(ValueError):
            flax_serialization.from_state_dict(target, misfit)


def test_named_tuples_as_flax_once_wrote_them():
    old = {"name": "Pair", "fields": {"0": "first", "1": "second"}, "values": {"0": 5, "1": 6}}
    assert serialization.from_state_dict(Pair(1, 2), old) == Pair(5, 6)


def test_own_types_register_once():
    class Counter:
        def __init__(self, n):
            self.n = n

    def register(**options):
        serialization.register_serialization_state(
            Counter, lambda c: {"n": c.n}, lambda c, s: Counter(s["n"]), **options
        )

    assert not serialization.is_serializable(Counter)
    register()
    assert serialization.is_serializable(Counter(1)) and serialization.is_serializable(dict)
    with pytest.raises(ValueError, match="already registered"):
        register()
    register(override=True)
    assert serialization.from_bytes([Counter(0)], serialization.to_bytes([Counter(7)]))[0].n == 7
    serialization.register_serialization_state(Counter, lambda c: {1: c.n}, lambda c, s: c, override=True)
    with pytest.raises(TypeError, match="string keys"):
        serialization.to_state_dict(Counter(1))
    with pytest.raises(ValueError, match="same text"):
        serialization.to_state_dict({1: 0, "1": 0})


def test_struct_dataclasses():
    point = Point(jnp.ones(2), "a")
    assert jax.tree.leaves(point)[0] is point.x
    assert jax.tree.structure(point) != jax.tree.structure(Point(1, "b"))
    moved = point.replace(x=3)
    assert moved == Point(3, "a") and point.x is not moved.x
    with pytest.raises(dataclasses.FrozenInstanceError):
        point.x = 1
    node = Node(value=1, size=2)
    with pytest.raises(TypeError):
        Node(1, 2)
    assert dataclasses.fields(Node)[1].metadata == {"unit": "m", "pytree_node": False}
    assert jax.jit(lambda n: n.replace(value=n.value + n.size))(node).value == 3
    assert struct.dataclass(Point) is Point

    class Child(Node):
        extra: object = 0

    child = Child(value=1, size=2, extra=jnp.ones(1))
    assert serialization.to_state_dict(child).keys() == {"value", "extra"}
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(child)]
    assert paths == [".value", ".extra"]
