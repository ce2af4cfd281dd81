"""Weights that a GGUF file holds in blocks are served as they are: bit for bit, joined only with their like."""

import numpy as np
import pytest
from tiny_gguf import metadata, numpy_tensors, write_gguf

from distaff.compiler.passes import cleanup
from distaff.compiler.passes.pack import WeightFormats
from distaff.compiler.pipeline import derive_serve_step
from distaff.frontend.loading import load_model
from distaff.kernels import native
from distaff.kernels.matmul import PanelFormat, WeightFormat

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.smoke

FLOAT = PanelFormat("float32")
HIDDEN = 64


@pytest.fixture(autouse=True)
def exact_and_large(monkeypatch):
    """Activations stay in float32, as the reference keeps them, and the table of tokens counts as a large one."""
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(cleanup, "FOLD_LIMIT", 64)


def load(folder, type_of):
    """A llama of one layer whose matrices are in the types that ``type_of`` gives by their GGUF name."""

    def kind(name, value):
        return gguf.GGMLQuantizationType[type_of(name)] if value.ndim == 2 else None

    path = write_gguf(folder / "m.gguf", "llama", numpy_tensors(HIDDEN), metadata(HIDDEN), kind)
    return load_model(path, dtype="float32", progress=False), path


def derive(model, stored):
    return derive_serve_step(
        model.apply,
        model.params,
        max_model_len=32,
        page_size=4,
        weight_formats=WeightFormats(FLOAT, FLOAT),
        stored=stored,
    )


def rows(step):
    return {row["format"]: (row["matrices"], row["as_stored"]) for row in step.report["weights"]}


def numbers_of_file(path, name, kind):
    """Integers ``[inputs, outputs]`` and the half-precision numbers of each block, read by the format's description."""
    (tensor,) = [t for t in gguf.GGUFReader(path).tensors if t.name == name]
    halves = {"Q8_0": 1, "Q4_0": 1, "Q4_1": 2}[kind]
    integers, scales = [], []
    for row in np.asarray(tensor.data):
        for block in row.reshape(-1, 2 * halves + (32 if kind == "Q8_0" else 16)):
            scales.append(block[: 2 * halves].view(np.float16))
            rest = block[2 * halves :]
            integers += (
                rest.view(np.int8).tolist() if kind == "Q8_0" else [b & 15 for b in rest] + [b >> 4 for b in rest]
            )
    outputs, inputs = (int(n) for n in reversed(tensor.shape))
    return np.reshape(integers, (outputs, inputs)).T, np.reshape(scales, (outputs, inputs // 32, halves))


def number_in_panels(values, kind, k, n):
    """Row k, column n of packed values, as `distaff.kernels.matmul.packing` draws them."""
    if kind == "Q8_0":
        return int(values[n // 16, k // 4, n % 16, k % 4]) - 128
    byte = int(values[n // 16, k // 8, n % 16, k % 4])
    return byte >> 4 if k % 8 >= 4 else byte & 15


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_quants_and_scales_are_those_of_the_file(kind, tmp_path):
    model, path = load(tmp_path, lambda name: kind)
    step = derive(model, model.blocks)
    name = WeightFormat.parse(kind).name
    assert rows(step) == {name: (5, 5)}  # queries, keys and values are one, gate and up another
    packed = {key.partition(f".{name}.")[2]: array for key, array in step.weights.items() if "down" in key}
    integers, halves = numbers_of_file(path, "blk.0.ffn_down.weight", kind)
    for k in range(HIDDEN):
        for n in range(HIDDEN):
            assert number_in_panels(packed["values"], kind, k, n) == integers[k, n]
    for place, role in enumerate(["scales", "offsets"][: halves.shape[2]]):
        assert packed[role].dtype == np.float16
        in_rows = packed[role].transpose(0, 2, 1).reshape(HIDDEN, -1)
        np.testing.assert_array_equal(in_rows.view(np.uint16), halves[..., place].view(np.uint16))
    assert step.report["validation_of_packed_weights"]["relative_error"] < 1e-5


def test_only_what_is_stored_alike_is_joined(tmp_path):
    types = {"attn_v": "Q8_0", "ffn_up": "F16", "token_embd": "Q8_0"}
    model, _ = load(tmp_path, lambda name: next((t for part, t in types.items() if part in name), "Q4_0"))
    step = derive(model, model.blocks)
    # Queries and keys, output, gate, down; values, embedding; up.
    assert rows(step) == {"int4g32": (4, 4), "int8g32": (2, 2), "f32": (1, 0)}
    assert step.weight_format == "int4"


def test_types_without_a_format_are_dequantised(tmp_path):
    model, _ = load(tmp_path, lambda name: "Q5_0" if "attn" in name else "Q8_0")
    assert rows(derive(model, model.blocks)) == {"f32": (2, 0), "int8g32": (3, 3)}


def test_blocks_of_another_matrix_are_not_taken(tmp_path):
    model, _ = load(tmp_path, lambda name: "Q8_0")
    gate, up = "layers_0.mlp.gate.kernel", "layers_0.mlp.up.kernel"
    swapped = {**model.blocks, gate: model.blocks[up], up: model.blocks[gate]}
    step = derive(model, swapped)
    assert rows(step) == {"f32": (1, 0), "int8g32": (4, 4)}
    assert step.report["validation_of_packed_weights"]["relative_error"] < 1e-5
