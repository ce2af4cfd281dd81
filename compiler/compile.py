"""The compiler's front door: from ``fn(params, tokens)`` to an artifact on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from distaff.compiler.artifact import Manifest
from distaff.compiler.buckets import Bucket, default_buckets
from distaff.compiler.ir import StoredBlocks
from distaff.compiler.lowering.build import ModelInfo, Progress, SavableTokenizer, build_artifact, check_output
from distaff.compiler.passes.pack import WeightFormats
from distaff.compiler.pipeline import derive_serve_step

DEFAULT_MAX_BATCH = 64
DEFAULT_MAX_STEP_TOKENS = 512
DEFAULT_PAGE_SIZE = 16


def compile_model(
    fn: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    *,
    output: str | os.PathLike[str],
    max_model_len: int,
    name: str = "model",
    architecture: str = "",
    latent_cache: bool = False,
    weight_formats: WeightFormats | None = None,
    stored: Mapping[str, StoredBlocks] = MappingProxyType({}),
    kv_dtype: str | None = None,
    passages: Sequence[Sequence[int]] = (),
    page_size: int = DEFAULT_PAGE_SIZE,
    max_batch: int = DEFAULT_MAX_BATCH,
    max_step_tokens: int = DEFAULT_MAX_STEP_TOKENS,
    buckets: Sequence[Bucket] | None = None,
    num_pages: int | None = None,
    eos_token_ids: Sequence[int] = (),
    bos_token_id: int | None = None,
    tokenizer: SavableTokenizer | None = None,
    fingerprint: str = "",
    dump: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Derives the serving step of ``fn``, proves it right, and writes an artifact that the runtime serves.

    ``fn(params, tokens)`` is a plain forward pass: int32 tokens ``[1, S]`` in, logits ``[1, S, vocab]`` or of the last
    token out, with ``params`` any tree of arrays. Requests may be up to ``max_model_len`` tokens long, prompt and
    output together; a step holds up to ``max_batch`` requests and ``max_step_tokens`` tokens unless ``buckets`` says
    which shapes to compile. ``num_pages`` pages of ``page_size`` tokens make the KV pool that the artifact asks for.
    With ``latent_cache`` attention may cache what keys and values are computed from, where that is smaller.
    ``weight_formats`` are the number formats that weights are packed in for kernels (default: as ``params`` has them);
    those that a checkpoint holds quantised are packed as ``stored``, named by the path of their leaf in ``params`` with
    dots between the keys. ``kv_dtype`` is that of the KV cache (default: as the model computes); int8 keeps each head
    of a token in steps of its largest value / 127. What packing and int8 caches cost is measured on ``passages``, up to
    four texts of token ids. ``dump`` is a folder for the IR after each pass. The programs are compiled to machine code
    at the first start.

    Raises the errors of `distaff.compiler.errors` if the model cannot be served token by token, `BucketError` for
    limits that contradict each other, and `OutputExistsError` unless ``output`` is new or ``force`` is set.
    """
    chosen = default_buckets(max_batch, max_step_tokens) if buckets is None else buckets
    check_output(Path(output), force=force)
    if progress is not None:
        progress("deriving the serving step", 0, 1)
    step = derive_serve_step(
        fn,
        params,
        max_model_len=max_model_len,
        page_size=page_size,
        latent_cache=latent_cache,
        weight_formats=weight_formats,
        stored=stored,
        kv_dtype=kv_dtype,
        passages=passages,
        dump=dump,
    )
    model = ModelInfo(
        name=name,
        architecture=architecture,
        max_model_len=max_model_len,
        eos_token_ids=eos_token_ids,
        bos_token_id=bos_token_id,
        tokenizer=tokenizer,
        fingerprint=fingerprint,
    )
    return build_artifact(
        step,
        model,
        Path(output),
        buckets=chosen,
        page_size=page_size,
        num_pages=num_pages,
        force=force,
        progress=progress,
    )
