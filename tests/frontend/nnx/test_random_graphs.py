"""Graph operations on random object graphs with sharing and cycles, against the installed Flax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distaff.frontend import nnx

flax_nnx = pytest.importorskip("flax.nnx")
LIBRARIES = (nnx, flax_nnx)
SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NAMES = ("a", "b", "c", "d")


class OurNode(nnx.Module):
    pass


class FlaxNode(flax_nnx.Module):
    pass


class OurOther(nnx.Module):
    pass


class FlaxOther(flax_nnx.Module):
    pass


CLASSES = {nnx: (OurNode, OurOther), flax_nnx: (FlaxNode, FlaxOther)}
VARIABLES = ("Param", "BatchStat", "Cache")

# A graph is a list of nodes, each a class and attributes; an attribute is a kind and a number. Nodes and variables are
# shared where the same number is drawn again.
leaf = st.one_of(
    st.tuples(st.just("variable"), st.integers(0, 7)),
    st.tuples(st.just("array"), st.integers(0, 3)),
    st.tuples(st.just("static"), st.sampled_from([1, True, "x", None, 2.5])),
)
attribute = st.one_of(
    leaf,
    st.tuples(st.just("node"), st.integers(0, 5)),
    st.tuples(st.just("list"), st.lists(leaf, max_size=3)),
    st.tuples(st.just("items"), st.lists(leaf, max_size=3)),
)
node = st.tuples(st.integers(0, 1), st.dictionaries(st.sampled_from(NAMES), attribute, max_size=4))
graphs = st.lists(node, min_size=1, max_size=6)


def build(lib, description):
    nodes = [CLASSES[lib][cls]() for cls, _ in description]
    variables = {}

    def variable(i):
        if i not in variables:
            metadata = {"tag": "odd"} if i % 2 else {}
            variables[i] = getattr(lib, VARIABLES[i % 3])(jnp.full(2, i, jnp.float32), **metadata)
        return variables[i]

    def value(kind, x):
        if kind == "variable":
            return variable(x)
        if kind == "array":
            return jnp.full(1, x, jnp.float32)
        if kind == "node":
            return nodes[x % len(nodes)]
        if kind == "list":
            return lib.data([value(*item) for item in x])
        if kind == "items":
            return lib.List([value(*item) for item in x])
        return x

    for made, (_, attributes) in zip(nodes, description, strict=True):
        for name, (kind, x) in attributes.items():
            setattr(made, name, value(kind, x))
    return nodes[0]


def flat(lib, state):
    """Paths, types, metadata and values."""
    return [
        (
            path,
            type(leaf).__name__,
            isinstance(leaf, lib.Variable) and leaf.get_metadata("tag", None),
            values(leaf),
        )
        for path, leaf in lib.to_flat_state(state)
    ]


def values(leaf):
    return [np.asarray(x).tolist() for x in jax.tree.leaves(leaf)]


def shape_of(lib, root):
    """What sharing, types and constants a graph has, in terms that both libraries have."""
    found = []
    for path, x in lib.iter_graph(root):
        if x is None or any(str(part).startswith("_") for part in path):  # None is a node to Flax at times
            continue
        kind = type(x).__name__.replace("Flax", "").replace("Our", "")
        constant = x if isinstance(x, bool | int | float | str) else None
        found.append((path, kind, constant))
    return found, lib.find_duplicates(root)


@SETTINGS
@given(graphs)
def test_split_merge_clone(description):
    roots = [build(lib, description) for lib in LIBRARIES]
    parts = [lib.split(root) for lib, root in zip(LIBRARIES, roots, strict=True)]
    ours, theirs = (flat(lib, state) for lib, (_, state) in zip(LIBRARIES, parts, strict=True))
    assert ours == theirs
    shapes = [shape_of(lib, root) for lib, root in zip(LIBRARIES, roots, strict=True)]
    assert shapes[0] == shapes[1]
    for made in (nnx.merge(*parts[0]), nnx.clone(roots[0])):
        assert shape_of(nnx, made) == shapes[0]
        assert nnx.graphdef(made) == parts[0][0] and hash(nnx.graphdef(made)) == hash(parts[0][0])
        assert flat(nnx, nnx.state(made)) == ours


@SETTINGS
@given(graphs, st.permutations(["Param", "BatchStat", "Cache", "odd", "path"]), st.integers(1, 5))
def test_filters(description, order, count):
    def filters(lib):
        known = {name: getattr(lib, name) for name in VARIABLES}
        known |= {"odd": "odd", "path": lib.PathContains("a")}
        return [known[name] for name in order[:count]]

    results = []
    for lib in LIBRARIES:
        root = build(lib, description)
        states = lib.state(root, *filters(lib), lib.Not(lib.Param))
        _, *split = lib.split(root, *filters(lib), ...)
        results.append([flat(lib, state) for state in (*states, *split)])
    assert results[0] == results[1]


@SETTINGS
@given(graphs)
def test_update_and_pop(description):
    results = []
    for lib in LIBRARIES:
        root = build(lib, description)
        doubled = jax.tree.map(lambda x: x * 2, lib.state(root))
        lib.update(root, doubled)
        after = flat(lib, lib.state(root))
        kinds = {kind for _, attributes in description for kind, _ in attributes.values()}
        if not kinds & {"items", "list"}:  # where it would leave holes
            popped = lib.pop(root, lib.BatchStat)
            after += flat(lib, popped) + flat(lib, lib.state(root))
        results.append(after)
    assert results[0] == results[1]


@SETTINGS
@given(graphs, st.lists(st.tuples(st.integers(0, 5), st.sampled_from(NAMES), attribute), max_size=3))
def test_jit_sees_and_makes_the_same_changes(description, changes):
    """Random changes between calls of a compiled function, and the same function changing every variable."""
    results = []
    for lib in LIBRARIES:
        root = build(lib, description)

        @lib.jit
        def step(root, lib=lib):
            for _, x in list(lib.iter_graph(root)):
                if isinstance(x, lib.Variable):
                    x[...] = x[...] + 1

        after = []
        for change in [None, *changes]:
            if change is not None:
                apply_change(lib, root, change)
            step(root)
            after.append((flat(lib, lib.state(root)), shape_of(lib, root)))
        results.append(after)
    assert results[0] == results[1]


def apply_change(lib, root, change):
    """Set an attribute of the n-th node; both libraries refuse the same."""
    number, name, description = change
    nodes = [x for _, x in lib.iter_graph(root) if isinstance(x, CLASSES[lib])]
    donor = build(lib, [(0, {"a": description}), (1, {})])
    target = nodes[number % len(nodes)]
    kind, _ = description
    if hasattr(target, name) and kind == "static":  # which would be data in the place of data
        delattr(target, name)
    try:
        setattr(target, name, donor.a)
    except ValueError:
        if hasattr(target, name):
            delattr(target, name)
