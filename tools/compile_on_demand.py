"""From the name of a model to an artifact: load the checkpoint, compile it, and keep the result in a cache.

`compile-model` and `serve-model MODEL` both go through here, so that a model served by name is what compile-model
would have made with the same options.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import distaff.compiler
import distaff.frontend
import distaff.kernels
from distaff.compiler.artifact import MANIFEST, Manifest

if TYPE_CHECKING:
    from distaff.compiler.buckets import Bucket
    from distaff.compiler.ir import StoredBlocks
    from distaff.compiler.lowering.build import Progress
    from distaff.compiler.passes.pack import WeightFormats
    from distaff.frontend.loading import LoadedModel
    from distaff.runtime.executables import ExecutableRecord

logger = logging.getLogger(__name__)

# Without a wish, requests may be this long at most, even if the model allows more: a pool must hold a whole request.
DEFAULT_MAX_MODEL_LEN = 8192
_PASSAGE_TOKENS = 160


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """How to compile a checkpoint; the defaults are those of `distaff.compiler.compile.compile_model`.

    ``dtype`` "auto" is bfloat16, except on a CPU without native kernels for it, where it is float32. ``quantize`` is
    "none", a `WeightFormat` name ("int8", "int4", "int4g64", …) for the model's matrices, or "gguf": those that a GGUF
    file holds as Q8_0, Q4_0 or Q4_1 are kept bit for bit, and others are in ``dtype``. "auto" is "gguf" where the
    native kernels read such blocks, unless ``dtype`` says something else, and "none" for other checkpoints.
    ``quantize_tables`` is a format for the embedding and the logits (default: int8 for 4-bit matrices, else as they).
    ``kv_cache_dtype`` "auto" is as ``dtype``. ``max_model_len`` None is the model's own limit up to
    `DEFAULT_MAX_MODEL_LEN`; ``buckets`` is text in the form of `distaff.compiler.buckets.parse_buckets`. Raises
    `BucketError`, or ValueError for formats that there are not.
    """

    dtype: str = "auto"
    quantize: str = "auto"
    quantize_tables: str | None = None
    kv_cache_dtype: str = "auto"
    max_model_len: int | None = None
    latent_cache: bool = False
    max_batch: int = 64
    max_step_tokens: int = 512
    page_size: int = 16
    num_pages: int | None = None
    buckets: str | None = None

    def batch_shapes(self) -> tuple[Bucket, ...]:
        """The shapes to compile; raises `BucketError` if the options contradict each other."""
        from distaff.compiler.buckets import default_buckets, parse_buckets

        return parse_buckets(self.buckets) if self.buckets else default_buckets(self.max_batch, self.max_step_tokens)

    def resolved_dtype(self) -> str:
        """``dtype`` without "auto"."""
        if self.dtype != "auto":
            return self.dtype
        import jax

        from distaff.kernels import native

        fast = jax.default_backend() != "cpu" or {"avx512_bf16", "amx"} & set(native.features())
        return "bfloat16" if fast else "float32"

    def weight_formats(self) -> WeightFormats | None:
        """The formats to pack weights in, other than those kept as stored; None to leave them as the model has them."""
        from distaff.compiler.passes.pack import WeightFormats
        from distaff.kernels.matmul import WeightFormat

        plain = self.quantize in ("auto", "none", "gguf")
        packable = _has_native_kernels() and self.resolved_dtype() in ("float32", "bfloat16")
        if self.quantize in ("auto", "none") and not packable:
            return None
        matrices = WeightFormat.parse(self.resolved_dtype() if plain else self.quantize)
        tables = self.quantize_tables or ("int8" if matrices.kind == "int4" else matrices.name)
        return WeightFormats(matrices, WeightFormat.parse(tables))

    def stored(self, loaded: LoadedModel) -> Mapping[str, StoredBlocks]:
        """The weights of ``loaded`` to keep as its checkpoint has them; raises `NothingStoredError`."""
        from distaff.kernels.matmul import gguf_format

        automatic = self.quantize == "auto" and self.dtype == "auto" and _has_native_kernels()
        if self.quantize != "gguf" and not automatic:
            return {}
        kept = {name: blocks for name, blocks in loaded.blocks.items() if gguf_format(blocks.type_name)}
        if self.quantize_tables is not None:
            kept = {name: blocks for name, blocks in kept.items() if blocks.shape[0] != loaded.config.vocab_size}
        if self.quantize == "gguf" and not kept:
            raise NothingStoredError(loaded.name, {blocks.type_name for blocks in loaded.blocks.values()})
        return kept

    def kv_dtype(self) -> str | None:
        """The dtype of the KV cache; None for what the model computes in."""
        return self.resolved_dtype() if self.kv_cache_dtype == "auto" else self.kv_cache_dtype

    def model_len(self, loaded: LoadedModel) -> int:
        """The longest request to compile ``loaded`` for."""
        return self.max_model_len or min(loaded.max_model_len, DEFAULT_MAX_MODEL_LEN)


class NothingStoredError(ValueError):
    """Blocks of a checkpoint were to be kept as they are, and there are none that kernels read."""

    def __init__(self, model: str, types: Collection[str]) -> None:
        held = f"its matrices are {', '.join(sorted(types))}" if types else "its matrices are not quantised"
        super().__init__(
            f"nothing of {model} can be kept as it is: {held}, and Q8_0, Q4_0 and Q4_1 of GGUF files can. "
            "Quantise it (int8, int4), or take --dtype alone"
        )


def _has_native_kernels() -> bool:
    import jax

    from distaff.kernels import native

    return jax.default_backend() == "cpu" and native.available()


def load(model: str, options: CompileOptions) -> LoadedModel:
    """Loads a checkpoint as ``options`` want it, with a progress bar; raises what `load_model` raises."""
    from distaff.frontend.loading import load_model

    # Packed weights are made of float32 ones, and their kernels add up in float32.
    dtype = "float32" if options.weight_formats() is not None else options.resolved_dtype()
    return load_model(model, dtype=dtype, max_model_len=options.max_model_len)


def compile_loaded(
    loaded: LoadedModel,
    output: Path,
    options: CompileOptions,
    *,
    name: str | None = None,
    dump: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Compiles a loaded checkpoint to ``output``; raises what `compile_model` raises."""
    from distaff.compiler.compile import compile_model

    stored = options.stored(loaded)
    quantised = bool(stored) or options.quantize not in ("auto", "none")
    return compile_model(
        loaded.apply,
        loaded.params,
        output=output,
        max_model_len=options.model_len(loaded),
        name=name or loaded.name,
        architecture=loaded.architecture,
        latent_cache=options.latent_cache,
        weight_formats=options.weight_formats(),
        stored=stored,
        kv_dtype=options.kv_dtype(),
        passages=passages(loaded, options) if quantised else (),
        page_size=options.page_size,
        buckets=options.batch_shapes(),
        num_pages=options.num_pages,
        eos_token_ids=loaded.eos_token_ids,
        bos_token_id=loaded.bos_token_id,
        tokenizer=loaded.tokenizer,
        fingerprint=loaded.fingerprint,
        dump=dump,
        force=force,
        progress=progress,
    )


