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


def test_counting_operations_is_refused():
    with pytest.raises(NotImplementedError, match="cost_analysis"):
        table(nnx, compute_flops=True)
