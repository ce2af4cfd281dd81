"""Runs the step: holds weights and KV pages on the device and calls the compiled program of the batch's bucket."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jax import export

from distaff.compiler.artifact import EXECUTABLES, PROGRAMS, ArtifactError, Manifest, ProgramSpec
from distaff.kernels import native
from distaff.kernels.paged_attention import StepBatch, batch_shapes
from distaff.kernels.sampling import SamplingRows, sampling_shapes
from distaff.runtime.executables import ExecutableCache, compilations
from distaff.runtime.platforms import choose_num_pages, memory_limit, zeros
from distaff.runtime.weights import load_weights

# XLA compiles with the GIL released; more threads would only share the cores that XLA uses already.
COMPILING_THREADS = 2


class NoProgramError(Exception):
    """A batch is larger than every program of the artifact: the scheduler and the artifact disagree about limits."""


class ModelRunner:
    """The programs, weights and pages of one artifact on one device; to be used from one thread.

    ``num_pages``, ``kv_cache_bytes`` or ``memory_share`` size the KV pool (see `choose_num_pages`). With
    ``forbid_compiles`` a program that would have to be compiled outside `warm_up` raises `CompileForbiddenError`; with
    ``progress`` `warm_up` shows a bar. Raises `ArtifactError` if the artifact is damaged or for another platform, and
    `MemoryTooSmallError` if the pool does not fit.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: Manifest,
        *,
        num_pages: int | None = None,
        kv_cache_bytes: int | None = None,
        memory_share: float | None = None,
        forbid_compiles: bool = False,
        progress: bool = False,
    ):
        self._folder = Path(folder)
        self._manifest = manifest
        self._forbid_compiles = forbid_compiles
        self._progress = progress
        self._device = jax.devices()[0]
        _check_platform(manifest)
        _check_kernels(manifest)
        self.num_pages = choose_num_pages(
            manifest,
            memory_limit(self._device),
            num_pages=num_pages,
            kv_cache_bytes=kv_cache_bytes,
            memory_share=memory_share,
        )
        self.executables = ExecutableCache(self._folder / EXECUTABLES, self._device)
        self.executables.forbid_compiles = forbid_compiles
        self._weights = load_weights(self._folder, manifest.weights, self._device)
        # Zeros, because what a masked key holds must be finite.
        self._pages = [
            zeros((c.layers, self.num_pages, manifest.page_size, *c.shape), c.dtype, self._device)
            for c in manifest.caches
        ]
        self._by_cost = sorted(manifest.programs, key=lambda p: (p.tokens, p.samples, p.requests))
        self._step = {p.name: _Once(partial(self._executable, p)) for p in manifest.programs}
        # One thread: the first steps run at the same time.
        self._loading = ThreadPoolExecutor(1, thread_name_prefix="load-programs")
        self._compilations_before = compilations()

    @property
    def compiles(self) -> int:
        """XLA compilations in this process since `warm_up`, by whomever; 0 is what serving should stay at."""
        return compilations() - self._compilations_before

    @property
    def pages(self) -> tuple[jax.Array, ...]:
        """The KV buffers in the order of ``manifest.caches``; the next `execute` invalidates them."""
        return tuple(self._pages)

    def bucket(self, tokens: int, requests: int, samples: int) -> ProgramSpec:
        """The cheapest program that holds a batch of these numbers; raises `NoProgramError` if there is none.

        Decode programs are considered only if ``tokens == requests``, when every row is one token.
        """
        for program in self._by_cost:
            fits = program.tokens >= tokens and program.requests >= requests and program.samples >= samples
            if fits and (tokens == requests or not program.is_decode):
                return program
        raise NoProgramError(
            f"no program holds {tokens} tokens of {requests} requests with {samples} samples; the largest are "
            f"{self._manifest.max_step_tokens} tokens, {self._manifest.max_batch} requests and "
            f"{self._manifest.max_samples} samples: keep batches within them, or compile with more --buckets"
        )

    def execute(
        self, program: ProgramSpec, batch: StepBatch, rows: SamplingRows | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Runs one step; returns float32 logits ``[S, vocab_size]`` and the token of each row, int32 ``[S]``.

        ``batch`` has the shapes of ``program``, and so has ``rows``, by which tokens are drawn (None: the most likely).
        """
        step = self._step[program.name]()
        if rows is None:
            floats, ints = (np.zeros(s.shape, s.dtype) for s in sampling_shapes(program.samples))
        else:
            floats, ints = cast(Any, rows)
        logits, tokens, *self._pages = step(*self._weights, *self._pages, *batch, floats, ints)
        return logits, tokens

    def warm_up(self) -> None:
        """Makes every program ready: compiles what no executable is stored for, and starts to load the others.

        Returns when nothing is left to compile. Loading goes on in the background, and `execute` loads what it needs
        itself if it comes first, so that the first tokens do not wait for programs that they do not use.
        """
        self.executables.forbid_compiles = False
        missing = [p for p in self._by_cost if not self._is_stored(p)]
        self._compile(missing)
        for program in self._by_cost:
            self._loading.submit(self._step[program.name])
        self.executables.forbid_compiles = self._forbid_compiles
        self._compilations_before = compilations()

    def close(self) -> None:
        """Stops loading in the background; waits for what is being loaded right now."""
        self._loading.shutdown(cancel_futures=True)

    def _compile(self, programs: list[ProgramSpec]) -> None:
        with ThreadPoolExecutor(COMPILING_THREADS) as pool:
            done: Iterable[Future[jax.stages.Compiled]] = as_completed(
                [pool.submit(self._step[program.name]) for program in programs]
            )
            if self._progress and programs:
                from rich.progress import track  # only here: a start that compiles nothing need not import it

                done = track(done, f"Compiling {len(programs)} programs for this machine", len(programs))
            try:
                for future in done:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _is_stored(self, program: ProgramSpec) -> bool:
        return self.executables.has(program.name, *self._arguments(program), program=program.sha256)

    def _executable(self, program: ProgramSpec) -> jax.stages.Compiled:
        first_page = len(self._weights)
        pages = range(first_page, first_page + len(self._pages))
        jitted = jax.jit(partial(_call_exported, self._folder / PROGRAMS, program), donate_argnums=tuple(pages))
        return self.executables.get(program.name, jitted, *self._arguments(program), program=program.sha256)

    def _arguments(self, program: ProgramSpec) -> list[jax.ShapeDtypeStruct]:
        arrays = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (*self._weights, *self._pages)]
        width = self._manifest.pages_per_request
        batch = batch_shapes(program.tokens, program.requests, program.samples, width)
        return [*arrays, *batch, *sampling_shapes(program.samples)]


class _Once:
    """A value made at the first call, from whichever thread that comes; a failed attempt is repeated."""

    def __init__(self, make: Callable[[], jax.stages.Compiled]):
        self._make = make
        self._lock = threading.Lock()
        self._value: jax.stages.Compiled | None = None

    def __call__(self) -> jax.stages.Compiled:
        with self._lock:
            if self._value is None:
                self._value = self._make()
            return self._value


def _call_exported(programs: Path, program: ProgramSpec, *arguments: jax.Array) -> Any:
    """Calls the exported program; reads it only when this is traced, that is, to compile it."""
    file = programs / program.file
    blob = file.read_bytes()
    if hashlib.sha256(blob).hexdigest() != program.sha256:
        raise ArtifactError(f"{file} is damaged: its SHA-256 is not the manifest's; compile the model again")
    return export.deserialize(bytearray(blob)).call(*arguments)


def _check_kernels(manifest: Manifest) -> None:
    missing = set(manifest.custom_calls) - native.register()
    if missing:
        built = "of this version lacks them" if native.available() else "was installed without native kernels"
        raise ArtifactError(
            f"the programs call the native kernels {', '.join(sorted(missing))}, and this distaff {built}; install it "
            "where there is a C++ compiler, or compile the model again here"
        )


def _check_platform(manifest: Manifest) -> None:
    here = export.default_export_platform()
    if manifest.platform != here:
        raise ArtifactError(
            f"the artifact was compiled for {manifest.platform} and this process runs on {here}; compile the model "
            f"on {here}, or choose the device with JAX_PLATFORMS={manifest.platform}"
        )
