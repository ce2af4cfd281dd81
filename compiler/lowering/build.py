"""Builds the artifact folder from a serving step: programs, weights, tokenizer, and the manifest last.

Everything is written into a folder beside the wanted one and renamed at the end, so that a folder under the wanted name
is always a complete artifact, also for a server that starts while a compilation is replacing it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import jax
from jax import export

from distaff.compiler.artifact import MANIFEST, PROGRAMS, TOKENIZER, WEIGHTS, CacheSpec, Manifest
from distaff.compiler.buckets import Bucket
from distaff.compiler.errors import CompileError
from distaff.compiler.lowering.export import ExportedProgram, StepExporter
from distaff.compiler.lowering.weights import write_weights
from distaff.compiler.serve_step import ServeStep

# A CPU's pool competes with everything else in main memory, so artifacts ask for no more than this by default.
CPU_POOL_BYTES = 512 << 20

Progress: TypeAlias = Callable[[str, int, int], None]


class OutputExistsError(CompileError):
    """The output folder is there already and may not be replaced."""


class SavableTokenizer(Protocol):
    """A tokenizer that writes its files (``tokenizer.json`` and so on) into a folder."""

    def save(self, folder: Path) -> None:
        """Writes the files into ``folder``, which exists."""


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What the manifest says about the model besides its step; ``fingerprint`` identifies the source checkpoint."""

    name: str
    max_model_len: int
    architecture: str = ""
    eos_token_ids: Sequence[int] = ()
    bos_token_id: int | None = None
    tokenizer: SavableTokenizer | None = None
    fingerprint: str = ""


def build_artifact(
    step: ServeStep,
    model: ModelInfo,
    output: Path,
    *,
    buckets: Sequence[Bucket],
    page_size: int,
    num_pages: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Writes the artifact of ``step`` to ``output`` for the platform of this process.

    ``num_pages`` is the pool size that the artifact asks for (default: `default_num_pages`). ``progress`` is called as
    ``(what, done, total)``. Raises `OutputExistsError` if ``output`` exists, unless ``force`` is set and it is an
    artifact, and `LoweringError` if the step breaks its contract.
    """
    check_output(output, force=force)
    tell = progress or (lambda what, done, total: None)
    platform = export.default_export_platform()
    pages_per_request = -(-model.max_model_len // page_size)
    if num_pages is None:
        max_batch = max(bucket.requests for bucket in buckets)
        num_pages = default_num_pages(step.caches, page_size, pages_per_request, max_batch, platform)
    exporter = StepExporter(
        step, page_size=page_size, pages_per_request=pages_per_request, num_pages=num_pages, platform=platform
    )
    with _replacing(output) as folder:
        programs = []
        for done, bucket in enumerate(buckets):
            tell("exporting programs", done, len(buckets))
            programs.append(exporter.program(bucket))
            _write(folder / PROGRAMS / programs[-1].spec.file, programs[-1].blob)
        tell("writing weights", 0, 1)
        (folder / WEIGHTS).mkdir()
        weights = write_weights(exporter.weights.arrays, folder / WEIGHTS)
        if model.tokenizer is not None:
            (folder / TOKENIZER).mkdir()
            model.tokenizer.save(folder / TOKENIZER)
        manifest = Manifest(
            model=model.name,
            architecture=model.architecture,
            vocab_size=step.vocab_size,
            max_model_len=model.max_model_len,
            page_size=page_size,
            num_pages=num_pages,
            fixed_num_pages=exporter.fixed_because is not None,
            custom_calls=tuple(sorted(frozenset[str]().union(*(program.custom_calls for program in programs)))),
            dtype=_main_dtype(step),
            platform=platform,
            caches=step.caches,
            weights=weights,
            programs=tuple(program.spec for program in programs),
            eos_token_ids=tuple(model.eos_token_ids),
            bos_token_id=model.bos_token_id,
            has_tokenizer=model.tokenizer is not None,
            fingerprint=model.fingerprint,
            distaff_version=importlib.metadata.version("distaff"),
            jax_version=jax.__version__,
            report={**step.report, "lowering": _report(programs, exporter.fixed_because)},
        )
        manifest.save(folder)
        tell("writing weights", 1, 1)
    return manifest


def default_num_pages(
    caches: Sequence[CacheSpec], page_size: int, pages_per_request: int, max_batch: int, platform: str
) -> int:
    """The pool size that an artifact asks for: what ``max_batch`` longest requests would use, and the null page.

    On a CPU it is cut to `CPU_POOL_BYTES`, but never below one request. The runtime bounds it by the memory it finds.
    """
    useful = max_batch * pages_per_request
    if platform == "cpu":
        bytes_per_page = max(1, page_size * sum(cache.bytes_per_token for cache in caches))
        useful = min(useful, CPU_POOL_BYTES // bytes_per_page)
    return max(useful, pages_per_request) + 1


def check_output(output: Path, *, force: bool) -> None:
    """Raises `OutputExistsError` unless an artifact may be written to ``output``: checked before any work is done."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / MANIFEST).is_file():
        raise OutputExistsError(f"{output} exists and is not an artifact; it is not touched. Choose another folder")
    if not force:
        raise OutputExistsError(f"{output} holds an artifact already; use --force to replace it, or another folder")


@contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """A new folder that takes the place of ``output`` if the block succeeds, and vanishes if it does not."""
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if output.exists():
            old = output.with_name(f".{output.name}.old-{os.getpid()}")
            output.rename(old)
            partial.rename(output)
            shutil.rmtree(old)
        else:
            partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(path: Path, blob: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(blob)


def _main_dtype(step: ServeStep) -> str:
    """The number format of the packed weights, or the dtype in which most bytes of plain ones are."""
    if step.weight_format is not None:
        return step.weight_format
    sizes: Counter[str] = Counter()
    for weight in step.weights.values():
        sizes[str(weight.dtype)] += weight.nbytes
    return sizes.most_common(1)[0][0] if sizes else "float32"


def _report(programs: Sequence[ExportedProgram], fixed_because: str | None) -> dict[str, Any]:
    return {
        "programs": [
            {
                "name": program.spec.name,
                "trace_seconds": round(program.seconds, 3),
                "bytes": len(program.blob),
                "operations": sum(program.operations.values()),
            }
            for program in programs
        ],
        "operations": programs[0].operations,
        "pool_size_fixed_because": fixed_because,
    }
