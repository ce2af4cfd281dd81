"""How near matmuls with packed weights come to what this machine can do; all in one process, taking turns.

    python -m distaff.tools.bench_matmul --formats bf16,int8,int4g32 --tokens 1,8,64,512
    python -m distaff.tools.bench_matmul --shapes model --tokens 1

A case is a chain of products with different matrices, more than the caches hold (up to 512 rows; then fewer), so that
decoding reads memory as a model does. The limit of a case is the longer of reading its weights at the bandwidth and
multiplying at the peak rate, both measured in this run; "of limit" is that time over the fastest run's. XLA is its
float32 dot of the same shape. ``model`` is one decoding step of SmolLM2-135M without attention: 30 layers and the head.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import click
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from distaff.kernels import native
from distaff.kernels.matmul import WeightFormat, embed_rows, matmul, packed_shapes
from distaff.tools.bench_roofline import Roofline

SHAPES = "576x3072,1536x576,576x576,576x49152"
COLD_BYTES = 128e6  # of weights in a chain, four times the last cache
Arrays: TypeAlias = tuple[jax.Array, ...]


@dataclasses.dataclass
class Case:
    """One compiled chain, what it reads and multiplies, and the times that it took."""

    format: str
    shape: str
    tokens: int
    bytes: float
    operations: float
    run: Callable[[], Any]
    calls: int = 1
    seconds: list[float] = dataclasses.field(default_factory=list)

    def once(self) -> None:
        """Runs it and notes the time."""
        started = time.perf_counter()
        jax.block_until_ready(self.run())
        self.seconds.append(time.perf_counter() - started)


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--formats", default="bf16,int8,int4g32", show_default=True, help="Names of weight formats; xla too.")
@click.option("--shapes", default=SHAPES, show_default=True, help="KxN, KxNg (gated SiLU), or model.")
@click.option("--tokens", default="1,8,64,512", show_default=True)
@click.option("--activations", default="int8", type=click.Choice(["int8", "float32"]), show_default=True)
@click.option("--repeats", default=7, show_default=True)
def main(formats: str, shapes: str, tokens: str, activations: str, repeats: int) -> None:
    """Measures the roofline and every combination, and prints a table."""
    native.register()
    roofline = Roofline()
    cases = [
        make_case(format, shape, int(m), activations)
        for shape in shapes.split(",")
        for format in formats.split(",")
        for m in tokens.split(",")
    ]
    for _ in range(repeats + 1):
        roofline.measure()
        for case in cases:
            case.once()
    table = Table("shape", "M", "format", "median µs", "fastest µs", "GB/s", "GFLOP/s", "of limit", title=str(roofline))
    for case in cases:
        fastest, median = min(case.seconds[1:]), statistics.median(case.seconds[1:])
        peak = roofline.peaks[product_kind(case.format, activations)]
        limit = max(case.bytes / roofline.read, case.operations / peak)
        times = (f"{seconds / case.calls * 1e6:.1f}" for seconds in (median, fastest))
        rates = (f"{case.bytes / fastest / 1e9:.1f}", f"{case.operations / fastest / 1e9:.0f}")
        table.add_row(case.shape, str(case.tokens), case.format, *times, *rates, f"{limit / fastest:.2f}")
    Console(width=110).print(table)


def product_kind(format: str, activations: str) -> str:
    """Which peak rate bounds products of that format."""
    if format == "xla" or WeightFormat.parse(format).kind not in ("int8", "int4"):
        return "bf16" if format == "bf16" else "f32"
    return "int8" if activations == "int8" else "f32"


def make_case(name: str, shape: str, tokens: int, activations: str) -> Case:
    """A chain of products with different weights, as much as the caches do not hold."""
    if shape == "model":
        return model_case(name, tokens, activations)
    gated = shape.endswith("g")
    rows, columns = map(int, shape.removesuffix("g").split("x"))
    one = weight_bytes(name, rows, columns)
    copies = max(1, round(COLD_BYTES / one / max(1, tokens / 64)))
    weights = [random_weight(name, rows, columns, gated, copy) for copy in range(copies)]

    def chain(x: jax.Array, weights: list[Arrays]) -> jax.Array:
        y = None
        for weight in weights:  # one after the other, as each adds what the one before made
            y = product(name, x, weight, rows, columns, activations, gated=gated, residual=y)
        assert y is not None
        return y

    x = jax.random.normal(jax.random.key(0), (tokens, rows))
    run = jax.jit(chain).lower(x, weights).compile()
    operations = 2 * tokens * rows * columns * copies
    return Case(name, shape, tokens, one * copies, operations, lambda: run(x, weights), copies)


def model_case(name: str, tokens: int, activations: str) -> Case:
    """The matrices of SmolLM2-135M: per layer the projections of q, k and v, the output, gate and up, and down."""
    shapes = {"qkv": (576, 960), "out": (576, 576), "up": (576, 3072), "down": (1536, 576)}
    layers = [{k: random_weight(name, *s, k == "up", layer) for k, s in shapes.items()} for layer in range(30)]
    head = random_weight(name, 576, 49152)
    norm = jnp.ones(576)

    def step(tokens: jax.Array, layers: list[dict[str, Arrays]], head: Arrays) -> jax.Array:
        def dot(x: jax.Array, key: str, weight: Arrays, **options: Any) -> jax.Array:
            return product(name, x, weight, *shapes[key], activations, **options)

        x = embed_rows(head, tokens, format=WeightFormat.parse(name), rows=576, columns=49152)
        normed = {"norm_weight": norm, "norm_eps": 1e-5}
        for layer in layers:
            q = dot(x, "qkv", layer["qkv"], **normed)[:, :576]
            x = dot(q, "out", layer["out"], residual=x)
            x = dot(dot(x, "up", layer["up"], gated=True, **normed), "down", layer["down"], residual=x)
        return product(name, x, head, 576, 49152, activations, **normed)

    ids = jnp.arange(tokens, dtype=jnp.int32)
    run = jax.jit(step).lower(ids, layers, head).compile()
    weights = 30 * sum(k * n for k, n in shapes.values()) + 576 * 49152
    total = sum(weight_bytes(name, *s) for s in shapes.values()) * 30 + weight_bytes(name, 576, 49152)
    return Case(name, "model", tokens, total, 2 * tokens * weights, lambda: run(ids, layers, head))


def product(
    name: str, x: jax.Array, weight: Arrays, rows: int, columns: int, activations: str, **options: Any
) -> jax.Array:
    """x times the weight, by the kernel or by XLA."""
    if name == "xla":
        residual = options.get("residual")
        return x @ weight[0] + (0 if residual is None else residual)
    if options.get("gated"):
        options["activation"] = "silu"
    return matmul(
        x, weight, format=WeightFormat.parse(name), rows=rows, columns=columns, activations=activations, **options
    )[0]


@functools.cache
def random_weight(name: str, rows: int, columns: int, gated: bool = False, copy: int = 0) -> Arrays:
    """Packed arrays with anything in them; packing real ones would take longer than measuring."""
    if copy:
        return tuple(array.copy() for array in random_weight(name, rows, columns, gated))
    if name == "xla":
        return (jax.random.uniform(jax.random.key(0), (rows, columns)),)
    rng = np.random.default_rng(0)
    arrays = []
    for shape, dtype in packed_shapes(WeightFormat.parse(name), rows, columns, gated=gated):
        few = rng.random(4099, np.float32) if dtype.startswith("float") else rng.integers(0, 0x3F80, 4099, np.uint16)
        arrays.append(jnp.asarray(np.resize(few.astype(dtype), shape)))
    return tuple(arrays)


def weight_bytes(name: str, rows: int, columns: int) -> float:
    """What a product reads of its weight."""
    return rows * columns * (4 if name == "xla" else WeightFormat.parse(name).bytes_per_weight)


if __name__ == "__main__":
    main()
