"""Graph operations: the same programs, with either library's ``nnx``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from distaff.frontend import nnx


@pytest.fixture(scope="module", params=["distaff", "flax"])
def lib(request):
    return nnx if request.param == "distaff" else pytest.importorskip("flax.nnx")


def shared(lib):
    class Inner(lib.Module):
        def __init__(self):
            self.a, self.b, self.z = lib.Param(jnp.ones(2)), 3, jnp.ones(1)

    class Outer(lib.Module):
        def __init__(self):
            self.m = Inner()
            self.n, self.p = self.m, self.m.a
            self.items = lib.List([Inner(), lib.Param(2.0), "x", jnp.zeros(1)])
            self.named = lib.Dict(a=1, b=lib.BatchStat(1))
            self.own = self

    return Outer()


def test_split_and_merge_keep_sharing_and_cycles(lib):
    graphdef, state = lib.split(shared(lib))
    paths = [path for path, _ in lib.to_flat_state(state)]
    assert paths == [
        ("items", 0, "a"),
        ("items", 0, "z"),
        ("items", 1),
        ("items", 3),
        ("m", "a"),
        ("m", "z"),
        ("named", "b"),
    ]
    made = lib.merge(graphdef, state)
    assert made.m is made.n and made.p is made.m.a and made.own is made
    assert made.p is state["m"]["a"]
    assert lib.find_duplicates(made) == [[(), ("own",)], [("m",), ("n",)], [("m", "a"), ("p",)]]


def test_filters_take_in_order(lib):
    node = shared(lib)
    stats, params, rest = lib.state(node, lib.BatchStat, lib.Param, ...)
    assert list(lib.to_pure_dict(stats)) == ["named"]
    assert [path for path, _ in lib.to_flat_state(params)] == [("items", 0, "a"), ("items", 1), ("m", "a")]
    assert len(lib.to_flat_state(rest)) == 3
    with pytest.raises(ValueError, match="Non-exhaustive"):
        lib.split(node, lib.Param)


def test_update_assigns_in_place(lib):
    node = shared(lib)
    before = node.m.a
    lib.update(node, lib.State({"m": {"a": lib.Param(jnp.zeros(3), note=1)}, "named": {"a": 7}}))
    assert node.p is before and before.shape == (3,) and before.get_metadata("note") == 1 and node.named.a == 7


def test_structure_is_not_kept_beyond_a_change(lib):
    node = shared(lib)
    first = lib.graphdef(node)
    assert lib.graphdef(node) == first
    node.m.b = 4
    assert lib.graphdef(node) != first
    node.m.b = 3
    assert lib.graphdef(node) == first
    node.p = lib.Param(jnp.ones(2))
    assert lib.graphdef(node) != first
    assert jax.tree.leaves(lib.state(node)["p"])[0].shape == (2,)
