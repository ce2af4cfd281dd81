"""Changed copies through cursors: what Flax's cursor makes of the same trees and changes."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distaff.frontend import errors, struct
from distaff.frontend.core import FrozenDict, freeze
from distaff.frontend.cursor import cursor


class Pair(NamedTuple):
    first: Any
    second: Any = None


@struct.dataclass
class State:
    params: Any
    step: int = 0


leaves = st.integers(-3, 3) | st.text("ab", max_size=2)
keys = st.sampled_from("abc")
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(keys, inner, max_size=3).map(freeze),
        st.builds(Pair, inner, inner),
        st.builds(State, inner, inner),
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def flax_cursor():
    return pytest.importorskip("flax.cursor")


def of_flax(tree):
    """The tree with Flax's FrozenDict in the place of ours."""
    flax_freeze = pytest.importorskip("flax.core").freeze
    if isinstance(tree, FrozenDict):
        return flax_freeze({key: of_flax(value) for key, value in tree.items()})
    if isinstance(tree, dict):
        return {key: of_flax(value) for key, value in tree.items()}
    if isinstance(tree, Pair):
        return Pair(*map(of_flax, tree))
    if isinstance(tree, list | tuple):
        return type(tree)(map(of_flax, tree))
    return tree.replace(params=of_flax(tree.params), step=of_flax(tree.step)) if isinstance(tree, State) else tree


def same(mine, theirs):
    assert repr(mine) == repr(theirs)
    assert type(mine).__name__ == type(theirs).__name__


@given(trees, st.integers(-3, 3))
def test_updates_and_searches_are_those_of_flax(flax_cursor, tree, wanted):
    def bigger(path, value):
        return value + 10 if isinstance(value, int) and value >= wanted and "a" not in path else value

    def is_wanted(path, value):
        return isinstance(value, int) and value == wanted

    before = repr(tree)
    pairs = [(cursor(tree), flax_cursor.cursor(of_flax(tree))) for _ in range(3)]
    same(*(c.apply_update(bigger).build() for c in pairs[0]))
    assert [c._path for c in pairs[1][0].find_all(is_wanted)] == [c._path for c in pairs[1][1].find_all(is_wanted)]
    changed = []
    for c in pairs[2]:
        for place in c.find_all(is_wanted):
            changed.append(place.set("new"))
        changed.append(c.build())
    for mine, theirs in zip(changed[: len(changed) // 2], changed[len(changed) // 2 :], strict=True):
        same(mine, theirs)
    assert repr(tree) == before


def test_changes_by_index_attribute_and_operator():
    state = State({"dense": (1, [2, 3])}, 4)
    c = cursor(state)
    c.params["dense"][1][0] += 10
    c.step = c.step * 2 + (1 - c.step) % 5
    c.params["new"] = Pair(1)
    assert c.build() == State({"dense": (1, [12, 3]), "new": Pair(1)}, 10)
    assert state == State({"dense": (1, [2, 3])}, 4)
    assert cursor(Pair(1, 2))[1].set(3) == Pair(1, 3)
    assert cursor(5).set(6) == 6
    assert [child._path for child in reversed(cursor([1, 2]))] == ["[1]", "[0]"] and len(cursor((1, 2))) == 2
    assert str(cursor(state)) == str(state) and cursor(2) < 3 and abs(cursor(-2)) == 2 == round(cursor(2.2))
    np.testing.assert_array_equal(cursor({"x": jnp.ones(2)})["x"] @ jnp.ones(2), 2.0)


def test_repr_shows_the_changes_as_flax_does(flax_cursor):
    texts = []
    for make, frozen in ((cursor, freeze), (flax_cursor.cursor, pytest.importorskip("flax.core").freeze)):
        c = make({"a": {1: Pair(1, (2, "b"))}, "z": -1})
        texts.append(repr(c))
        c["z"] = 3
        c["a"][1].second[0] = frozen({"a": {"b": 2}})
        texts.append(repr(c))
    assert texts[:2] == texts[2:]


@dataclasses.dataclass
class Opaque:
    x: int


def test_misuse_is_explained():
    c = cursor({"a": 1, "b": (2, 2), "c": Opaque(1)})
    with pytest.raises(errors.CursorFindError, match=r"No object found given the conditions of the cond_fn\."):
        c.find(lambda path, value: path == "nothing")
    with pytest.raises(errors.CursorFindError, match=r"following paths: \['b'\]\[0\] and \['b'\]\[1\] "):
        c.find(lambda path, value: isinstance(value, int) and value == 2)
    with pytest.raises(KeyError, match="Key d not found"):
        c["d"]
    with pytest.raises(AttributeError, match="Attribute y not found"):
        c["c"].y  # noqa: B018
    with pytest.raises(TypeError, match="Cannot index into 1"):
        c["a"][0]
    with pytest.raises(NotImplementedError, match="__iter__ method only implemented for tuples and lists"):
        iter(c)
    assert c.find(lambda path, value: path == "c/x").set(7)["c"] == Opaque(7)
