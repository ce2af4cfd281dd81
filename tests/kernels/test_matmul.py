"""Matmul with packed weights against numpy in float64, within bounds that follow from the dtypes; every CPU level."""

import dataclasses
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distaff.kernels import native
from distaff.kernels.matmul import (
    MatmulSpec,
    PanelFormat,
    Piece,
    WeightFormat,
    call_attributes,
    embed_rows,
    interleave_gated,
    matmul,
    pack,
    unpack,
)
from distaff.kernels.registry import explain

FORMATS = "f32 bf16 int8x32 int8-channel int8g32 int8g64o int8g128 int4g32 int4g64 int4g128o q4_1".split()
ACTIVATIONS = {
    None: lambda x: x,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
    "gelu": np.vectorize(lambda x: x * 0.5 * math.erfc(-x / math.sqrt(2)), otypes=[np.float64]),
    "relu": lambda x: np.maximum(x, 0),
}
STEEPEST = 1.13  # slope of any of these
NATIVE = pytest.mark.skipif(not native.available(), reason="the native module was not built")
LEVELS = native.features()


@dataclasses.dataclass
class Call:
    """A random call of `matmul`, its exact result and how far a right one may be from it."""

    format: str
    tokens: int
    rows: int
    columns: int  # of the result
    seed: int = 0
    norm: bool = False
    bias: bool = False
    activation: str | None = None
    gated: bool = False
    residual: bool = False
    activations: str = "int8"
    dtype: str = "float32"

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)

        def normal(*shape):
            return rng.normal(size=shape).astype(np.float32)

        self.weight_format = WeightFormat.parse(self.format)
        packed_columns = self.columns
        weight = normal(self.rows, self.columns)
        if self.gated:
            weight = interleave_gated(weight, normal(self.rows, self.columns))
            packed_columns = weight.shape[1]
        self.packed = pack(weight, self.weight_format)
        sizes = np.exp(normal(self.tokens, -(-self.rows // 32)))  # of the groups of a row
        x = normal(self.tokens, self.rows) * np.repeat(sizes, 32, 1)[:, : self.rows]
        self.x = jnp.asarray(x, self.dtype)
        self.arrays = {
            "norm_weight": normal(self.rows) if self.norm else None,
            "bias": normal(packed_columns) if self.bias else None,
            "residual": normal(self.tokens, self.columns) if self.residual else None,
        }

    def run(self, **options):
        """What `matmul` makes of it."""
        return np.asarray(
            matmul(
                self.x,
                self.packed.arrays,
                format=self.weight_format,
                rows=self.rows,
                columns=self.columns * (2 if self.gated else 1),
                norm_eps=1e-5 if self.norm else None,
                activation=self.activation,
                gated=self.gated,
                activations=self.activations,
                **self.arrays,
                **options,
            )[0]
        )

    def exact(self):
        """The result in float64, and the largest error of each number."""
        x, weight = np.asarray(self.x, np.float64), unpack(self.packed).astype(np.float64)
        if self.norm:
            x = x / np.sqrt(np.square(x).mean(1, keepdims=True) + 1e-5) * self.arrays["norm_weight"]
        y, error = x @ weight, self.input_error(x) @ np.abs(weight)
        # Sums in float32, in any order, and what is computed of x and w before.
        error += 2**-23 * (self.rows / 4 + 8) * (np.abs(x) @ np.abs(weight))
        if self.bias:
            y = y + self.arrays["bias"]
            error += 2**-23 * np.abs(y)
        if self.gated:
            (y, up), (error, up_error) = (
                np.moveaxis(a.reshape(len(a), -1, 2, 16), 2, 0).reshape(2, len(a), -1)[:, :, : self.columns]
                for a in (y, error)
            )
        y, error = ACTIVATIONS[self.activation](y), STEEPEST * error + 1e-6 * (np.abs(y) + 1)
        if self.gated:
            y, error = y * up, np.abs(y) * up_error + error * np.abs(up) + error * up_error
        if self.residual:
            y = y + self.arrays["residual"]
        return y, error + 2**-22 * np.abs(y) + 1e-6

    def input_error(self, x):
        """How far the x that is multiplied may be from x."""
        format = self.weight_format
        if format.kind == "bfloat16":
            return np.abs(x) * 2**-8 * 1.001
        if format.kind == "float32" or self.activations == "float32":
            return np.zeros_like(x)
        group = format.group or format.x_group or self.rows
        groups = np.pad(np.abs(x), ((0, 0), (0, -self.rows % group))).reshape(len(x), -1, group)
        half_steps = groups.max(2) / 254
        if format.x_group:  # the row's, divided by a power of two
            row = np.maximum(half_steps.max(1, keepdims=True), 1e-30)
            half_steps = row / 2 ** np.floor(np.log2(row / np.maximum(half_steps, row / 2**20)) + 1e-6)
        return np.repeat(half_steps * 1.001, group, 1)[:, : self.rows]


def check(call, **options):
    result, (exact, error) = call.run(**options), call.exact()
    assert result.dtype == np.float32 and result.shape == exact.shape
    assert (np.abs(result - exact) <= error).all(), np.max(np.abs(result - exact) / error)


calls = st.builds(
    Call,
    format=st.sampled_from(FORMATS),
    tokens=st.one_of(st.integers(1, 14), st.just(131)),
    rows=st.integers(1, 300),
    columns=st.integers(1, 100),
    seed=st.integers(0, 2**32 - 1),
    norm=st.booleans(),
    bias=st.booleans(),
    activation=st.sampled_from(list(ACTIVATIONS)),
    gated=st.booleans(),
    residual=st.booleans(),
    activations=st.sampled_from(["int8", "float32"]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)


@NATIVE
@settings(max_examples=150, deadline=None)
@given(calls)
@example(Call("int8-channel", 1, 2000, 70, norm=True))
@example(Call("int8x32", 7, 3000, 70, gated=True, activation="silu"))
@example(Call("bf16", 5, 1600, 200, norm=True, gated=True, activation="silu"))
@example(Call("int4g32", 7, 1600, 200, residual=True))
def test_native_is_right(call):
    check(call)


@settings(max_examples=12, deadline=None)
@given(calls)
def test_reference_is_right(call):
    call.activations = "float32"
    check(call, platform="tpu")


@NATIVE
@pytest.mark.parametrize("level", LEVELS)
def test_every_processor_level_is_right(level):
    """Runs this file's `check_level` where the level can be chosen: in a new process."""
    environment = {**os.environ, "DISTAFF_CPU_LEVEL": level}
    subprocess.run([sys.executable, __file__, level], env=environment, check=True, timeout=250)


def check_level(level):
    assert native.features()[-1] == level
    for number, format in enumerate(FORMATS):
        for tokens in (1, 2, 3, 11):
            options = {"norm": tokens == 2, "gated": tokens == 3, "bias": tokens > 3, "residual": tokens == 1}
            activation = list(ACTIVATIONS)[(number + tokens) % 5]
            check(Call(format, tokens, 200, 90, number, activation=activation, **options))
            if format.startswith("int"):
                check(Call(format, tokens, 200, 90, number, activations="float32", dtype="bfloat16"))
        check_embedding(Call(format, 1, 77, 90))


def check_embedding(call, **options):
    tokens = np.random.default_rng(call.seed).integers(0, call.columns, 19, dtype=np.int32)
    shape = {"format": call.weight_format, "rows": call.rows, "columns": call.columns}
    found = embed_rows(call.packed.arrays, jnp.asarray(tokens), **shape, **options)
    assert np.array_equal(np.asarray(found), unpack(call.packed)[:, tokens].T)


@pytest.mark.parametrize("platform", [pytest.param("cpu", marks=NATIVE), "tpu"])
@pytest.mark.parametrize("format", FORMATS)
def test_embedding_reads_columns_exactly(format, platform):
    check_embedding(Call(format, 1, 130, 50), platform=platform)


@pytest.mark.parametrize("platform", [pytest.param("cpu", marks=NATIVE), "tpu"])
def test_tokens_outside_the_matrix_read_the_nearest_column(platform):
    call = Call("int8-channel", 1, 40, 20)
    shape = {"format": call.weight_format, "rows": 40, "columns": 20, "platform": platform}
    found = embed_rows(call.packed.arrays, jnp.array([-5, 20, 10**6], jnp.int32), **shape)
    assert np.array_equal(np.asarray(found), unpack(call.packed)[:, [0, 19, 19]].T)


@pytest.mark.parametrize("platform", [pytest.param("cpu", marks=NATIVE), "tpu"])
@pytest.mark.parametrize("tokens", [1, 7, 150])
def test_matrices_side_by_side_have_results_of_their_own(platform, tokens):
    rng = np.random.default_rng(tokens)
    widths, padded = (40, 16, 200, 3), (48, 16, 208, 16)
    parts = [rng.normal(size=(50, width)).astype(np.float32) for width in widths]
    joined = np.concatenate([np.pad(p, ((0, 0), (0, n - p.shape[1]))) for p, n in zip(parts, padded, strict=True)], 1)
    bias = rng.normal(size=sum(padded)).astype(np.float32)
    x = rng.normal(size=(tokens, 50)).astype(np.float32)
    shape = {"format": PanelFormat("float32"), "rows": 50, "columns": sum(padded), "parts": widths}
    found = matmul(jnp.asarray(x), pack(joined, shape["format"]).arrays, bias=bias, platform=platform, **shape)
    starts = np.cumsum([0, *padded])
    for result, part, start in zip(found, parts, starts, strict=False):
        np.testing.assert_allclose(result, x @ part + bias[start : start + part.shape[1]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("platform", [pytest.param("cpu", marks=NATIVE), "tpu"])
@pytest.mark.parametrize("weight_format", ["f32", "bf16", "int8-channel", "q4_1"])
def test_operands_may_be_pieces_of_a_buffer(platform, weight_format):
    call = Call(weight_format, 5, 40, 20, norm=True, bias=True)
    wanted = call.run(platform=platform)
    packed = call.packed
    arrays = [*packed.arrays, call.arrays["norm_weight"], call.arrays["bias"]]
    offsets = np.cumsum([64, *(-(-a.nbytes // 64) * 64 for a in arrays)])
    buffer = np.full(offsets[-1], 77, np.uint8)
    for array, offset in zip(arrays, offsets, strict=False):
        buffer[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    pieces = [
        Piece(jnp.asarray(buffer), int(offset), array.shape, array.dtype)
        for array, offset in zip(arrays, offsets, strict=False)
    ]
    *weight, call.arrays["norm_weight"], call.arrays["bias"] = pieces
    call.packed = packed._replace(arrays=tuple(weight))
    np.testing.assert_array_equal(call.run(platform=platform), wanted)
    shape = {"format": call.weight_format, "rows": 40, "columns": 20, "platform": platform}
    tokens = jnp.array([3, 19, 0], jnp.int32)
    np.testing.assert_array_equal(embed_rows(weight, tokens, **shape), embed_rows(packed.arrays, tokens, **shape))


@NATIVE
@pytest.mark.parametrize("place", [-2, 32, 64, 1 << 62])
def test_a_piece_lies_within_its_buffer_and_is_aligned(place):
    call = Call("bf16", 2, 40, 20)
    values = call.packed.arrays[0]
    size = values.nbytes + (32 if place == 32 else 0)
    piece = Piece(jnp.zeros(size, jnp.uint8), place, values.shape, values.dtype)
    call.packed = call.packed._replace(arrays=(piece,))
    with pytest.raises(jax.errors.JaxRuntimeError, match="values of the weight must be"):
        call.run()


@NATIVE
@pytest.mark.parametrize("live", [0, 1, 13, 40, 99])
def test_rows_before_padding_are_those_of_a_call_without(live):
    call = Call("bf16", 40, 64, 48, residual=True)
    found = call.run(live=jnp.int32(live))
    np.testing.assert_array_equal(found[:live], call.run()[:live])


@NATIVE
def test_no_tokens():
    assert Call("bf16", 0, 40, 20, norm=True).run().shape == (0, 20)


@pytest.mark.parametrize("platform", [pytest.param("cpu", marks=NATIVE), "tpu"])
def test_under_jit_with_traced_weights_and_exported(platform):
    call = Call("int4g32", 3, 70, 40, norm=True, gated=True, activation="silu")

    def step(x, arrays, norm_weight):
        return matmul(
            x,
            arrays,
            format=call.weight_format,
            rows=70,
            columns=80,
            norm_weight=norm_weight,
            norm_eps=1e-5,
            activation="silu",
            gated=True,
            platform=platform,
        )[0]

    arrays = tuple(map(jnp.asarray, call.packed.arrays))
    arguments = call.x, arrays, jnp.asarray(call.arrays["norm_weight"])
    (tokens,) = jax.export.symbolic_shape("tokens")
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
    shapes = (jax.ShapeDtypeStruct((tokens, 70), jnp.float32), *shapes[1:])
    checks = [jax.export.DisabledSafetyCheck.custom_call("distaff_matmul")]
    exported = jax.export.export(jax.jit(step), disabled_checks=checks)(*shapes)
    again = jax.export.deserialize(exported.serialize())
    exact, error = call.exact()
    for result in (jax.jit(step)(*arguments), again.call(*arguments)):
        assert (np.abs(np.asarray(result) - exact) <= error).all()


def test_choice_is_explained():
    spec = MatmulSpec(PanelFormat("int8"), 70000, 16)
    rows = explain("matmul", "cpu", call_attributes(spec, "float32"))
    assert [row.implementation.name for row in rows] == ["native", "reference"]
    if native.available():
        assert rows[0].reason == "takes at most 65536 rows of an int8 weight without groups"
    assert explain("matmul", "tpu", call_attributes(spec, "float32"))[0].reason == "is for cpu, not tpu"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 41}, r"W\[41, 20\] packed as bf16 is"),
        ({"norm_eps": 1e-5}, "norm_weight and norm_eps go together"),
        ({"activation": "tanh"}, "no activation 'tanh'; there are silu"),
        ({"bias": jnp.zeros(19)}, r"bias must be float32\[20\], not float32\[19\]"),
        ({"residual": jnp.zeros((3, 20))}, r"residual must be float32\[2, 20\]"),
        ({"activations": "int4"}, "activations are int8 or float32"),
        ({"gated": True, "columns": 21}, "21 gated columns: they must be even"),
        ({"parts": (20, 3)}, r"parts \(20, 3\) must fill 20 columns"),
        ({"live": jnp.zeros(1, jnp.int32)}, r"live must be int32\[\], not int32\[1\]"),
    ],
)
def test_calls_that_do_not_fit(change, message):
    call = Call("bf16", 2, 40, 20)
    options = {"format": call.weight_format, "rows": 40, "columns": 20, **change}
    with pytest.raises(ValueError, match=message):
        matmul(call.x, call.packed.arrays, **options)


@NATIVE
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": np.int64(41)}, r"x must be \[M, 41\]"),
        ({"kind": np.int32(9)}, "unknown kind of weight"),
        ({"kind": np.int32(3)}, "such groups or offsets are not supported"),
        ({"x_group": np.int64(32)}, "such groups of x are not supported"),
        ({"columns": np.int64(40)}, "values of the weight must be 3840 bytes"),
        ({"operands": np.int32(2)}, "bias must be 20 float32"),
        ({"activation": np.int32(7)}, "unknown activation"),
    ],
)
def test_the_target_itself_refuses_what_would_read_elsewhere(change, message):
    native.register()
    call = Call("bf16", 2, 40, 20)
    attributes = {
        "rows": np.int64(40), "columns": np.int64(20), "kind": np.int32(1), "group": np.int32(0), "offsets": False,
        "operands": np.int32(0), "epsilon": np.float32(0), "activation": np.int32(0), "gated": False,
        "int8_activations": True, "x_group": np.int64(0), "places": np.full(1, -1),
    }  # fmt: skip
    target = jax.ffi.ffi_call("distaff_matmul", jax.ShapeDtypeStruct((2, 20), np.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(target(call.x, *call.packed.arrays, **{**attributes, **change}))


if __name__ == "__main__":
    check_level(sys.argv[1])
