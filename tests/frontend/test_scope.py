"""The functional core: scopes, filters, frozen dicts, random keys, flat dicts."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff.frontend import core, errors, struct, traverse_util
from distaff.frontend.core import filters
from distaff.frontend.core.initializer_shapes import initializer_shapes
from distaff.frontend.core.rng import LazyRng

KEY = jax.random.key(3)
NAMES = ["a", "b", "c", "d"]

plain_filters = st.one_of(st.booleans(), st.sampled_from(NAMES), st.lists(st.sampled_from(NAMES)).map(tuple))
any_filter = st.one_of(plain_filters, plain_filters.map(filters.DenyList))


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        bool(jnp.all(x == y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# Scopes.


def mlp(scope, x):
    def dense(scope, x, features):
        kernel = scope.param("kernel", jax.nn.initializers.lecun_normal(), (x.shape[-1], features))
        return x @ kernel + scope.param("bias", jax.nn.initializers.normal(), (features,))

    x = scope.child(dense, prefix="dense_")(x, 3)
    last = scope.child(dense, "last")
    count = scope.variable("state", "count", lambda: 0)
    if scope.is_mutable_collection("state") and not scope.has_flag("initializing"):
        count.value += 1
    return last(x, 3) + last(x, 3) + jax.random.normal(scope.make_rng("noise"), ())


@pytest.mark.smoke
def test_scope_functions_become_pure_functions():
    x = jnp.ones((2, 4))
    y, variables = core.init(mlp)(KEY, x)
    assert jax.tree.map(jnp.shape, variables["params"]) == {
        "dense_0": {"kernel": (4, 3), "bias": (3,)},
        "last": {"kernel": (3, 3), "bias": (3,)},
    }
    assert variables["state"] == {"count": 0}
    y, updates = core.apply(mlp, mutable="state")(variables, x, rngs=KEY)
    assert updates == {"state": {"count": 1}} and y.shape == (2, 3)
    assert variables["state"] == {"count": 0}


def test_scope_functions_give_what_flax_gives():
    flax_core = pytest.importorskip("flax.core")
    x = jnp.ones((2, 4))
    for keys in (KEY, {"params": KEY, "noise": jax.random.key(9)}):
        ours, theirs = core.init(mlp)(keys, x), flax_core.init(mlp)(keys, x)
        assert same(ours, theirs)
        run = [library.apply(mlp, mutable=True)(ours[1], x, rngs=keys) for library in (core, flax_core)]
        assert same(*run)


@settings(max_examples=20, deadline=None)
@given(
    path=st.lists(st.one_of(st.text(min_size=1, max_size=5), st.integers(0, 70000)), max_size=4),
    raw=st.booleans(),
)
def test_keys_fold_in_as_those_of_flax(path, raw):
    flax_scope = pytest.importorskip("flax.core.scope")
    key = jax.random.PRNGKey(5) if raw else KEY
    ours = LazyRng.create(LazyRng.create(key, *path[:1]), *path[1:]).as_jax_rng()
    theirs = flax_scope.LazyRng.create(key, *path).as_jax_rng()
    np.testing.assert_array_equal(*(x if raw else jax.random.key_data(x) for x in (ours, theirs)))


def test_keys_differ_by_path_and_draw_and_repeat_by_name():
    def draw(scope):
        child = scope.push("a")
        keys = [scope.make_rng(), scope.make_rng(), child.make_rng(), scope.push("b").make_rng()]
        again = scope.rewound().push("a").make_rng()
        first = scope.rewound(rewind_rngs=True).make_rng()
        return keys, again, first

    keys, again, first = core.apply(draw)({}, rngs=KEY)
    data = [tuple(np.asarray(jax.random.key_data(key))) for key in [*keys, again]]
    assert len(set(data)) == 5
    assert (jax.random.key_data(first) == jax.random.key_data(keys[0])).all()


def test_scopes_are_equal_at_the_same_place():
    def check(scope):
        child = scope.push("a")
        assert child == scope.rewound().push("a") and hash(child) == hash(scope.rewound().push("a"))
        assert child != scope.push("b") and scope != child
        assert child.path_text == "/a" and child.root is scope
        with pytest.raises(ValueError, match="Duplicate"):
            scope.push("a")
        assert scope.push("a", reuse=True) == child
        assert scope.push(prefix="a").name == "a0"
        with pytest.raises(TypeError, match="strings"):
            scope.push(3)

    core.apply(check)({})


def test_assigning_a_dict_keeps_references_of_children():
    def run(scope):
        child = scope.push("a")
        before = child.get_variable("state", "v")
        scope.put_variable("state", "a", {"v": 2, "w": 3})
        return before, child.get_variable("state", "v"), child.get_variable("state", "w")

    assert core.apply(run, mutable="state")({"state": {"a": {"v": 1}}})[0] == (1, 2, 3)


def test_variables_of_frozen_collections_read_through():
    def run(scope):
        assert scope.push("a").variables()["params"] == {"v": 1}
        assert scope.get_variable("params", "missing", 5) == 5
        return scope.push("b").has_variable("params", "v")

    assert core.apply(run)(core.freeze({"params": {"a": {"v": 1}}})) is False


# What initialisers make.


def test_shapes_of_initialisers_are_found_without_running_them():
    init = jax.nn.initializers
    calls = []

    def own(key, shape, scale=1.0):
        calls.append(shape)
        return {"a": jnp.ones(shape), "b": jnp.ones((*shape, 2)) * scale}

    for known in (init.zeros, init.normal(), init.lecun_normal(), init.constant(2.0), init.orthogonal()):
        assert initializer_shapes(known, ([3, 4], jnp.float32), {}) == ((3, 4),)
    for _ in range(3):
        assert initializer_shapes(own, ((3,),), {"scale": 2.0}) == ((3,), (3, 2))
        assert initializer_shapes(own, ([4],), {}) == ((4,), (4, 2))
    assert len(calls) == 2
    for _ in range(2):  # an array has no hash, so nothing is kept
        assert initializer_shapes(lambda key, x: jnp.zeros_like(x), (jnp.ones(2),), {}) == ((2,),)


# Filters.


@given(any_filter, any_filter, st.sampled_from([*NAMES, "other"]))
def test_filter_algebra(a, b, name):
    in_a, in_b = filters.in_filter(a, name), filters.in_filter(b, name)
    assert filters.in_filter(filters.union_filters(a, b), name) == (in_a or in_b)
    assert filters.in_filter(filters.intersect_filters(a, b), name) == (in_a and in_b)
    assert filters.in_filter(filters.subtract_filters(a, b), name) == (in_a and not in_b)
    if filters.is_filter_empty(a):
        assert not in_a


def test_filters_and_groups():
    variables = {"params": 1, "batch_stats": 2, "cache": 3}
    groups = filters.group_collections(variables, ["params", filters.DenyList("cache"), True])
    assert groups == ({"params": 1}, {"batch_stats": 2}, {"cache": 3})
    assert filters.is_filter_empty(()) and filters.is_filter_empty(filters.DenyList(True))
    assert not filters.is_filter_empty("")
    with pytest.raises(errors.InvalidFilterError, match="3"):
        filters.in_filter(3, "params")


# Dicts and dataclasses.

nested = st.recursive(
    st.integers(), lambda inner: st.dictionaries(st.sampled_from(["a", "b", "c/d"]), inner, max_size=3), max_leaves=6
)
nested_dicts = st.dictionaries(st.sampled_from(["x", "y", "z"]), nested, max_size=3)


@given(nested_dicts)
def test_frozen_dicts(tree):
    frozen = core.freeze(tree)
    assert frozen == tree and core.unfreeze(frozen) == tree and frozen.unfreeze() == tree
    assert hash(frozen) == hash(core.freeze(copy.deepcopy(tree)))
    assert pickle.loads(pickle.dumps(frozen)) == frozen and copy.copy(frozen).keys() == tree.keys()
    assert jax.tree.leaves(frozen) == jax.tree.leaves(tree)
    assert jax.tree.map(lambda x: x, frozen) == frozen
    paths = [jax.tree_util.tree_leaves_with_path(t) for t in (frozen, tree)]
    assert paths[0] == paths[1]
    for key, value in frozen.items():
        assert isinstance(value, core.FrozenDict) == isinstance(tree[key], dict)


@given(nested_dicts)
def test_frozen_dicts_show_as_those_of_flax(tree):
    flax_core = pytest.importorskip("flax.core")
    assert repr(core.freeze(tree)) == repr(flax_core.freeze(tree))
    assert core.pretty_repr(tree) == flax_core.pretty_repr(tree)


def test_frozen_dicts_do_not_change():
    source = {"a": {"b": 1}}
    frozen = core.freeze(source)
    source["a"]["b"] = 2
    assert frozen["a"]["b"] == 1
    frozen.unfreeze()["a"]["b"] = 3
    assert frozen["a"]["b"] == 1
    with pytest.raises(ValueError, match="immutable"):
        frozen["a"] = 1
    assert frozen.copy({"c": 4}) == {"a": {"b": 1}, "c": 4}
    assert frozen.pop("a") == ({}, {"b": 1})
    assert core.copy(source, {"c": 4})["c"] == 4 and "c" not in source
    assert core.pop(source, "a") == ({}, {"b": 2}) and "a" in source
    assert frozen.get("missing", 7) == 7
    assert repr(frozen.keys()) == "frozen_dict_keys(['a'])"
    with pytest.raises(TypeError, match="Expected"):
        core.copy([1])
    with pytest.raises(TypeError, match="Expected"):
        core.pop([1], 0)


@given(nested_dicts, st.booleans())
def test_flat_dicts(tree, keep):
    flax_util = pytest.importorskip("flax.traverse_util")
    flat = traverse_util.flatten_dict(tree, keep_empty_nodes=keep)
    theirs = flax_util.flatten_dict(tree, keep_empty_nodes=keep)
    assert flat.keys() == theirs.keys()
    if keep:
        assert traverse_util.unflatten_dict(flat) == tree
    assert traverse_util.flatten_dict(core.freeze(tree)) == traverse_util.flatten_dict(tree)
    mapped = traverse_util.path_aware_map(lambda path, x: (len(path), x), tree)
    assert mapped == flax_util.path_aware_map(lambda path, x: (len(path), x), tree)


@pytest.mark.smoke
def test_flat_dicts_with_separators_and_leaves():
    tree = {"a": {"b": 1, "c": {}}, "d": 2}
    assert traverse_util.flatten_dict(tree, sep="/") == {"a/b": 1, "d": 2}
    assert traverse_util.unflatten_dict({"a/b": 1, "d": 2}, sep="/") == {"a": {"b": 1}, "d": 2}
    assert traverse_util.flatten_dict(tree, is_leaf=lambda path, _: path == ("a",)) == {("a",): tree["a"], ("d",): 2}
    with pytest.raises(TypeError):
        traverse_util.flatten_dict([1])
    with pytest.raises(TypeError):
        traverse_util.unflatten_dict([1])


def test_struct_dataclasses_are_pytrees():
    @struct.dataclass
    class Point:
        x: float
        tag: str = struct.field(pytree_node=False, default="t")

    class Node(struct.PyTreeNode):
        value: float
        kind: str = struct.field(pytree_node=False)

    point = Point(1.0)
    assert jax.tree.leaves(point) == [1.0] and jax.tree.map(lambda v: v + 1, point) == Point(2.0)
    assert point.replace(x=3.0) == Point(3.0) and Node(1.0, "k").replace(value=2.0) == Node(2.0, "k")
    assert jax.tree.structure(Node(1.0, "k")) != jax.tree.structure(Node(1.0, "l"))
    with pytest.raises(AttributeError):
        point.x = 2.0
    assert struct.dataclass(Point) is Point
