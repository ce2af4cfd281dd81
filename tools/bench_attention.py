"""How fast paged attention runs here, against what this machine can do; variants take turns in one process.

    python -m distaff.tools.bench_attention decode --sizes 1,8,32
    python -m distaff.tools.bench_attention decode --sizes 32 --contexts 1000,1001 --shape 32,8,128 --layers 4
    python -m distaff.tools.bench_attention prefill --sizes 64,256 --variants xla --vary prefill_chunk=64,128,256

Times are per layer and include writing the step's rows. The limit is the longer of reading the contexts' keys
and values at the bandwidth and of its products at the peak rate (of bfloat16 where the pages hold it or int8), both
measured in the same run; "of limit" is that time over the fastest run's.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from distaff.kernels import native
from distaff.kernels.paged_attention import AttentionSpec, StepBatch, cpu, pool_shape, xla
from distaff.runtime.platforms import zeros
from distaff.tools.bench_roofline import Roofline

PAGE, MAX_LEN = 16, 2048
DTYPES = {"f32": "float32", "bf16": "uint16", "int8": "int8"}


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("phase", type=click.Choice(["decode", "prefill"]))
@click.option("--sizes", default="1,8,32,64", help="Requests of a decode step, or tokens of one prompt.")
@click.option(
    "--variants", default="xla,native,native-bf16,native-int8", show_default=True, help="Kernels, and what pages hold."
)
@click.option("--vary", multiple=True, help="A field of XLA's Blocks and its values: decode_chunk=64,128.")
@click.option("--contexts", default="100,600", show_default=True, help="Tokens of a decoded request: at least, below.")
@click.option("--shape", default="9,3,64", help="Query heads, key-value heads, head size.  [default: SmolLM2-135M]")
@click.option("--layers", default=30, show_default=True)
@click.option("--repeats", default=15, show_default=True)
def main(
    phase: str, sizes: str, variants: str, vary: tuple[str, ...], contexts: str, shape: str, layers: int, repeats: int
) -> None:
    """Measures every variant at each of ``--sizes`` and prints a table."""
    roofline = Roofline() if native.available() else None
    table = Table("size", "kernel", "median µs", "fastest µs", "GB/s", "GFLOP/s", "of limit")
    heads, kv_heads, width = map(int, shape.split(","))
    for size in map(int, sizes.split(",")):
        low, high = map(int, contexts.split(","))
        batch, num_pages = decode_batch(size, low, high) if phase == "decode" else prefill_batch(size)
        rng = np.random.default_rng(0)
        q, k, v = (rng.normal(size=(size, h, width)).astype(np.float32) for h in (heads, kv_heads, kv_heads))
        runs = {}
        for name, (attend, pages) in kernels(variants, vary).items():
            row = pool_shape((kv_heads, width), DTYPES[pages])
            pools = (zeros((layers, num_pages, PAGE, *row), DTYPES[pages], jax.devices()[0]) for _ in range(2))
            runs[name] = pages, Run(functools.partial(step, attend, layers), *pools, q, k, v, batch)
        for _ in range(repeats):
            if roofline is not None:
                roofline.measure()
            for _, run in runs.values():
                run.once()
        for name, (pages, run) in runs.items():
            fastest = min(run.seconds) / layers
            read = int(np.sum(batch.contexts)) * 2 * math.prod(run.pages[0].shape[3:]) * run.pages[0].itemsize
            operations = int(np.sum(batch.positions + 1)) * 4 * heads * width
            limit = ""
            if roofline is not None:
                seconds = max(read / roofline.read, operations / roofline.peaks["f32" if pages == "f32" else "bf16"])
                limit = f"{seconds / fastest:.2f}"
            times = (f"{seconds * 1e6:.1f}" for seconds in (statistics.median(run.seconds) / layers, fastest))
            table.add_row(
                str(size), name, *times, f"{read / fastest / 1e9:.1f}", f"{operations / fastest / 1e9:.0f}", limit
            )
    table.title = f"{phase}, {shape}, {layers} layers; {roofline or 'no native kernels'}"
    Console(width=110).print(table)


def kernels(names: str, vary: tuple[str, ...]) -> dict[str, tuple[Callable[..., Any], str]]:
    """Each variant's function and what its pages hold, by name; XLA's with every combination of ``vary``."""
    found: dict[str, tuple[Callable[..., Any], str]] = {}
    for name in names.split(","):
        kernel, _, pages = name.partition("-")
        if kernel == "native":
            found[name] = cpu.attention, pages or "f32"
            continue
        for blocks in combinations(vary):
            label = " ".join([name, *(f"{field}={getattr(blocks, field)}" for field in fields(vary))])
            found[label] = functools.partial(xla.attention, blocks=blocks), pages or "f32"
    return found


class Run:
    """One compiled variant with its own pool, and the times that it took."""

    def __init__(self, function: Callable[..., Any], k_pages: jax.Array, v_pages: jax.Array, *inputs: Any):
        self._compiled = jax.jit(function, donate_argnums=(0, 1)).lower(k_pages, v_pages, *inputs).compile()
        self._inputs = jax.device_put(inputs)
        self.pages = [k_pages, v_pages]
        self.seconds: list[float] = []

    def once(self) -> None:
        """Runs one step and notes its time."""
        started = time.perf_counter()
        _, *self.pages = jax.block_until_ready(self._compiled(*self.pages, *self._inputs))
        self.seconds.append(time.perf_counter() - started)


def step(
    attend: Callable[..., Any], layers: int, k_pages: jax.Array, v_pages: jax.Array, *inputs: Any
) -> tuple[jax.Array, ...]:
    """Writes and attends in ``layers`` layers, each fed from the one before."""
    q, k, v, batch = inputs
    spec = AttentionSpec(q.shape[2] ** -0.5)
    x = q
    for layer in range(layers):
        # Like a model's, the next keys depend on the last attention; otherwise XLA copies the pool to keep the order.
        rows = k + x[:, : k.shape[1]], v + x[:, : v.shape[1]]
        attended, k_pages, v_pages = attend(spec, x, *rows, k_pages, v_pages, layer, batch, None, None)
        x = q + 0.1 * attended
    return x, k_pages, v_pages


def decode_batch(requests: int, low: int = 100, high: int = 600) -> tuple[StepBatch, int]:
    """One token each for requests of random contexts on scattered pages; also the number of pages in the pool."""
    contexts = np.random.default_rng(0).integers(low, high, size=requests, dtype=np.int32)
    return ragged(contexts, contexts - 1, decodes=requests)


def prefill_batch(tokens: int) -> tuple[StepBatch, int]:
    """One prompt of ``tokens`` tokens and no cached context; also the number of pages in the pool."""
    contexts = np.array([tokens, 0], np.int32)
    return ragged(contexts, np.zeros(2, np.int32), decodes=0)


def ragged(contexts: np.ndarray[Any, Any], computed: np.ndarray[Any, Any], decodes: int) -> tuple[StepBatch, int]:
    """The step that takes each request from ``computed`` to ``contexts`` tokens."""
    width, requests = MAX_LEN // PAGE, len(contexts)
    used = -(-contexts // PAGE)
    pages = np.random.default_rng(1).permutation(np.arange(1, used.sum() + 1, dtype=np.int32))
    tables = np.zeros((requests, width), np.int32)
    tables[np.arange(width) < used[:, None]] = pages
    rows = np.repeat(np.arange(requests, dtype=np.int32), contexts - computed)
    starts = np.concatenate([[0], np.cumsum(contexts - computed)]).astype(np.int32)
    positions = (np.arange(len(rows)) - starts[rows] + computed[rows]).astype(np.int32)
    slots = tables[rows, positions // PAGE] * PAGE + positions % PAGE
    none = rows * 0
    arrays = (none, positions, slots, rows, starts, contexts, tables, np.int32(decodes), none[:1])
    return StepBatch(*map(jnp.asarray, arrays)), len(pages) + 1


def fields(vary: tuple[str, ...]) -> list[str]:
    """The names of the varied fields."""
    return [item.partition("=")[0] for item in vary]


def combinations(vary: tuple[str, ...]) -> list[xla.Blocks]:
    """Every combination of the values of ``--vary``."""
    values = [map(int, item.partition("=")[2].split(",")) for item in vary]
    return [
        xla.Blocks(**dict(zip(fields(vary), combination, strict=True))) for combination in itertools.product(*values)
    ]


if __name__ == "__main__":
    main()
