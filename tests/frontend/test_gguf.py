"""GGUF files: every family and quantisation, what the converter changes, and damaged or foreign files."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from tiny_checkpoints import make_reference, random_tokens, reference_logits, relative_error
from tiny_gguf import (
    ARCHITECTURES,
    converted,
    metadata,
    model_metadata,
    numpy_tensors,
    permute,
    reference_from_gguf,
    write_gguf,
)

from distaff.frontend.loading import CheckpointFormatError, MissingDependencyError, TensorMismatchError, load_model
from distaff.frontend.models import ConfigError, UnsupportedArchitectureError
from distaff.frontend.models.rope import LinearScaling, TabulatedScaling, YarnScaling

gguf = pytest.importorskip("gguf")
QUANTS = gguf.GGMLQuantizationType

VARIANTS = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", dict(tie_word_embeddings=True)),
    "llama-gqa": ("Llama", dict(num_key_value_heads=1, head_dim=12)),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "gemma2": ("Gemma2", dict(head_dim=16, sliding_window=6, query_pre_attn_scalar=16)),
}


def load(path, **options):
    return load_model(path, progress=False, **options)


def write_model(path, family="Llama", model=None, quantise=lambda name, value: None, **metadata):
    model = model or make_reference(family)
    architecture = ARCHITECTURES[family]
    fields = {k: v for k, v in (model_metadata(model.config, architecture) | metadata).items() if v is not None}
    return write_gguf(path, architecture, converted(model, family), fields, quantise)


@pytest.mark.parametrize("variant", VARIANTS)
def test_families(variant, tmp_path):
    pytest.importorskip("transformers")
    family, changes = VARIANTS[variant]
    reference = make_reference(family, seed=2, **changes)
    loaded, tokens = load(write_model(tmp_path / "m.gguf", family, reference)), random_tokens(2)
    error = relative_error(loaded.apply(loaded.params, tokens), reference_logits(reference, tokens))
    assert error < 1e-4


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma2"])
def test_transformers_reads_the_same_from_the_file(family, tmp_path):
    """Guards the writer of these tests: the file means to transformers what it means here."""
    pytest.importorskip("transformers")
    changes = dict(head_dim=16, sliding_window=6) if family == "Gemma2" else {}
    write_model(tmp_path / "m.gguf", family, make_reference(family, seed=3, **changes))
    theirs = reference_from_gguf(tmp_path / "m.gguf")
    if family == "Gemma2":  # query_pre_attn_scalar is not in the metadata; llama.cpp takes head_dim, transformers 256
        for layer in theirs.model.layers:
            layer.self_attn.scaling = 16**-0.5
    loaded, tokens = load(tmp_path / "m.gguf"), random_tokens(3)
    assert relative_error(loaded.apply(loaded.params, tokens), reference_logits(theirs, tokens)) < 1e-4


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantisations(kind, tmp_path):
    """All matrices in one type: parameters are what the blocks say, and near what was quantised."""
    tensors, quant = numpy_tensors(hidden=64), QUANTS[kind]
    path = write_gguf(
        tmp_path / "m.gguf", "llama", tensors, metadata(64), lambda name, value: quant if value.ndim == 2 else None
    )
    params = load(path).params
    stored = {
        k: gguf.quants.dequantize(gguf.quants.quantize(v, quant), quant) for k, v in tensors.items() if v.ndim > 1
    }
    layer = params["layers_0"]
    np.testing.assert_array_equal(params["embed"]["embedding"], stored["token_embd.weight"])
    np.testing.assert_array_equal(layer["mlp"]["down"]["kernel"], stored["blk.0.ffn_down.weight"].T)
    np.testing.assert_array_equal(
        layer["attention"]["value"]["kernel"], stored["blk.0.attn_v.weight"].T.reshape(64, 1, 32)
    )
    np.testing.assert_array_equal(layer["mlp_norm"]["scale"], tensors["blk.0.ffn_norm.weight"])
    found = np.asarray(params["embed"]["embedding"])
    bits = {"F16": 10, "BF16": 7, "Q8_0": 6}.get(kind, 2)
    assert np.abs(found - tensors["token_embd.weight"]).max() < 4 * 2.0**-bits


def k_quant_blocks(kind, rows, rng):
    """Random blocks of 256 numbers with small scales: any bytes are valid ones."""
    block_bytes = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}[kind]
    blocks = rng.integers(0, 256, (rows, block_bytes), dtype=np.uint8)
    scales = slice(208, 210) if kind == "Q6_K" else slice(0, 4)
    halves = rng.uniform(0.01, 0.1, (rows, (scales.stop - scales.start) // 2)).astype(np.float16)
    blocks[:, scales] = halves.view(np.uint8)
    return blocks


def dequantise_k(kind, block):
    """One block of 256 numbers, written from the format's description: two levels of scales."""
    if kind == "Q6_K":
        low, high, scales = block[:128], block[128:192], block[192:208].view(np.int8)
        scale = float(block[208:210].view(np.float16)[0])
        out = np.empty(256)
        for half in range(2):
            for i in range(128):
                quarter, j = divmod(i, 32)
                four = low[64 * half + 32 * (quarter % 2) + j] >> (4 * (quarter // 2)) & 15
                two = high[32 * half + j] >> (2 * quarter) & 3
                value = int(four | two << 4) - 32
                out[128 * half + i] = scale * scales[8 * half + i // 16] * value
        return out
    scale, least = (float(x) for x in block[:4].view(np.float16))
    packed = [int(x) for x in block[4:16]]
    rest = block[16:]
    high, low = (rest[:32], rest[32:]) if kind == "Q5_K" else (None, rest)
    out = np.empty(256)
    for group in range(8):
        if group < 4:
            factor, offset = packed[group] & 63, packed[group + 4] & 63
        else:
            factor = packed[group + 4] & 15 | packed[group - 4] >> 6 << 4
            offset = packed[group + 4] >> 4 | packed[group] >> 6 << 4
        for j in range(32):
            value = int(low[32 * (group // 2) + j] >> (4 * (group % 2)) & 15)
            if high is not None:
                value |= int(high[j] >> group & 1) << 4
            out[32 * group + j] = scale * factor * value - least * offset
    return out


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_k_quantisations(kind, tmp_path):
    rng = np.random.default_rng()
    tensors = numpy_tensors(hidden=256, vocab=6)
    blocks = k_quant_blocks(kind, 6, rng)
    del tensors["token_embd.weight"]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, value in metadata(256).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"llama.{name}", value)
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=QUANTS[kind])
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = load(tmp_path / "m.gguf").params["embed"]["embedding"]
    expected = np.stack([dequantise_k(kind, block) for block in blocks])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.smoke
def test_rotary_rows_are_put_back(tmp_path):
    """Rows of queries and keys go from pairs side by side back to halves; values stay."""
    tensors = numpy_tensors()
    stored = dict(tensors)
    stored["blk.0.attn_q.weight"] = permute(tensors["blk.0.attn_q.weight"], 2)
    stored["blk.0.attn_k.weight"] = permute(tensors["blk.0.attn_k.weight"], 1)
    attention = load(write_gguf(tmp_path / "m.gguf", "llama", stored, metadata())).params["layers_0"]["attention"]
    for name, part, heads in (("query", "q", 2), ("key", "k", 1), ("value", "v", 1)):
        np.testing.assert_array_equal(
            attention[name]["kernel"], tensors[f"blk.0.attn_{part}.weight"].T.reshape(8, heads, 4)
        )
    assert permute(np.arange(4), 1).tolist() == [0, 2, 1, 3]


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_blocks_are_given_as_stored_in_the_order_of_the_parameters(kind, tmp_path):
    def type_of(name, value):
        return QUANTS[kind] if value.ndim == 2 and "ffn_up" not in name else None

    loaded = load(write_gguf(tmp_path / "m.gguf", "llama", numpy_tensors(64), metadata(64), type_of))
    attention = {f"layers_0.attention.{part}.kernel" for part in ("query", "key", "value", "output")}
    assert set(loaded.blocks) == attention | {"layers_0.mlp.gate.kernel", "layers_0.mlp.down.kernel", "embed.embedding"}
    for path, blocks in loaded.blocks.items():
        parameter = loaded.params
        for key in path.split("."):
            parameter = parameter[key]
        dequantised = gguf.quants.dequantize(blocks.read(), QUANTS[kind])
        assert blocks.type_name == kind and blocks.shape == dequantised.shape
        rows = parameter if path == "embed.embedding" else np.reshape(parameter, blocks.shape[::-1]).T
        np.testing.assert_array_equal(dequantised, rows)


@pytest.mark.smoke
def test_rope_factors_are_honoured(tmp_path):
    tensors = numpy_tensors() | {"rope_freqs.weight": np.array([1.0, 4.0], np.float32)}
    config = load(write_gguf(tmp_path / "m.gguf", "llama", tensors, metadata())).config
    assert config.rope.scaling == TabulatedScaling((1.0, 4.0))
    np.testing.assert_allclose(config.rope.frequencies(), [1.0, 10000**-0.5 / 4])
    tensors["rope_freqs.weight"] = np.ones(3, np.float32)
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight holds 3 factors; expected 2"):
        load(write_gguf(tmp_path / "n.gguf", "llama", tensors, metadata()))


@pytest.mark.smoke
def test_rope_scaling_in_the_metadata(tmp_path):
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    loaded = load(write_gguf(tmp_path / "a.gguf", "llama", numpy_tensors(), metadata(**linear)))
    assert loaded.config.rope.scaling == LinearScaling(2.0) and loaded.max_model_len == 128
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
    loaded = load(write_gguf(tmp_path / "b.gguf", "llama", numpy_tensors(), metadata(**yarn)))
    assert loaded.config.rope.scaling == YarnScaling(4.0, 16, pytest.approx(0.1 * np.log(4) + 1))
    both = numpy_tensors() | {"rope_freqs.weight": np.ones(2, np.float32)}
    with pytest.raises(ConfigError, match="twice"):
        load(write_gguf(tmp_path / "c.gguf", "llama", both, metadata(**linear)))


@pytest.mark.smoke
def test_a_window_in_the_metadata_of_a_llama_is_mistral(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "llama", numpy_tensors(), metadata(**{"attention.sliding_window": 5}))
    assert load(path).config.windows == (5,)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "architecture, changes, error, words",
    [
        ("falcon", {}, UnsupportedArchitectureError, "falcon.*llama"),
        ("llama", {"expert_count": 8}, ConfigError, "mixture of experts"),
        ("llama", {"attention.head_count_kv": [1, 2]}, ConfigError, "head_count_kv differs between layers"),
        ("llama", {"attention.head_count": None}, ConfigError, "lack llama.embedding_length or"),
        ("llama", {"block_count": None}, ConfigError, "num_hidden_layers is missing"),
        ("llama", {"rope.dimension_count": 2}, ConfigError, "partial_rotary_factor"),
        ("llama", {"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, ConfigError, "longrope"),
        ("llama", {"split.count": 3}, CheckpointFormatError, "gguf-split"),
        ("llama", {"block_count": 2}, TensorMismatchError, "model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_models_that_are_refused(architecture, changes, error, words, tmp_path):
    with pytest.raises(error, match=words):
        load(write_gguf(tmp_path / "m.gguf", architecture, numpy_tensors(), metadata(**changes)))


@pytest.mark.smoke
def test_unknown_tensors_are_listed_by_their_own_name(tmp_path):
    tensors = numpy_tensors() | {"blk.0.attn_sinks.weight": np.zeros(2, np.float32)}
    with pytest.raises(TensorMismatchError) as caught:
        load(write_gguf(tmp_path / "m.gguf", "llama", tensors, metadata()))
    assert caught.value.extra == ("blk.0.attn_sinks.weight",)


@pytest.mark.smoke
def test_files_that_are_not_whole(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "llama", numpy_tensors(), metadata())
    whole = path.read_bytes()
    for damaged in (b"", b"GGUF", b"not a gguf file at all", whole[: len(whole) // 2], whole[:-100]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointFormatError, match=r"m\.gguf is not a whole GGUF file"):
            load(path)


@pytest.mark.smoke
def test_a_file_without_a_model(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "llama", {"adapter.weight": np.zeros((2, 2), np.float32)}, metadata())
    with pytest.raises(CheckpointFormatError, match="not a language model"):
        load(path)


@pytest.mark.smoke
def test_without_the_package(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", "llama", numpy_tensors(), metadata())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match=r"package gguf; install it with: pip install 'distaff\[gguf\]'"):
        load(path)
