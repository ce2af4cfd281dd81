"""What the module system costs, against the same model written in plain JAX: tracing, un-jitted calls, train steps.

Each row is one task. A library's column is its time over that of plain JAX, measured in turns in one run.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import click
import jax
import jax.numpy as jnp
import optax
from jax.nn import initializers
from rich.console import Console
from rich.table import Table

from distaff.tools.nnx_tasks import NNX_REACH, nnx_tasks, plain_nnx_tasks

WIDTH, HEADS, BATCH, LENGTH = 32, 4, 2, 8
PROJECTIONS = {"query": (WIDTH, WIDTH), "key": (WIDTH, WIDTH), "value": (WIDTH, WIDTH), "out": (WIDTH, WIDTH)}
MLP = {"up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
REACH = {
    "apply, traced": "1.5 ×",
    "init, traced": "1.5 ×",
    "apply, un-jitted": "2.0 ×",
    "train step, dispatched": "1.1 ×",
    **NNX_REACH,
}

Task = Callable[[], Any]
Params = dict[str, Any]


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention of ``[batch, length, WIDTH]``."""
    q, k, v = (x.reshape(BATCH, LENGTH, HEADS, WIDTH // HEADS) for x in (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(WIDTH / HEADS)
    scores = jnp.where(jnp.tri(LENGTH, dtype=bool), scores, -1e9)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(BATCH, LENGTH, WIDTH)


# The model in plain JAX.


def dense(p: Params, x: jax.Array) -> jax.Array:
    """A linear layer."""
    return x @ p["kernel"] + p["bias"]  # type: ignore[no-any-return]


def norm(p: Params, x: jax.Array) -> jax.Array:
    """Layer normalisation, with the variance as Linen computes it."""
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.maximum(0.0, jnp.mean(jnp.square(x), axis=-1, keepdims=True) - jnp.square(mean))
    return (x - mean) * (jax.lax.rsqrt(variance + 1e-6) * p["scale"]) + p["bias"]  # type: ignore[no-any-return]


def plain_layer(p: Params, x: jax.Array) -> jax.Array:
    """One layer of a decoder."""
    h = norm(p["norm_1"], x)
    x = x + dense(p["out"], attend(dense(p["query"], h), dense(p["key"], h), dense(p["value"], h)))
    return x + dense(p["down"], jax.nn.gelu(dense(p["up"], norm(p["norm_2"], x))))


def plain_apply(params: Params, x: jax.Array) -> jax.Array:
    """The decoder."""
    for layer in params.values():
        x = plain_layer(layer, x)
    return x


def plain_params(key: jax.Array, layers: int) -> Params:
    """The parameters of the decoder: a key for each, folded from one."""
    params: Params = {}
    count = 0
    for i in range(layers):
        layer: Params = {n: {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)} for n in ("norm_1", "norm_2")}
        for name, shape in (PROJECTIONS | MLP).items():
            count += 1
            kernel = initializers.lecun_normal()(jax.random.fold_in(key, count), shape)
            layer[name] = {"kernel": kernel, "bias": jnp.zeros(shape[-1])}
        params[f"layer_{i}"] = layer
    return params


def plain_init(key: jax.Array, x: jax.Array, layers: int) -> tuple[jax.Array, Params]:
    """An output and the parameters, as ``init_with_output`` gives them."""
    params = plain_params(key, layers)
    return plain_apply(params, x), params


# The model in Linen, ours or Flax's.


def decoder(nn: Any, layers: int) -> Any:
    """The same model as a module of the library ``nn``."""

    class Layer(nn.Module):  # type: ignore[misc]
        @nn.compact  # type: ignore[untyped-decorator]
        def __call__(self, x: jax.Array) -> jax.Array:
            h = nn.LayerNorm(name="norm_1")(x)
            q, k, v = (nn.Dense(WIDTH, name=name)(h) for name in ("query", "key", "value"))
            x = x + nn.Dense(WIDTH, name="out")(attend(q, k, v))
            h = nn.gelu(nn.Dense(4 * WIDTH, name="up")(nn.LayerNorm(name="norm_2")(x)))
            return x + nn.Dense(WIDTH, name="down")(h)  # type: ignore[no-any-return]

    class Decoder(nn.Module):  # type: ignore[misc]
        @nn.compact  # type: ignore[untyped-decorator]
        def __call__(self, x: jax.Array) -> jax.Array:
            for i in range(layers):
                x = Layer(name=f"layer_{i}")(x)
            return x

    return Decoder()


def scales(nn: Any, count: int) -> Any:
    """A module of ``count`` small parameters, ten in each submodule."""

    class Ten(nn.Module):  # type: ignore[misc]
        @nn.compact  # type: ignore[untyped-decorator]
        def __call__(self, x: jax.Array) -> jax.Array:
            return sum(self.param(f"scale_{i}", initializers.ones, (4,)) * x for i in range(10))  # type: ignore[no-any-return]

    class All(nn.Module):  # type: ignore[misc]
        @nn.compact  # type: ignore[untyped-decorator]
        def __call__(self, x: jax.Array) -> jax.Array:
            return sum(Ten(name=f"block_{i}")(x) for i in range(count // 10))  # type: ignore[no-any-return]

    return All()


def train_step(nn: Any, state_type: Any, x: jax.Array, parameters: int) -> Task:
    """A task that runs one step of Adam on the library's ``TrainState``."""

    @jax.jit
    def step(state: Any, x: jax.Array) -> Any:
        grads = jax.grad(lambda params: jnp.sum(state.apply_fn({"params": params}, x) ** 2))(state.params)
        return state.apply_gradients(grads=grads)

    model = scales(nn, parameters)
    params = model.init(jax.random.key(0), x)["params"]
    return functools.partial(step, state_type.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-3)), x)


def plain_train_step(x: jax.Array, parameters: int) -> functools.partial[Any]:
    """The same step on a tuple of dicts."""
    tx = optax.adam(1e-3)

    @jax.jit
    def step(params: Params, opt_state: Any, x: jax.Array) -> Any:
        def loss(params: Params) -> jax.Array:
            return jnp.sum(sum(scale * x for block in params.values() for scale in block.values()) ** 2)

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = {
        f"block_{i}": {f"scale_{j}": jnp.ones((4,), jnp.float32) for j in range(10)} for i in range(parameters // 10)
    }
    return functools.partial(step, params, tx.init(params), x)


def plain_tasks(x: jax.Array, layers: int, parameters: int) -> dict[str, Task]:
    """What plain JAX is timed at, by row."""
    key = jax.random.key(0)
    params, step = plain_params(key, layers), plain_train_step(x[0, 0, :4], parameters)
    return {
        "apply, traced": lambda: jax.make_jaxpr(lambda p, x: plain_apply(p, x))(params, x),
        "init, traced": lambda: jax.make_jaxpr(lambda key, x: plain_init(key, x, layers))(key, x),
        "apply, un-jitted": lambda: plain_apply(params, x),
        "train step, dispatched": step,
        **plain_nnx_tasks(step, lambda key: plain_params(key, layers)),
    }


def library_tasks(package: str, x: jax.Array, layers: int, parameters: int) -> dict[str, Task]:
    """What a library is timed at, by row."""
    nn, nnx, train_state = (
        importlib.import_module(f"{package}.{name}") for name in ("linen", "nnx", "training.train_state")
    )
    model, key = decoder(nn, layers), jax.random.key(0)
    variables = model.init(key, x)
    return {
        "apply, traced": lambda: jax.make_jaxpr(lambda v, x: model.apply(v, x))(variables, x),
        "init, traced": lambda: jax.make_jaxpr(lambda key, x: model.init_with_output(key, x))(key, x),
        "apply, un-jitted": lambda: model.apply(variables, x),
        "train step, dispatched": train_step(nn, train_state.TrainState, x[0, 0, :4], parameters),
        **nnx_tasks(nnx, x, PROJECTIONS | MLP, layers, parameters),
    }


def seconds_in_turns(tasks: dict[str, Task], repeats: int) -> dict[str, float]:
    """Median seconds of each task, the tasks taking turns so that all meet the same machine."""
    for task in tasks.values():
        jax.block_until_ready(task())
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            start = time.perf_counter()
            result = task()
            times[name].append(time.perf_counter() - start)
            jax.block_until_ready(result)
            del result  # not in the next task's time
    return {name: statistics.median(values) for name, values in times.items()}


@click.command(help=__doc__)
@click.option("--repeats", default=20, show_default=True, help="Timed calls of each task; ten times as many of steps.")
@click.option("--layers", default=12, show_default=True)
@click.option("--parameters", default=200, show_default=True, help="Parameters of the trained model.")
def main(repeats: int, layers: int, parameters: int) -> None:
    """Prints the table."""
    x = jax.random.normal(jax.random.key(1), (BATCH, LENGTH, WIDTH))
    packages = {"distaff": "distaff.frontend", "flax": "flax"}
    installed = {name: package for name, package in packages.items() if importlib.util.find_spec(package)}
    tasks = {"plain": plain_tasks(x, layers, parameters)} | {
        name: library_tasks(package, x, layers, parameters) for name, package in installed.items()
    }
    table = Table("", "plain JAX ms", *installed, "reach", title=f"{layers} layers; {parameters} parameters")
    for row, reach in REACH.items():
        calls = repeats if "traced" in row or "un-jitted" in row else repeats * 10
        took = seconds_in_turns(
            {name: of_library[row] for name, of_library in tasks.items() if row in of_library}, calls
        )
        plain = took.get("plain")
        results = [f"{took[name] / plain:.2f} ×" if plain else f"{took[name] * 1e3:.2f} ms" for name in installed]
        table.add_row(row, f"{plain * 1e3:.2f}" if plain else "-", *results, reach)
    Console().print(table)


if __name__ == "__main__":
    main()
