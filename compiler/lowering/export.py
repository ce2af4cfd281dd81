"""Exports the serving step as one portable StableHLO program per bucket.

The number of pages stays symbolic wherever the step can be traced that way, so that the runtime may choose the pool
size; a step that cannot (a kernel whose blocks need a static shape) is exported for one size, and the manifest says so.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from distaff.compiler.artifact import ProgramSpec
from distaff.compiler.buckets import Bucket
from distaff.compiler.errors import CompileError
from distaff.compiler.lowering.joined import ProgramWeights
from distaff.compiler.lowering.stablehlo import custom_calls, donated_arguments, operation_counts, source_files
from distaff.compiler.serve_step import ServeStep
from distaff.kernels import native
from distaff.kernels.paged_attention import StepBatch, batch_shapes
from distaff.kernels.sampling import SamplingRows, draw_tokens, sampling_shapes


class LoweringError(CompileError):
    """The serving step breaks its own contract or cannot be exported: a defect of the compiler, not of the model."""


@dataclasses.dataclass(frozen=True)
class ExportedProgram:
    """One program: its entry in the manifest, its bytes, and what the report says about it."""

    spec: ProgramSpec
    blob: bytes
    seconds: float
    operations: dict[str, int]
    source_files: frozenset[str]
    custom_calls: frozenset[str]


class StepExporter:
    """Exports one step for any bucket; decides once whether the number of pages can stay symbolic.

    ``num_pages`` is used only if it cannot; `fixed_because` then says what stood against it. ``weights`` are those of
    the programs.
    """

    def __init__(self, step: ServeStep, *, page_size: int, pages_per_request: int, num_pages: int, platform: str):
        self._step = step
        self.weights = ProgramWeights(step, platform)
        self._page_size = page_size
        self._pages_per_request = pages_per_request
        self._platform = platform
        self._fixed_num_pages = num_pages
        self._num_pages: Any = export.symbolic_shape("num_pages")[0]
        self.fixed_because: str | None = None

    def program(self, bucket: Bucket) -> ExportedProgram:
        """Traces and exports the step for ``bucket``; raises `LoweringError` if the result breaks the contract."""
        began = time.perf_counter()
        exported = self._export(bucket)
        text = str(exported.mlir_module())
        if missing := self._page_positions - donated_arguments(text):
            raise LoweringError(f"{bucket.name}: the buffers of arguments {sorted(missing)} (pages) are not reused")
        blob = bytes(exported.serialize())
        spec = ProgramSpec(
            name=bucket.name,
            tokens=bucket.tokens,
            requests=bucket.requests,
            samples=bucket.samples,
            file=f"{bucket.name}.bin",
            sha256=hashlib.sha256(blob).hexdigest(),
        )
        return ExportedProgram(
            spec,
            blob,
            time.perf_counter() - began,
            operation_counts(text),
            frozenset(source_files(text)),
            frozenset(custom_calls(text) & native.register()),
        )

    def _export(self, bucket: Bucket) -> export.Exported:
        try:
            return self._export_for(bucket)
        except Exception as error:
            # Which exception a symbolic size raises depends on the code that met it (a kernel, numpy, jax). If the
            # size was not to blame, the same export with a number raises it again.
            if self.fixed_because is not None:
                raise
            self._num_pages = self._fixed_num_pages
            exported = self._export_for(bucket)
            self.fixed_because = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            return exported

    def _export_for(self, bucket: Bucket) -> export.Exported:
        jitted = jax.jit(self._flat(bucket), donate_argnums=tuple(sorted(self._page_positions)))
        # Our own kernels keep their names and meaning; `ArtifactError` tells who lacks one.
        ours = [export.DisabledSafetyCheck.custom_call(name) for name in sorted(native.register())]
        return export.export(jitted, platforms=[self._platform], disabled_checks=ours)(*self._arguments(bucket))

    @property
    def _page_positions(self) -> set[int]:
        first = len(self.weights.arrays)
        return set(range(first, first + len(self._step.caches)))

    def _arguments(self, bucket: Bucket) -> list[jax.ShapeDtypeStruct]:
        """Weights, pages and batch as one flat list: dispatching nested inputs costs twice the time."""
        weights = [jax.ShapeDtypeStruct(w.shape, w.dtype) for w in self.weights.arrays.values()]
        pages = [
            jax.ShapeDtypeStruct((c.layers, self._num_pages, self._page_size, *c.shape), jnp.dtype(c.dtype))
            for c in self._step.caches
        ]
        batch = batch_shapes(bucket.tokens, bucket.requests, bucket.samples, self._pages_per_request)
        return [*weights, *pages, *batch, *sampling_shapes(bucket.samples)]

    def _flat(self, bucket: Bucket) -> Callable[..., tuple[jax.Array, ...]]:
        first_page = len(self.weights.arrays)
        first_batch = first_page + len(self._step.caches)
        first_sampling = first_batch + len(StepBatch._fields)
        wanted = (bucket.samples, self._step.vocab_size)

        def step(*arguments: jax.Array) -> tuple[jax.Array, ...]:
            pages = arguments[first_page:first_batch]
            weights = self.weights.of_step(arguments[:first_page])
            logits, new_pages = self._step.function(weights, pages, StepBatch(*arguments[first_batch:first_sampling]))
            if logits.shape != wanted or logits.dtype != jnp.float32:
                raise LoweringError(f"{bucket.name}: logits are {logits.dtype}{logits.shape}, not float32{wanted}")
            before, after = [p.aval for p in pages], [p.aval for p in new_pages]
            if [(a.shape, a.dtype) for a in before] != [(a.shape, a.dtype) for a in after]:
                raise LoweringError(f"{bucket.name}: pages {before} went in and {after} came out")
            tokens = draw_tokens(logits, SamplingRows(*arguments[first_sampling:]), platform=self._platform)
            return logits, tokens, *new_pages

        return step
