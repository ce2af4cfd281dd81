"""What this machine can do at most: bytes read from memory and operations in registers a second.

    python -m distaff.tools.bench_roofline

Prints both for one thread and for all of XLA's. Where two threads do no more than one, they share a core. Memory is
read for some seconds without a pause, as decoding reads weights; many machines read short bursts faster. Operations are
those of the fastest instructions that the kernels use, AMX's where there are.
"""

from __future__ import annotations

import dataclasses
import functools
import time

import click
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from distaff.kernels import native

READ_SECONDS = 3.0
ROUNDS = 1 << 24
PEAK_STEPS = 16  # kPeakSteps in kernels/native/roofline.h
# By their number there, with what is multiplied: ones.
KINDS = {"f32": 0x3F800000, "bf16": 0x3F803F80, "int8": 0x01010101}


@dataclasses.dataclass
class Roofline:
    """Measures one rate of each kind every time that it is asked to, and keeps the best.

    ``read`` is in bytes a second; ``peaks`` are additions and multiplications a second by the kind of the factors.
    A reading lasts for ``read_seconds``, or only for one pass over 256 MiB, which is to be compared with runs as short.
    Raises `RuntimeError` in an installation without native kernels.
    """

    one_thread: bool = False
    read_seconds: float = 0
    read: float = 0
    peaks: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))

    def __post_init__(self) -> None:
        if not native.available():
            raise RuntimeError("the roofline is measured by the native kernels, and this installation has none")
        native.register()
        self._data = jnp.zeros(1 << 28, jnp.uint8)
        self._words = {kind: jnp.full(1, word, jnp.int32) for kind, word in KINDS.items()}
        for number, data in [(0, self._data), *enumerate(self._words.values())]:
            self._seconds(data, number, ROUNDS if data.size == 1 else 0)  # compiles
        self.measure()

    def measure(self) -> None:
        """Takes another look."""
        self.read = max(self.read, self._read_rate())
        for number, (kind, words) in enumerate(self._words.items()):
            operations = ROUNDS * PEAK_STEPS * 16 * 2 * 2**number
            self.peaks[kind] = max(self.peaks[kind], operations / self._seconds(words, number, ROUNDS))

    def _read_rate(self) -> float:
        passes, seconds = 0, 0.0
        while not passes or seconds < self.read_seconds:
            passes, seconds = passes + 1, seconds + self._seconds(self._data, 0, 0)
        return passes * self._data.size / seconds

    def _seconds(self, data: jax.Array, kind: int, rounds: int) -> float:
        jax.block_until_ready(data)
        started = time.perf_counter()
        jax.block_until_ready(_run(data, kind, rounds, self.one_thread))
        return time.perf_counter() - started

    def __str__(self) -> str:
        peaks = ", ".join(f"{kind} {rate / 1e9:.0f} G/s" for kind, rate in self.peaks.items())
        return f"reading {self.read / 1e9:.1f} GB/s; {peaks}"


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _run(data: jax.Array, kind: int, rounds: int, one_thread: bool) -> jax.Array:
    call = jax.ffi.ffi_call("distaff_roofline", jax.ShapeDtypeStruct((1,), np.float32), has_side_effect=True)
    result: jax.Array = call(data, kind=np.int32(kind), rounds=np.int64(rounds), one_thread=one_thread)
    return result


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--repeats", default=3, show_default=True, help="Of which the best counts.")
@click.option("--seconds", default=READ_SECONDS, show_default=True, help="How long each of them reads memory.")
def main(repeats: int, seconds: float) -> None:
    """Measures with one thread and with all in turns, and prints a table."""
    rooflines = {"1": Roofline(one_thread=True, read_seconds=seconds), "all": Roofline(read_seconds=seconds)}
    for _ in range(repeats - 1):
        for roofline in rooflines.values():
            roofline.measure()
    table = Table("threads", "reading [GB/s]", *(f"{kind} [G/s]" for kind in KINDS), title=native.features()[-1])
    for threads, roofline in rooflines.items():
        rates = (f"{rate / 1e9:.0f}" for rate in roofline.peaks.values())
        table.add_row(threads, f"{roofline.read / 1e9:.1f}", *rates)
    Console().print(table)


if __name__ == "__main__":
    main()
