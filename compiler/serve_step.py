"""The derived serving step: what the passes hand to lowering, and all that lowering knows about a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from distaff.compiler.artifact import CacheSpec
from distaff.kernels.matmul.pieces import Operand
from distaff.kernels.paged_attention import StepBatch

StepFunction: TypeAlias = Callable[
    [Sequence[Operand], Sequence[jax.Array], StepBatch], tuple[jax.Array, list[jax.Array]]
]


@dataclasses.dataclass(frozen=True)
class ServeStep:
    """A model as a serving step over ragged tokens and paged caches (``docs/architecture.md`` has the contract).

    ``function(weights, pages, batch)`` returns float32 logits ``[S, vocab_size]`` and the new pages. It is traced anew
    for every bucket, so it holds for all T, R, S, NP and pool sizes. ``weights`` are flat and in input order;
    ``pages`` has one buffer ``[layers, num_pages, page_size, *shape]`` per entry of ``caches``. ``report`` is what the
    passes have to tell (JSON values); it ends up in the manifest. ``weight_format`` is the kind of number that packed
    weights are. ``of_products`` names the weights that the function takes as a `Piece` of a buffer too, because
    products alone read them.
    """

    weights: Mapping[str, jax.Array | np.ndarray[Any, Any]]
    caches: tuple[CacheSpec, ...]
    vocab_size: int
    function: StepFunction
    report: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weight_format: str | None = None
    of_products: frozenset[str] = frozenset()
