"""Packed weights: formats and their names, round trips, quantisation errors, GGUF blocks bit for bit."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff.kernels.matmul import (
    PanelFormat,
    UnquantisableError,
    WeightFormat,
    WeightFormatError,
    gguf_format,
    interleave_gated,
    pack,
    pack_parts,
    packed_shapes,
    split_gguf,
    unpack,
)

FLOATS = [PanelFormat("float32"), PanelFormat("bfloat16")]
GROUPED = [
    PanelFormat(kind, group, offsets)
    for kind in ("int8", "int4")
    for group in (32, 64, 128)
    for offsets in (False, True)
]
FORMATS = [*FLOATS, PanelFormat("int8"), PanelFormat("int8", x_group=32), *GROUPED]
sizes = st.integers(1, 150)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_names_read_back(format):
    assert WeightFormat.parse(format.name) == format
    assert WeightFormat.parse(str(format)) == format


def test_names_of_gguf_and_of_kinds():
    assert WeightFormat.parse("Q4_0") == PanelFormat("int4", 32)
    assert WeightFormat.parse("q4_1") == WeightFormat.parse("int4") == PanelFormat("int4", 32, offsets=True)
    assert WeightFormat.parse("q8_0") == WeightFormat.parse("int8") == PanelFormat("int8", 32)
    assert WeightFormat.parse("int8-channel") == PanelFormat("int8")
    assert WeightFormat.parse("int8x32") == PanelFormat("int8", x_group=32)
    assert WeightFormat.parse("bfloat16") == PanelFormat("bfloat16")


def test_bytes_per_weight_are_those_of_gguf():
    assert [WeightFormat.parse(n).bytes_per_weight * 8 for n in ("q4_0", "q4_1", "q8_0")] == [4.5, 5, 8.5]
    assert [WeightFormat.parse(n).bytes_per_weight for n in ("f32", "bf16", "int8-channel")] == [4, 2, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fp8",), "no weight of kind 'fp8'"),
        (("int4",), "int4 needs a group"),
        (("int8", 48), "int8 in groups of 48"),
        (("bfloat16", 32), "bfloat16 in groups of 32"),
        (("int8", 0, True), "offsets only with groups"),
        (("int8", 32, False, 32), "activations alone have groups of 32"),
        (("bfloat16", 0, False, 32), "activations alone have groups of 32"),
    ],
)
def test_formats_that_do_not_exist(arguments, message):
    with pytest.raises(WeightFormatError, match=message):
        PanelFormat(*arguments)


@pytest.mark.parametrize("name", ["", "int4g", "int4g32x", "q5_0", "g32"])
def test_names_of_no_format(name):
    with pytest.raises(WeightFormatError, match="no weight"):
        WeightFormat.parse(name)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FORMATS), sizes, sizes, st.booleans(), st.integers(0, 2**32 - 1))
def test_what_is_unpacked_is_what_was_packed(format, rows, columns, gated, seed):
    rng = np.random.default_rng(seed)
    weight = (rng.normal(size=(rows, columns)) * np.exp(rng.normal(size=(1, columns)))).astype(np.float32)
    if gated:
        weight = interleave_gated(weight, weight + 1)
    packed = pack(weight, format)
    shapes = [(a.shape, str(a.dtype)) for a in packed.arrays]
    assert shapes == packed_shapes(format, rows, 2 * columns if gated else columns, gated=gated)
    assert all(array.flags.c_contiguous for array in packed.arrays)
    error = np.abs(unpack(packed) - weight)
    if format.kind == "float32":
        assert not error.any()
    elif format.kind == "bfloat16":
        assert (error <= np.abs(weight) * 2**-8).all()
    else:
        assert (norms(error, format) <= norms(largest_error(weight, format), format) * 1.05 + 1e-6).all()


def norms(array, format):
    """Of every group of every column."""
    group = format.group or len(array)
    return np.sqrt(
        np.square(np.pad(array, ((0, -len(array) % group), (0, 0)))).reshape(-1, group, array.shape[1]).sum(1)
    )


def largest_error(weight, format):
    """Of any number in its group when it is rounded in the full range."""
    group = format.group or len(weight)
    blocks = np.pad(weight, ((0, -len(weight) % group), (0, 0)), mode="edge").reshape(-1, group, weight.shape[1])
    low, high = blocks.min(1), blocks.max(1)
    most = np.maximum(high, -low)
    if format.offsets:
        error = (high - low) / (508 if format.kind == "int8" else 30)
    else:
        error = most / (254 if format.kind == "int8" else 8)  # one of the largest may be a whole step of int4 away
    error += bool(format.group) * most * 2**-10  # float16 scales and offsets
    return np.repeat(error, group, 0)[: len(weight)]


@pytest.mark.parametrize("format", [f for f in GROUPED if f.kind == "int4"], ids=str)
def test_int4_is_better_than_rounding_by_the_largest_weight(format):
    weight = np.random.default_rng(0).normal(size=(256, 64)).astype(np.float32)
    blocks = weight.reshape(-1, format.group, 64)
    low, high = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
    if format.offsets:
        scale, offset, lowest, highest = (high - low) / 15, low, 0, 15
    else:
        scale, offset, lowest, highest = np.maximum(high, -low) / 7, 0, -8, 7
    plain = np.clip(np.rint((blocks - offset) / scale), lowest, highest) * scale + offset
    ours = unpack(pack(weight, format))
    assert np.square(ours - weight).mean() < 0.95 * np.square(plain.reshape(weight.shape) - weight).mean()


@pytest.mark.parametrize("format", [f for f in FORMATS if f.quantised], ids=str)
def test_zeros_and_constants_stay(format):
    weight = np.zeros((70, 20), np.float32)
    assert not unpack(pack(weight, format)).any()
    if format.offsets:
        assert (unpack(pack(weight + 0.5, format)) == 0.5).all()


@pytest.mark.parametrize("bad", [np.inf, np.nan, 1e9])
def test_weights_without_a_scale(bad):
    weight = np.ones((64, 16), np.float32)
    weight[3, 4] = bad
    with pytest.raises(UnquantisableError):
        pack(weight, PanelFormat("int4", 32))


def test_blocks_that_do_not_fit():
    integers, scales = np.zeros((64, 5), np.int8), np.ones((2, 5), np.float16)
    int4 = PanelFormat("int4", 32)
    with pytest.raises(ValueError, match="integers from -1 to -1 are not those of int4g32"):
        pack_parts((integers - 1, scales), int4)
    with pytest.raises(ValueError, match=r"scales of int4g32 must be float16\[2, 5\]"):
        pack_parts((integers, scales[:1]), int4)
    with pytest.raises(ValueError, match="q4_1 has offsets"):
        pack_parts((integers, scales), WeightFormat.parse("q4_1"))
    with pytest.raises(ValueError, match="int4g32 has no offsets"):
        pack_parts((integers, scales, scales), int4)
    with pytest.raises(ValueError, match=r"must be \[K, N\] and not empty"):
        pack(np.zeros((0, 3), np.float32), int4)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["Q8_0", "Q4_0", "Q4_1"]), st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_gguf_blocks_are_kept_bit_for_bit(type_name, columns, blocks, seed):
    weight = np.random.default_rng(seed).normal(size=(columns, 32 * blocks)).astype(np.float32)
    kind = GGMLQuantizationType[type_name]
    data = quants.quantize(weight, kind)
    packed = pack_parts(split_gguf(data, type_name, columns), gguf_format(type_name))
    assert np.array_equal(unpack(packed), quants.dequantize(data, kind).T)


def test_bytes_that_are_no_gguf_blocks():
    with pytest.raises(ValueError, match=r"35 uint8 are not 1 rows of blocks of Q8_0 \(34 bytes each\)"):
        split_gguf(np.zeros(35, np.uint8), "Q8_0", 1)


def test_gated_columns_take_turns():
    gate, up = np.arange(20), 100 + np.arange(20)
    both = interleave_gated(gate, up)
    assert both[:40].tolist() == [*range(16), *range(100, 116), 16, 17, 18, 19, 0, 0, 0, 0]
    assert both[48:52].tolist() == [116, 117, 118, 119]
    with pytest.raises(ValueError, match="must have one shape"):
        interleave_gated(gate, up[1:])
