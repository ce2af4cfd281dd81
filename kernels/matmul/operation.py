"""The operations that weight matrices are compiled to: check a call and hand it to what serves it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

from distaff.kernels.matmul.formats import LANES, WeightFormat, usual_formats
from distaff.kernels.matmul.packing import packed_shapes
from distaff.kernels.matmul.pieces import Operand
from distaff.kernels.registry import Attributes, choose, usual_calls

# By name, in the order of the C++ enumeration (which begins with none).
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
}
MOST_PARTS = 8
INT8_MOST_ROWS = 65536  # of a matrix without groups, so that integer sums fit 32 bits


@dataclasses.dataclass(frozen=True)
class MatmulSpec:
    """What is static about a `matmul`; see there. The names of optional arrays say whether they are given."""

    format: WeightFormat
    rows: int
    columns: int
    norm_eps: float | None = None
    bias: bool = False
    activation: str | None = None
    gated: bool = False
    residual: bool = False
    live: bool = False
    parts: tuple[int, ...] = ()
    activations: str = "int8"

    @property
    def out_columns(self) -> int:
        """Columns of the result."""
        return self.columns // 2 if self.gated else self.columns


def matmul(
    x: jax.Array,
    packed_arrays: Sequence[Operand],
    *,
    format: WeightFormat,
    rows: int,
    columns: int,
    norm_weight: Operand | None = None,
    norm_eps: float | None = None,
    bias: Operand | None = None,
    activation: str | None = None,
    gated: bool = False,
    residual: jax.Array | None = None,
    live: jax.Array | None = None,
    parts: Sequence[int] = (),
    activations: str = "int8",
    platform: str | None = None,
) -> list[jax.Array]:
    """``x[M, rows]`` (float32 or bfloat16) times a packed ``W[rows, columns]``: a list of float32 ``[M, columns]``.

    Before: with ``norm_weight[rows]``, x becomes ``x * rsqrt(mean(x^2) + norm_eps) * norm_weight`` in float32. After,
    in this order: ``+ bias[columns]``, ``activation`` (silu, gelu_tanh, gelu, relu), and ``+ residual[M, columns]``.
    With ``gated`` the packed columns (and the bias) are those of `interleave_gated`, ``columns`` is twice the width F
    of the result, and that is ``activation(gate) * up`` (+ ``residual[M, F]``).

    A bfloat16 weight takes x rounded to bfloat16 and adds products in float32. For an int8 or int4 weight x is rounded
    to int8 as the format says (`PanelFormat`); products are added as integers in a group and in float32 across groups.
    With ``activations="float32"`` x is kept, and the weights are made float32.
    (The reference always keeps x and weights in float32.)

    If W is several matrices side by side, each padded to whole panels of 16 columns, ``parts`` are their widths without
    padding, and the list has a result for each.

    The weight's arrays, norm weight and bias may be a `Piece` of a buffer each.

    Rows from ``live`` (int32 []) on are padding: an implementation need not compute them, and what they come out as
    means nothing.

    ``platform`` is where the program will run (default: where jax runs now). Raises `ValueError` for what does not fit
    together and `NoImplementationError`.
    """
    if (norm_weight is None) != (norm_eps is None):
        raise ValueError("norm_weight and norm_eps go together")
    spec = MatmulSpec(
        format,
        rows,
        columns,
        norm_eps,
        bias=bias is not None,
        activation=activation,
        gated=gated,
        residual=residual is not None,
        live=live is not None,
        parts=tuple(parts),
        activations=activations,
    )
    _check(spec, x, packed_arrays, norm_weight, bias, residual, live)
    implementation = choose("matmul", platform or jax.default_backend(), call_attributes(spec, str(x.dtype)))
    arrays = tuple(packed_arrays)
    return cast(list[jax.Array], implementation.function(spec, x, arrays, norm_weight, bias, residual, live))


def embed_rows(
    packed_arrays: Sequence[Operand],
    tokens: jax.Array,
    *,
    format: WeightFormat,
    rows: int,
    columns: int,
    platform: str | None = None,
) -> jax.Array:
    """Columns ``tokens[T]`` (int32) of a packed ``W[rows, columns]``: float32 ``[T, rows]``.

    So an embedding ``[columns, rows]`` that is tied to a model's head shares its packed array. Tokens outside the
    matrix read the nearest column. Raises `ValueError` and `NoImplementationError`.
    """
    spec = MatmulSpec(format, rows, columns)
    _check_weight(spec, packed_arrays)
    if tokens.ndim != 1 or tokens.dtype != jnp.int32:
        raise ValueError(f"tokens must be int32 [T], not {tokens.dtype}{list(tokens.shape)}")
    implementation = choose("matmul.embed_rows", platform or jax.default_backend(), call_attributes(spec, "float32"))
    return cast(jax.Array, implementation.function(spec, tuple(packed_arrays), tokens))


def call_attributes(spec: MatmulSpec, dtype: str) -> dict[str, Any]:
    """What implementations of ``matmul`` and ``matmul.embed_rows`` are chosen by; ``dtype`` is that of x."""
    return {"spec": spec, "format": spec.format.name, "rows": spec.rows, "columns": spec.columns, "dtype": dtype}


@usual_calls("matmul")
@usual_calls("matmul.embed_rows")
def _calls() -> dict[str, Attributes]:
    return {str(format): call_attributes(MatmulSpec(format, 1024, 1024), "float32") for format in usual_formats()}


def bias_size(spec: MatmulSpec) -> int:
    """Elements of the bias: the columns, and with ``gated`` those of whole panels."""
    return -(-spec.out_columns // LANES) * LANES * 2 if spec.gated else spec.columns


def _check(
    spec: MatmulSpec,
    x: jax.Array,
    packed_arrays: Sequence[Operand],
    norm_weight: Operand | None,
    bias: Operand | None,
    residual: jax.Array | None,
    live: jax.Array | None,
) -> None:
    _check_weight(spec, packed_arrays)
    if x.ndim != 2 or x.shape[1] != spec.rows or x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"x must be float32 or bfloat16 [M, {spec.rows}], not {x.dtype}{list(x.shape)}")
    if spec.activation is not None and spec.activation not in ACTIVATIONS:
        raise ValueError(f"no activation {spec.activation!r}; there are {', '.join(ACTIVATIONS)}")
    if spec.activations not in ("int8", "float32"):
        raise ValueError(f"activations are int8 or float32, not {spec.activations!r}")
    expected: Mapping[str, tuple[Operand | None, tuple[int, ...]]] = {
        "norm_weight": (norm_weight, (spec.rows,)),
        "bias": (bias, (bias_size(spec),)),
        "residual": (residual, (x.shape[0], spec.out_columns)),
    }
    for name, (array, shape) in expected.items():
        if array is not None and (array.shape != shape or array.dtype != jnp.float32):
            raise ValueError(f"{name} must be float32{list(shape)}, not {array.dtype}{list(array.shape)}")
    padded = sum(-(-width // LANES) * LANES for width in spec.parts)
    if spec.parts and (padded != spec.columns or spec.gated or spec.residual or len(spec.parts) > MOST_PARTS):
        raise ValueError(f"parts {spec.parts} must fill {spec.columns} columns, at most {MOST_PARTS}, without residual")
    if live is not None and (live.shape != () or live.dtype != jnp.int32):
        raise ValueError(f"live must be int32[], not {live.dtype}{list(live.shape)}")


def _check_weight(spec: MatmulSpec, packed_arrays: Sequence[Operand]) -> None:
    if spec.gated and spec.columns % 2:
        raise ValueError(f"{spec.columns} gated columns: they must be even")
    given = [(tuple(array.shape), str(array.dtype)) for array in packed_arrays]
    expected = packed_shapes(spec.format, spec.rows, spec.columns, gated=spec.gated)
    if given != expected:
        raise ValueError(f"W[{spec.rows}, {spec.columns}] packed as {spec.format} is {expected}, not {given}")
