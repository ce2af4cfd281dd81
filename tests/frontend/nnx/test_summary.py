"""``nnx.tabulate`` prints the table that Flax prints."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from distaff.frontend import nnx


def table(lib, method="__call__", **options):
    class Block(lib.Module):
        def __init__(self, rngs):
            self.linear = lib.Linear(4, 8, rngs=rngs)
            self.norm = lib.BatchNorm(8, rngs=rngs)
            self.dropout = lib.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.norm(self.linear(x)))

    class Model(lib.Module):
        def __init__(self, rngs):
            self.blocks = lib.List([Block(rngs)])
            self.scale = lib.Param(jnp.ones(8))
            self.last = lib.Linear(8, 2, rngs=rngs)

        def __call__(self, x, *, times=1):
            return {"y": self.last(self.blocks[0](x) * self.scale[...])}

        def encode(self, x):
            return self.blocks[0](x)

    model = Model(lib.Rngs(0))
    run = dict(console_kwargs={"width": 160, "force_terminal": False}, method=method, **options)
    return lib.tabulate(model, jnp.ones((1, 4)), **run), model


@pytest.mark.parametrize("options", [{}, {"depth": 1}, {"method": "encode"}])
def test_table_is_that_of_flax(options):
    flax_nnx = pytest.importorskip("flax.nnx")
    mine, model = table(nnx, **options)
    assert mine == table(flax_nnx, **options)[0]
    assert type(model).encode.__code__.co_filename == __file__


def two_blocks(lib, shares):
    class Block(lib.Module):
        def __init__(self, shared, rngs):
            self.shared, self.own = shared, lib.Linear(8, 8, rngs=rngs)

        def __call__(self, x):
            return jnp.tanh(self.own(self.shared(x)))

    class Model(lib.Module):
        def __init__(self, rngs):
            shared = lib.Linear(8, 8, rngs=rngs)
            other = shared if shares else lib.Linear(8, 8, rngs=rngs)
            self.first, self.second = Block(shared, rngs), Block(other, rngs)

        def times(self, x, factor):
            return x * factor

        def __call__(self, x):
            return self.times(self.second(self.first(x)), x).sum()

    return Model(lib.Rngs(0))


@pytest.mark.parametrize("shares", [True, False])
def test_operations_are_counted_as_by_flax(shares):
    """For layers whose equations are those of Flax, which forgets to add the gradients of what is shared."""
    flax_nnx = pytest.importorskip("flax.nnx")
    run = dict(console_kwargs={"width": 200, "force_terminal": False})
    run |= dict(compute_flops=True, compute_vjp_flops=not shares)
    mine, other = (lib.tabulate(two_blocks(lib, shares), jnp.ones((4, 8)), **run) for lib in (nnx, flax_nnx))
    assert mine == other


def test_operations_inside_of_transforms():
    class Model(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap
            def layers(rngs):
                return nnx.Linear(4, 4, rngs=rngs)

            self.layers = layers(rngs)

        def __call__(self, x):
            return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)

    counts = {}

    def look(call):
        counts[call.path] = call
        return True

    nnx.tabulate(Model(nnx.Rngs(0)), jnp.ones((2, 4)), row_filter=look, compute_flops=True)
    assert counts["layers",].flops == 2 * 2 * 4 * 4 + 2 * 4  # of one layer: a product and a bias
    assert counts[()].flops >= counts["layers",].flops


def test_methods_metadata_and_empty_arguments_are_shown():
    class Note:
        def __repr__(self):
            return "<note>"

    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(3), note=Note())

        def inner(self, x, options, *, limit=None):
            return x

        def __call__(self, x, train):
            assert train is True
            return self.inner(x, {}, limit=None) + self.inner(x, {}, limit=None)

    model = Model()
    shown = nnx.tabulate(model, jnp.ones(3), True, console_kwargs={"width": 100, "force_terminal": False})
    rows = [line.split("│") for line in shown.splitlines() if "│" in line]
    assert [row[1].strip() for row in rows if row[2].strip() == "Model"] == ["", "inner"]
    assert "- True" in shown and "- {}" in shown and "limit: None" in shown and "note: <note>" in shown
    assert set(vars(model)) == {"w"}
