"""Contexts and ``capture``: the same programs, with either library's ``nnx``."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff.frontend import nnx


@pytest.fixture(scope="module", params=["distaff", "flax"])
def lib(request):
    warnings.simplefilter("ignore", DeprecationWarning)
    return nnx if request.param == "distaff" else pytest.importorskip("flax.nnx")


def pair(lib):
    class Box(lib.Module):
        def __init__(self, value):
            self.w = lib.Param(jnp.full(2, value, float))

    first, second = Box(1.0), Box(2.0)
    second.first = first
    return first, second


def test_split_context_keeps_sharing_between_splits(lib):
    first, second = pair(lib)
    with lib.split_context() as ctx:
        parts = [ctx.split(first), ctx.split(second)]
    with lib.merge_context() as ctx:
        made = [ctx.merge(*part) for part in parts]
    assert made[1].first is made[0] and made[0] is not first


def test_update_context_changes_the_original_objects(lib):
    first, second = pair(lib)

    @jax.jit
    def step(graphdef, state):
        with lib.merge_context("tag", inner=True) as ctx:
            box = ctx.merge(graphdef, state)
        box.w[...] = box.w[...] + 1
        box.first.back = box
        box.note = 1
        box.new = lib.Param(jnp.zeros(1))
        with lib.split_context("tag") as ctx:
            return ctx.split(box)

    @lib.update_context("tag")
    def run(box):
        with lib.split_context("tag") as ctx:
            parts = ctx.split(box)
        parts = step(*parts)
        with lib.merge_context("tag", inner=False) as ctx:
            return ctx.merge(*parts)

    before = second.w
    assert run(second) is second
    assert second.w is before and second.first is first and first.back is second and second.note == 1
    np.testing.assert_array_equal(second.w[...], 3)
    assert second.new.shape == (1,)


def test_to_tree_and_back(lib):
    first, second = pair(lib)
    tree = lib.to_tree([first, {"x": second, "y": jnp.ones(1)}])
    tree = jax.tree.map(lambda x: x + 1, tree)
    made = lib.from_tree(tree)
    assert made[1]["x"].first is made[0]
    np.testing.assert_array_equal(made[0].w[...], 2)


def layers(lib):
    class Inner(lib.Module):
        def __init__(self):
            self.w = lib.Param(jnp.ones(2))

        def __call__(self, x):
            y = self.w[...] * x
            self.sow(lib.Intermediate, "h", y)
            return self.perturb("p", y)

    class Outer(lib.Module):
        def __init__(self):
            self.a, self.b = Inner(), lib.List([Inner()])

        def double(self, x):
            return 2 * x

        def __call__(self, x):
            return self.double(self.b[0](self.a(x)))

    return Outer()


def as_dict(lib, state):
    return jax.tree.map(np.asarray, lib.to_pure_dict(state))


def test_capture_leaves_nothing_in_the_module(lib):
    model, x = layers(lib), jnp.array([1.0, 2.0])
    y, sown = lib.capture(model, lib.Intermediate)(x)
    np.testing.assert_array_equal(y, 2 * x)
    found = as_dict(lib, sown)
    assert list(found) == ["a", "b"] and list(found["a"]) == ["h"]
    np.testing.assert_array_equal(found["b"][0]["h"], [x])
    assert not hasattr(model.a, "h") and not hasattr(model.a, "p")


def test_capture_of_outputs(lib):
    model = layers(lib)
    _, sown = lib.capture(model, lib.Intermediate, method_outputs=lib.Intermediate)(jnp.ones(2))
    paths = [path for path, _ in lib.to_flat_state(sown)]
    assert paths == [("__call__",), ("a", "__call__"), ("a", "h"), ("b", 0, "__call__"), ("b", 0, "h"), ("double",)]
    assert type(model).double.__code__.co_filename == __file__


def test_gradients_at_perturbations(lib):
    model, x = layers(lib), jnp.array([1.0, 2.0])
    _, perturbations = lib.capture(model, lib.Perturbation)(x)

    def loss(perturbations):
        return lib.capture(lambda model, x: model(x).sum(), lib.Intermediate, init=perturbations)(lib.clone(model), x)

    gradient, sown = jax.grad(loss, has_aux=True)(perturbations)
    np.testing.assert_array_equal(as_dict(lib, gradient)["a"]["p"], [2.0, 2.0])
    assert "p" not in as_dict(lib, sown)["a"]
