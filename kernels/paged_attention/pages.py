"""Writing rows into a page pool and reading them back.

A pool is one buffer ``[L, P, page, *shape]``: L layers, P pages, ``page`` tokens a page. XLA updates a donated pool in
place only if it meets the update in a form that it understands, and then the cost is that of the rows. Two forms are
known to copy the whole pool on CPU, and this file keeps away from both:

* an update of one row, which XLA turns into a dynamic-update-slice that it then fuses with its neighbours and guards
  with copies (30 layers: 5 ms to 35 ms a write instead of 4 µs, and 750 MB of scratch). One row is written twice
  instead, which stays a scatter. Unrolled dynamic-update-slices do the same for any number of rows.
* a scatter into a bfloat16 pool, which is widened to float32 and back as a whole (thousands of times the cost of the
  rows). On CPU a pool of bfloat16 values is a ``uint16`` buffer of their bit patterns; only rows are ever converted.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

STEP_BYTES = 4


def pool_shape(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """The shape that a row of values of ``shape`` has in a pool of ``dtype``."""
    return (*shape[:-1], shape[-1] + STEP_BYTES) if dtype == "int8" else shape


def row_shape(pages: jax.Array | jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The shape of the values that a row of a pool stands for."""
    *shape, last = pages.shape[3:]
    return (*shape, last - STEP_BYTES) if pages.dtype == jnp.int8 else (*shape, last)


def write_pages(pages: jax.Array, layer: int | jax.Array, slots: jax.Array, values: jax.Array) -> jax.Array:
    """The pool with ``values[T, *row_shape(pages)]`` in rows ``slots[T]`` (page * page_size + offset) of ``layer``.

    In place if the pool is a donated input of the program (or a loop's carry) and ``values`` depend on the result of
    every earlier read of it, as the keys of a layer depend on the attention of the layer before; a read that XLA may
    put after the write costs a copy of the pool. Values are cast to the pool's dtype, for a uint16 pool to bfloat16
    bits, and quantised for an int8 pool. Slots outside the pool are not checked. What padding (slot 0) holds may be
    anything; zeros are written there.
    """
    values = jnp.where((slots == 0).reshape(-1, *[1] * (values.ndim - 1)), jnp.zeros((), values.dtype), values)
    layers, num_pages, page_size, *shape = pages.shape
    if slots.shape[0] == 1:
        slots, values = jnp.tile(slots, 2), jnp.concatenate([values, values])
    flat = pages.reshape(layers * num_pages * page_size, *shape)
    rows = to_pool(values, pages.dtype)
    index = (layer * num_pages * page_size + slots)[:, None]
    dimensions = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, rows.ndim)),
        inserted_window_dims=(0,),
        scatter_dims_to_operand_dims=(0,),
    )
    return lax.scatter(flat, index, rows, dimensions, mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS).reshape(pages.shape)


def read_context(pages: jax.Array, layer: int | jax.Array, tables_row: jax.Array) -> jax.Array:
    """The rows of one request in order of position: ``[NP * page, *row_shape(pages)]`` for its block table ``[NP]``.

    Rows past the request's context are whatever the pages hold. A uint16 pool reads as bfloat16, int8 as float32.
    """
    pool = gather_pages(pages, layer, tables_row)
    return pool.reshape(pool.shape[0] * pool.shape[1], *pool.shape[2:])


def gather_pages(pages: jax.Array, layer: int | jax.Array, numbers: jax.Array) -> jax.Array:
    """Pages by number: ``[*numbers.shape, page, *row_shape(pages)]``; dtypes are those of `read_context`."""
    layers, num_pages, *shape = pages.shape
    # A page as one flat row is what XLA:CPU gathers fastest.
    flat = pages.reshape(layers * num_pages, math.prod(shape))
    dimensions = lax.GatherDimensionNumbers(
        offset_dims=(numbers.ndim,), collapsed_slice_dims=(0,), start_index_map=(0,)
    )
    gathered = lax.gather(
        flat,
        (layer * num_pages + numbers)[..., None],
        dimensions,
        (1, flat.shape[1]),
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
    return from_pool(gathered.reshape(*numbers.shape, *shape))


def to_pool(values: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Values as a pool of ``dtype`` keeps them."""
    if dtype == jnp.uint16:
        return lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)
    if dtype == jnp.int8:
        step = jnp.max(jnp.abs(values.astype(jnp.float32)), axis=-1, keepdims=True) / 127
        steps = jnp.round(values / jnp.where(step > 0, step, 1)).astype(jnp.int8)
        return jnp.concatenate([steps, lax.bitcast_convert_type(step[..., 0], jnp.int8)], axis=-1)
    return values.astype(dtype)


def from_pool(rows: jax.Array) -> jax.Array:
    """Values as they were before `to_pool`, up to rounding."""
    if rows.dtype == jnp.uint16:
        return lax.bitcast_convert_type(rows, jnp.bfloat16)
    if rows.dtype == jnp.int8:
        step = lax.bitcast_convert_type(rows[..., -STEP_BYTES:], jnp.float32)
        return rows[..., :-STEP_BYTES] * step[..., None]
    return rows
