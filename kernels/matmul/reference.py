"""Matmul in plain jnp and float32, for every platform: what the other implementations are compared with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from distaff.kernels.matmul.formats import LANES
from distaff.kernels.matmul.operation import ACTIVATIONS, MatmulSpec
from distaff.kernels.matmul.pieces import Operand, as_array
from distaff.kernels.registry import register


@register("matmul", "reference", priority=-10)
def matmul(
    spec: MatmulSpec,
    x: jax.Array,
    arrays: tuple[Operand, ...],
    norm_weight: Operand | None,
    bias: Operand | None,
    residual: jax.Array | None,
    live: jax.Array | None,
) -> list[jax.Array]:
    """`distaff.kernels.matmul.matmul`; computes padding too."""
    x = x.astype(jnp.float32)
    if norm_weight is not None and spec.norm_eps is not None:
        x = x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + spec.norm_eps) * as_array(norm_weight)
    activate = (lambda y: y) if spec.activation is None else ACTIVATIONS[spec.activation]
    weight = spec.format.unpack(tuple(map(as_array, arrays)), spec.rows, jnp)
    weight = weight if spec.gated else weight[:, : spec.columns]
    product = x @ weight
    if bias is not None:
        product += as_array(bias)
    if spec.gated:
        gate, up = jnp.moveaxis(product.reshape(x.shape[0], -1, 2, LANES), 2, 0)
        product = (activate(gate) * up).reshape(x.shape[0], -1)[:, : spec.out_columns]
    else:
        product = activate(product)
    if spec.parts:
        starts = [sum(-(-width // LANES) * LANES for width in spec.parts[:i]) for i in range(len(spec.parts))]
        return [product[:, start : start + width] for start, width in zip(starts, spec.parts, strict=True)]
    return [product if residual is None else product + residual]


@register("matmul.embed_rows", "reference", priority=-10)
def embed_rows(spec: MatmulSpec, arrays: tuple[Operand, ...], tokens: jax.Array) -> jax.Array:
    """`distaff.kernels.matmul.embed_rows`."""
    tokens = jnp.clip(tokens, 0, spec.columns - 1)
    panels = tuple(as_array(array)[tokens // LANES] for array in arrays)  # of each token its own panel
    columns = spec.format.unpack(panels, spec.rows, jnp)
    columns = columns.reshape(spec.rows, -1, LANES)
    rows: jax.Array = jnp.take_along_axis(columns, (tokens % LANES)[None, :, None], 2)[..., 0].T
    return rows
