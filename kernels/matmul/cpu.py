"""Matmul on CPUs: the native kernels, behind `jax.ffi` (kernels/native/matmul.h)."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from distaff.kernels import native
from distaff.kernels.matmul.operation import ACTIVATIONS, INT8_MOST_ROWS, MatmulSpec
from distaff.kernels.matmul.panels import STEP_ROWS, PanelFormat
from distaff.kernels.matmul.pieces import Operand, with_places
from distaff.kernels.registry import Attributes, register

_TARGETS = {"matmul": "distaff_matmul", "matmul.embed_rows": "distaff_embed_rows"}
_NORM_WEIGHT, _BIAS, _RESIDUAL, _LIVE = 1, 2, 4, 8  # bits of the attribute `operands`


def _refuses(attributes: Attributes) -> str | None:
    if not native.available():
        return "is not built: this installation was made without a C++ compiler"
    spec: MatmulSpec = attributes["spec"]
    if not isinstance(spec.format, PanelFormat):
        return f"has no code for {spec.format}"
    if spec.format.kind == "int8" and not spec.format.group and spec.rows > INT8_MOST_ROWS:
        return f"takes at most {INT8_MOST_ROWS} rows of an int8 weight without groups"
    return None


@register("matmul", "native", platforms=("cpu",), priority=10, refuses=_refuses)
def matmul(
    spec: MatmulSpec,
    x: jax.Array,
    arrays: tuple[Operand, ...],
    norm_weight: Operand | None,
    bias: Operand | None,
    residual: jax.Array | None,
    live: jax.Array | None,
) -> list[jax.Array]:
    """`distaff.kernels.matmul.matmul`."""
    native.register()
    optional: dict[int, Operand | None] = {_NORM_WEIGHT: norm_weight, _BIAS: bias, _RESIDUAL: residual, _LIVE: live}
    given = {bit: array for bit, array in optional.items() if array is not None}
    widths = spec.parts or (spec.out_columns,)
    results = [jax.ShapeDtypeStruct((x.shape[0], width), np.float32) for width in widths]
    call = jax.ffi.ffi_call(_TARGETS["matmul"], results, vmap_method="sequential")
    operands, places = with_places([*arrays, *given.values()])
    found = call(
        x,
        *operands,
        **_weight_attributes(spec),
        operands=np.int32(sum(given)),
        epsilon=np.float32(spec.norm_eps or 0),
        activation=np.int32(0 if spec.activation is None else 1 + list(ACTIVATIONS).index(spec.activation)),
        gated=spec.gated,
        int8_activations=spec.activations == "int8",
        x_group=np.int64(_panel_format(spec).x_group),
        places=places,
    )
    return list(found)


@register("matmul.embed_rows", "native", platforms=("cpu",), priority=10, refuses=_refuses)
def embed_rows(spec: MatmulSpec, arrays: tuple[Operand, ...], tokens: jax.Array) -> jax.Array:
    """`distaff.kernels.matmul.embed_rows`."""
    native.register()
    shape = jax.ShapeDtypeStruct((tokens.shape[0], spec.rows), np.float32)
    call = jax.ffi.ffi_call(_TARGETS["matmul.embed_rows"], shape, vmap_method="sequential")
    operands, places = with_places(arrays)
    return call(tokens, *operands, **_weight_attributes(spec), places=places)


def _weight_attributes(spec: MatmulSpec) -> dict[str, Any]:
    format = _panel_format(spec)
    return {
        "rows": np.int64(spec.rows),
        "columns": np.int64(spec.columns),
        "kind": np.int32(list(STEP_ROWS).index(format.kind)),
        "group": np.int32(format.group),
        "offsets": format.offsets,
    }


def _panel_format(spec: MatmulSpec) -> PanelFormat:
    assert isinstance(spec.format, PanelFormat)
    return spec.format
