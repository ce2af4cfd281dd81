"""The ragged batch that every serving step takes besides weights and pages."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class StepBatch(NamedTuple):
    """One step's requests on one ragged token axis; see ``docs/architecture.md`` for the meaning of each field.

    T tokens, R request rows, S sampled rows, NP pages per request; all int32. Decode rows stand first.
    """

    tokens: jax.Array  # [T]
    positions: jax.Array  # [T]
    slots: jax.Array  # [T]; 0 (the null page) for padding
    rows: jax.Array  # [T]
    starts: jax.Array  # [R + 1]
    contexts: jax.Array  # [R]
    tables: jax.Array  # [R, NP]
    decodes: jax.Array  # []
    samples: jax.Array  # [S]


def batch_shapes(tokens: int, requests: int, samples: int, pages_per_request: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shapes and dtypes of a batch for one bucket, in the order of `StepBatch`'s fields."""
    shapes: dict[str, tuple[int, ...]] = {
        "tokens": (tokens,),
        "positions": (tokens,),
        "slots": (tokens,),
        "rows": (tokens,),
        "starts": (requests + 1,),
        "contexts": (requests,),
        "tables": (requests, pages_per_request),
        "decodes": (),
        "samples": (samples,),
    }
    return tuple(jax.ShapeDtypeStruct(shapes[field], jnp.int32) for field in StepBatch._fields)
