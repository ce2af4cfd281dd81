"""How fast paged attention runs here, and with which block sizes; variants take turns in one process.

    python -m distaff.tools.bench_attention decode --sizes 1,8,32
    python -m distaff.tools.bench_attention prefill --sizes 64,256 --vary prefill_chunk=64,128,256

Times are per layer and include writing the step's keys and values; the ratio is that of the fastest runs. On a shared
machine trust only the ratios.
"""

from __future__ import annotations

import functools
import itertools
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

from distaff.kernels.paged_attention import AttentionSpec, StepBatch, xla

PAGE, CONTEXTS, MAX_LEN = 16, (100, 600), 2048


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("phase", type=click.Choice(["decode", "prefill"]))
@click.option("--sizes", default="1,8,32,64", help="Requests of a decode step, or tokens of one prompt.")
@click.option("--vary", multiple=True, help="A field of Blocks and its values: decode_chunk=64,128.")
@click.option("--shape", default="9,3,64", help="Query heads, key-value heads, head size.  [default: SmolLM2-135M]")
@click.option("--layers", default=30, show_default=True)
@click.option("--repeats", default=15, show_default=True)
def main(phase: str, sizes: str, vary: tuple[str, ...], shape: str, layers: int, repeats: int) -> None:
    """Measures every combination of ``--vary`` at each of ``--sizes`` and prints a table."""
    heads, kv_heads, width = map(int, shape.split(","))
    table = Table(
        "size", "blocks", "median µs", "fastest µs", "ratio", "compile s", title=f"{phase}, {shape}, {layers} layers"
    )
    for size in map(int, sizes.split(",")):
        batch, num_pages = decode_batch(size) if phase == "decode" else prefill_batch(size)
        rng = np.random.default_rng(0)
        pool = (layers, num_pages, PAGE, kv_heads, width)
        q, k, v = (rng.normal(size=(size, h, width)).astype(np.float32) for h in (heads, kv_heads, kv_heads))
        runs = [
            Run(functools.partial(step, blocks, layers), jnp.zeros(pool), jnp.zeros(pool), q, k, v, batch)
            for blocks in variants(vary)
        ]
        for _, run in itertools.product(range(repeats), runs):
            run.once()
        for blocks, run in zip(variants(vary), runs, strict=True):
            median, fastest = statistics.median(run.seconds) / layers, min(run.seconds) / layers
            ratio = fastest * layers / min(runs[0].seconds)
            name = " ".join(f"{field}={getattr(blocks, field)}" for field in fields(vary)) or "default"
            cells = (f"{median * 1e6:.0f}", f"{fastest * 1e6:.0f}", f"{ratio:.2f}", f"{run.compile_seconds:.1f}")
            table.add_row(str(size), name, *cells)
    Console(width=110).print(table)


class Run:
    """One compiled variant with its own pool, and the times that it took."""

    def __init__(self, function: Callable[..., Any], k_pages: jax.Array, v_pages: jax.Array, *inputs: Any):
        started = time.perf_counter()
        self._compiled = jax.jit(function, donate_argnums=(0, 1)).lower(k_pages, v_pages, *inputs).compile()
        self.compile_seconds = time.perf_counter() - started
        self._inputs = jax.device_put(inputs)
        self._pages = [k_pages, v_pages]
        self.seconds: list[float] = []

    def once(self) -> None:
        """Runs one step and notes its time."""
        started = time.perf_counter()
        _, *self._pages = jax.block_until_ready(self._compiled(*self._pages, *self._inputs))
        self.seconds.append(time.perf_counter() - started)


def step(
    blocks: xla.Blocks, layers: int, k_pages: jax.Array, v_pages: jax.Array, *inputs: Any
) -> tuple[jax.Array, ...]:
    """Writes and attends in ``layers`` layers, each fed from the one before."""
    q, k, v, batch = inputs
    spec = AttentionSpec(q.shape[2] ** -0.5)
    x = q
    for layer in range(layers):
        # Like a model's, the next keys depend on the last attention; otherwise XLA copies the pool to keep the order.
        rows = k + x[:, : k.shape[1]], v + x[:, : v.shape[1]]
        attended, k_pages, v_pages = xla.attention(
            spec, x, *rows, k_pages, v_pages, layer, batch, None, None, blocks=blocks
        )
        x = q + 0.1 * attended
    return x, k_pages, v_pages


def decode_batch(requests: int) -> tuple[StepBatch, int]:
    """One token each for requests of random contexts on scattered pages; also the number of pages in the pool."""
    contexts = np.random.default_rng(0).integers(*CONTEXTS, size=requests, dtype=np.int32)
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


def variants(vary: tuple[str, ...]) -> list[xla.Blocks]:
    """Every combination of the values of ``--vary``."""
    values = [map(int, item.partition("=")[2].split(",")) for item in vary]
    return [
        xla.Blocks(**dict(zip(fields(vary), combination, strict=True))) for combination in itertools.product(*values)
    ]


if __name__ == "__main__":
    main()
