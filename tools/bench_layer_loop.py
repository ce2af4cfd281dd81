"""What rolling layers into a loop costs on this platform: a decoder's matrix products flat and in a scan.

The loop slices each layer's weights out of stacked arrays. Where the compiler copies those slices (XLA:CPU does), a
step of few tokens, which is bound by reading weights, takes longer. Shapes of SmolLM2-135M.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import click
import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

LAYERS, WIDTH, HEADS, MLP = 30, 576, 960, 1536


def main_layer(x: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
    """The matrix products of one layer on ``[T, WIDTH]``."""
    x = x + (x @ p["qkv"])[:, :WIDTH] @ p["out"]
    gate, up = jnp.split(x @ p["gate_up"], 2, axis=1)
    return x + (jax.nn.silu(gate) * up) @ p["down"]


def seconds(function: Callable[..., Any], *args: Any, repeats: int) -> float:
    """Median seconds of a compiled call, after one to warm up."""
    compiled = jax.jit(function).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@click.command(help=__doc__)
@click.option("--repeats", default=10, show_default=True, help="Timed calls of each variant.")
def main(repeats: int) -> None:
    """Prints the table."""
    shapes = {"qkv": (WIDTH, HEADS), "out": (WIDTH, WIDTH), "gate_up": (WIDTH, 2 * MLP), "down": (MLP, WIDTH)}
    keys = iter(jax.random.split(jax.random.key(0), LAYERS * len(shapes) + 1))
    layers = [{n: jax.random.normal(next(keys), s) * 0.02 for n, s in shapes.items()} for _ in range(LAYERS)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *layers)

    def flat(x: jax.Array, layers: list[dict[str, jax.Array]]) -> jax.Array:
        for p in layers:
            x = main_layer(x, p)
        return x

    def loop(x: jax.Array, stacked: dict[str, jax.Array]) -> jax.Array:
        return jax.lax.scan(lambda c, p: (main_layer(c, p), None), x, stacked)[0]

    table = Table("tokens", "flat ms", "loop ms", "loop / flat", title=f"{LAYERS} layers on {jax.default_backend()}")
    for tokens in (1, 8, 64, 256):
        x = jax.random.normal(next(keys) if tokens == 1 else jax.random.key(tokens), (tokens, WIDTH))
        a, b = seconds(flat, x, layers, repeats=repeats), seconds(loop, x, stacked, repeats=repeats)
        table.add_row(str(tokens), f"{a * 1e3:.1f}", f"{b * 1e3:.1f}", f"{b / a:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