def passages(loaded: LoadedModel, options: CompileOptions) -> list[list[int]]:
    """The project's own text as token ids, a few hundred of each of its passages; none without a tokenizer."""
    if loaded.tokenizer is None:
        return []
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(loaded.tokenizer.tokenizer)
    texts = (Path(__file__).parent / "data" / "passages.txt").read_text().split("\n\n")
    longest = min(_PASSAGE_TOKENS, options.model_len(loaded))
    return [tokenizer.encode(text, add_special_tokens=False).ids[:longest] for text in texts]


def build_executables(artifact: Path, kv_cache_bytes: int | None = None) -> list[ExecutableRecord]:
    """Starts the engine once, with a progress bar, which compiles and stores every program that serving needs.

    They are for a KV cache of that size (default: what the artifact asks for).
    """
    from distaff.runtime.config import EngineConfig
    from distaff.runtime.engine import Engine
    from distaff.runtime.model_runner import ModelRunner

    records: list[ExecutableRecord] = []

    def make_runner(*arguments: Any, **options: Any) -> ModelRunner:
        runner = ModelRunner(*arguments, **options)
        runner.executables.records = records
        return runner

    Engine(artifact, EngineConfig(progress=True, kv_cache_bytes=kv_cache_bytes), make_runner=make_runner).shutdown()
    return records


def artifact_for(model: str, *, progress: Progress | None = None, **options: Any) -> Path:
    """The artifact folder of ``model``: itself if it is one, else compiled once and kept in `cache_folder`.

    ``options`` are the fields of `CompileOptions`. A process that wants what another is compiling waits for it. Raises
    the errors of the loader and of the compiler.
    """
    if (Path(model) / MANIFEST).is_file():
        return Path(model)
    wanted = CompileOptions(**options)
    artifact = cache_folder() / "artifacts" / f"{_file_name(model)}-{_key(model, wanted)}"
    if not (artifact / MANIFEST).is_file():
        artifact.parent.mkdir(parents=True, exist_ok=True)
        with _locked(artifact.with_name(f"{artifact.name}.lock")):
            if not (artifact / MANIFEST).is_file():  # unless another process made it while this one waited
                compile_loaded(load(model, wanted), artifact, wanted, progress=progress)
    return artifact


def cache_folder() -> Path:
    """``$DISTAFF_CACHE``, or ``~/.cache/distaff``."""
    return Path(os.environ.get("DISTAFF_CACHE") or "~/.cache/distaff").expanduser()


def _file_name(model: str) -> str:
    """The last part of a path or repository name, as a file name."""
    return re.sub(r"[^\w.-]+", "-", Path(model).name) or "model"


def _key(model: str, options: CompileOptions) -> str:
    """Changes with the checkpoint, the options, the versions, the native kernels, and distaff's own source."""
    from distaff.kernels import native

    path = Path(model)
    files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    stats = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    identity = str(path.resolve()) if files else model
    versions = [importlib.metadata.version(package) for package in ("distaff", "jax")]
    parts = [identity, stats, dataclasses.asdict(options), versions, native.features(), _source_hash()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _source_hash() -> str:
    digest = hashlib.sha256()
    for package in (distaff.compiler, distaff.frontend, distaff.kernels):
        for file in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Holds ``file`` against other processes; the system lets go of it even if this one is killed."""
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("another process is compiling this model; waiting for it (%s)", file)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
