"""Flat and nested dicts, and traversals, against Flax."""

import collections
import dataclasses

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff.frontend import core, traverse_util

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

Pair = collections.namedtuple("Pair", "a b")


@dataclasses.dataclass
class Record:
    a: object = 0
    b: object = 0


class Plain:
    def __init__(self, a):
        self.a = a


@pytest.fixture(scope="session")
def flax_traverse():
    return pytest.importorskip("flax.traverse_util")


nested = st.recursive(
    st.integers(0, 9), lambda items: st.dictionaries(st.sampled_from("abc"), items, max_size=3), max_leaves=6
).filter(lambda x: isinstance(x, dict))


def without_markers(library, flat):
    return {path: "empty" if value is library.empty_node else value for path, value in flat.items()}


@settings(max_examples=100, deadline=None)
@given(tree=nested, keep=st.booleans(), sep=st.sampled_from([None, "/"]), cut=st.booleans(), frozen=st.booleans())
def test_flat_dicts_are_those_of_flax(flax_traverse, tree, keep, sep, cut, frozen):
    is_leaf = (lambda path, value: len(path) == 2 and "a" in value) if cut else None
    options = dict(keep_empty_nodes=keep, sep=sep, is_leaf=is_leaf)
    mine = traverse_util.flatten_dict(core.freeze(tree) if frozen else tree, **options)
    theirs = flax_traverse.flatten_dict(tree, **options)
    assert without_markers(traverse_util, mine) == without_markers(flax_traverse, theirs)
    assert list(mine) == list(theirs)
    assert traverse_util.unflatten_dict(mine, sep=sep) == flax_traverse.unflatten_dict(theirs, sep=sep)
    if keep and tree:
        assert traverse_util.unflatten_dict(mine, sep=sep) == tree

    def count(path, x):
        return (path, x)

    assert traverse_util.path_aware_map(count, tree) == flax_traverse.path_aware_map(count, tree)


def selections(library):
    """Traversals with data that they fit."""
    identity = library.t_identity
    data = [{"a": 1, "b": 2}, {"a": 3, "b": 4}]
    return [
        (identity, 5),
        (identity.each()["a"], data),
        (identity[1]["b"], data),
        (identity.a, Record(1, 2)),
        (identity.b, Pair(1, 2)),
        (identity["r"].a, {"r": Record(1, 2), "s": 3}),
        (identity[0:2], (1, 2, 3)),
        (identity[1], (1, 2, 3)),
        (identity[1], Pair(1, 2)),
        (identity.tree(), {"x": [1, (2, 3)]}),
        (identity.each().filter(lambda x: x > 2), [1, 2, 3, 4]),
        (identity.each(), {"x": 1, "y": 2}),
        (identity.merge(library.TraverseItem(0), library.TraverseItem(2)), [1, 2, 3]),
        (library.TraverseAttr("a").compose(library.TraverseEach()), Record((1, 2), 3)),
        (library.ModelParamTraversal(lambda path, x: "/k" in path), {"z": {"k": 1, "b": 2}, "a": {"k": 3}, "e": {}}),
    ]


@pytest.mark.parametrize("case", range(15))
def test_traversals_select_and_change_as_those_of_flax(flax_traverse, case):
    (mine, data), (theirs, same) = selections(traverse_util)[case], selections(flax_traverse)[case]
    selected = list(mine.iterate(data))
    assert selected == list(theirs.iterate(same))
    assert mine.update(lambda x: 10 * x, data) == theirs.update(lambda x: 10 * x, same)
    values = [100 + i for i in range(len(selected))]
    assert mine.set(values, data) == theirs.set(list(values), same)
    assert data == same, "the input stays as it was"
    with pytest.raises(ValueError, match="more values"):
        mine.set([*values, 0], data)
    with pytest.raises(ValueError, match="Not enough"):
        mine.set(values[:-1], data)


def test_what_traversals_refuse_and_keep():
    assert traverse_util.t_identity.a.update(lambda a: a + 1, Plain(1)).a == 2
    with pytest.raises(ValueError, match="list or tuple"):
        traverse_util.t_identity.each().update(abs, {1, 2})
    frozen = core.freeze({"a": {"kernel": jnp.ones(1)}})
    scaled = traverse_util.ModelParamTraversal(lambda path, _: path == "/a/kernel").update(lambda x: 2 * x, frozen)
    assert type(scaled) is core.FrozenDict and scaled["a"]["kernel"][0] == 2
    with pytest.raises(ValueError, match="nested dicts"):
        list(traverse_util.ModelParamTraversal(lambda *_: True).iterate([1]))
    with pytest.warns(DeprecationWarning, match="deprecated"):
        traverse_util.TraverseId()
    for wrong in ([1], 3):
        with pytest.raises(TypeError):
            traverse_util.flatten_dict(wrong)
        with pytest.raises(TypeError):
            traverse_util.unflatten_dict(wrong)
