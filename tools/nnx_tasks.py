"""What ``bench_frontend`` times of a library's ``nnx``, and the same in plain JAX."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Task = Callable[[], Any]
# Rows and what they are to reach: a ratio to plain JAX, or milliseconds where that has no such task.
NNX_REACH = {
    "nnx train step, dispatched": "1.5 ×",
    "nnx empty step, dispatched": "2.0 ×",
    "nnx constructor, traced": "2.0 ×",
    "nnx split": "0.5 ms",
    "nnx merge": "0.3 ms",
}
EMPTY_STEP_ARRAYS, SPLIT_PARAMETERS = 600, 200


def scales(nnx: Any, count: int) -> Any:
    """A module of ``count`` small parameters, ten in each submodule."""

    class Ten(nnx.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            for i in range(10):
                setattr(self, f"scale_{i}", nnx.Param(jnp.ones(4, jnp.float32)))

        def __call__(self, x: jax.Array) -> jax.Array:
            return sum(getattr(self, f"scale_{i}")[...] * x for i in range(10))  # type: ignore[no-any-return]

    class All(nnx.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.blocks = nnx.List([Ten() for _ in range(count // 10)])

        def __call__(self, x: jax.Array) -> jax.Array:
            return sum(block(x) for block in self.blocks)  # type: ignore[no-any-return]

    return All()


def train_step(nnx: Any, x: jax.Array, parameters: int) -> Task:
    """A task that runs one step of Adam."""
    model = scales(nnx, parameters)
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    @nnx.jit  # type: ignore[untyped-decorator]
    def step(model: Any, optimizer: Any, x: jax.Array) -> None:
        definition, params = nnx.split(model)
        gradient = jax.grad(lambda params: jnp.sum(nnx.merge(definition, params)(x) ** 2))(params)
        optimizer.update(model, gradient)

    def task() -> Any:
        step(model, optimizer, x)
        return [block.scale_0[...] for block in model.blocks]

    return task


def empty_step(nnx: Any) -> Task:
    """A task that passes a module to a compiled function that does nothing."""
    model = scales(nnx, EMPTY_STEP_ARRAYS)
    step = nnx.jit(lambda model: None)
    return lambda: step(model)


def constructor(nnx: Any, widths: dict[str, tuple[int, int]], width: int, layers: int) -> Task:
    """A task that traces the making of a decoder."""

    class Layer(nnx.Module):  # type: ignore[misc]
        def __init__(self, rngs: Any) -> None:
            self.norm_1, self.norm_2 = (nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
            for name, (inputs, outputs) in widths.items():
                setattr(self, name, nnx.Linear(inputs, outputs, rngs=rngs))

    class Decoder(nnx.Module):  # type: ignore[misc]
        def __init__(self, rngs: Any) -> None:
            self.layers = nnx.List([Layer(rngs) for _ in range(layers)])

    def make(key: jax.Array) -> Any:
        return nnx.as_pure(nnx.state(Decoder(nnx.Rngs(params=key)), nnx.Param))

    key = jax.random.key(0)
    return lambda: jax.make_jaxpr(lambda key: make(key))(key)  # JAX keeps traces by function: another each time


def nnx_tasks(
    nnx: Any, x: jax.Array, widths: dict[str, tuple[int, int]], layers: int, parameters: int
) -> dict[str, Task]:
    """What a library's ``nnx`` is timed at, by row."""
    model = scales(nnx, SPLIT_PARAMETERS)
    parts = nnx.split(model)
    return {
        "nnx train step, dispatched": train_step(nnx, x[0, 0, :4], parameters),
        "nnx empty step, dispatched": empty_step(nnx),
        "nnx constructor, traced": constructor(nnx, widths, x.shape[-1], layers),
        "nnx split": lambda: nnx.split(model),
        "nnx merge": lambda: nnx.merge(*parts),
    }


def training(step: functools.partial[Any]) -> Task:
    """A task that replaces parameters and optimiser state by what the step returns, as objects' are."""
    compiled, (params, opt_state, x) = step.func, step.args

    def task() -> Any:
        nonlocal params, opt_state
        params, opt_state = compiled(params, opt_state, x)
        return params

    return task


def plain_nnx_tasks(train: functools.partial[Any], init: Callable[[jax.Array], Any]) -> dict[str, Task]:
    """The rows that plain JAX has too, of its train step and of the making of a decoder's parameters."""
    arrays = {f"block_{i}": {f"scale_{j}": jnp.ones(4) for j in range(10)} for i in range(EMPTY_STEP_ARRAYS // 10)}
    step, key = jax.jit(lambda arrays: None), jax.random.key(0)
    return {
        "nnx train step, dispatched": training(train),
        "nnx empty step, dispatched": lambda: step(arrays),
        "nnx constructor, traced": lambda: jax.make_jaxpr(lambda key: init(key))(key),
    }
