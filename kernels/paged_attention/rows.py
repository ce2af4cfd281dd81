"""What comes before attention where it is not part of a kernel: turning a step's rows and writing them to the pages."""

from __future__ import annotations

import jax

from distaff.kernels.paged_attention.batch import StepBatch
from distaff.kernels.paged_attention.pages import write_pages
from distaff.kernels.paged_attention.rotary import RotaryTables, rotate
from distaff.kernels.paged_attention.spec import AttentionSpec


def prepare_rows(
    spec: AttentionSpec,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    k_pages: jax.Array,
    v_pages: jax.Array | None,
    layer: int | jax.Array,
    batch: StepBatch,
    rotary: RotaryTables | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Queries, turned (then in float32), and the pools with the step's keys, turned, and values; see `paged_attention`.

    Without ``v_pages`` keys are values.
    """
    if spec.rotary is not None and rotary is not None:
        q, k = (rotate(spec.rotary, *rotary, batch.positions, rows) for rows in (q, k))
    k_pages = write_pages(k_pages, layer, batch.slots, k)
    if v is not None and v_pages is not None:
        v_pages = write_pages(v_pages, layer, batch.slots, v)
    return q, k_pages, v_pages
