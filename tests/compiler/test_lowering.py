import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from jax import export
from tiny_step import tiny_step

from distaff.compiler.artifact import CacheSpec, Manifest
from distaff.compiler.buckets import parse_buckets
from distaff.compiler.lowering.build import (
    CPU_POOL_BYTES,
    ModelInfo,
    OutputExistsError,
    build_artifact,
    default_num_pages,
)
from distaff.compiler.lowering.export import LoweringError, StepExporter
from distaff.compiler.lowering.stablehlo import custom_calls, donated_arguments, operation_counts, source_files
from distaff.compiler.lowering.weights import DTYPE_NAMES, write_weights
from distaff.compiler.serve_step import ServeStep

BUCKETS = parse_buckets("decode=2 mixed=8x2")
MODEL = ModelInfo("tiny", 64, eos_token_ids=[3])


def build(folder: Path, step: ServeStep | None = None, **options) -> Manifest:
    return build_artifact(step or tiny_step(), MODEL, folder, buckets=BUCKETS, page_size=4, **options)


def exporter(step: ServeStep, num_pages: int = 7) -> StepExporter:
    return StepExporter(step, page_size=4, pages_per_request=16, num_pages=num_pages, platform="cpu")


def changed(change) -> ServeStep:
    """The tiny step with its outputs put through ``change(logits, pages)``."""
    step = tiny_step()
    return dataclasses.replace(step, function=lambda *arguments: change(*step.function(*arguments)))


@pytest.mark.smoke
def test_an_artifact_is_complete_and_reads_back(tmp_path):
    seen = []
    manifest = build(tmp_path / "a", progress=lambda *state: seen.append(state))
    assert Manifest.load(tmp_path / "a") == dataclasses.replace(
        manifest, report=json.loads(json.dumps(dict(manifest.report)))
    )
    assert [p.name for p in manifest.programs] == ["decode-2", "mixed-8x2"]
    assert manifest.num_pages == 2 * 16 + 1
    assert not manifest.fixed_num_pages
    assert manifest.report["attentions"] == 2
    assert manifest.eos_token_ids == (3,)
    assert seen == [
        ("exporting programs", 0, 2),
        ("exporting programs", 1, 2),
        ("writing weights", 0, 1),
        ("writing weights", 1, 1),
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_programs_keep_the_number_of_pages_open(tmp_path):
    program = exporter(tiny_step()).program(BUCKETS[0])
    exported = export.deserialize(bytearray(program.blob))
    assert str(exported.in_avals[3].shape[1]) == "num_pages"
    assert program.operations["scatter"] == 2
    assert any(file.endswith("tiny_step.py") for file in program.source_files)


def test_a_step_that_needs_a_static_pool_is_exported_for_one_size(tmp_path):
    def needs_int(logits, pages):
        np.zeros(pages[0].shape[1])
        return logits, pages

    one = exporter(changed(needs_int))
    exported = export.deserialize(bytearray(one.program(BUCKETS[0]).blob))
    assert exported.in_avals[3].shape[1] == 7
    assert one.fixed_because is not None
    manifest = build(tmp_path / "a", changed(needs_int), num_pages=20)
    assert manifest.fixed_num_pages
    assert manifest.num_pages == 20
    assert manifest.report["lowering"]["pool_size_fixed_because"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits, pages: (logits[:, :-1], pages), r"decode-2: logits are float32\(2, 31\), not float32\(2, 32\)"),
        (lambda logits, pages: (logits.astype(jnp.float16), pages), "logits are float16"),
        (lambda logits, pages: (logits, [pages[0].astype(jnp.float16)]), "decode-2: pages .* went in and .* came out"),
        (lambda logits, pages: (logits, []), "pages .* went in and"),
    ],
)
def test_a_step_that_breaks_the_contract_is_refused(tmp_path, change, message):
    with pytest.raises(LoweringError, match=message):
        build(tmp_path / "a", changed(change))
    assert list(tmp_path.iterdir()) == []


def test_the_models_own_error_comes_through(tmp_path):
    def broken(logits, pages):
        raise RuntimeError("from the model")

    with pytest.raises(RuntimeError, match="from the model"):
        build(tmp_path / "a", changed(broken))


def test_output_is_replaced_only_with_force_and_only_if_it_is_an_artifact(tmp_path):
    output = tmp_path / "a"
    output.mkdir()
    build(output)
    (output / "executables").mkdir()
    with pytest.raises(OutputExistsError, match="--force"):
        build(output)
    build(output, force=True, num_pages=40)
    assert Manifest.load(output).num_pages == 40
    assert not (output / "executables").exists()
    other = tmp_path / "b"
    other.mkdir()
    (other / "thesis.txt").write_text("dear")
    with pytest.raises(OutputExistsError, match="not an artifact"):
        build(other, force=True)
    assert (other / "thesis.txt").read_text() == "dear"


def test_a_failed_replacement_leaves_the_old_artifact(tmp_path):
    build(tmp_path / "a")
    with pytest.raises(LoweringError):
        build(tmp_path / "a", changed(lambda logits, pages: (logits, [])), force=True)
    Manifest.load(tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_the_tokenizer_is_saved(tmp_path):
    class Tokenizer:
        def save(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")

    model = dataclasses.replace(MODEL, tokenizer=Tokenizer())
    build_artifact(tiny_step(), model, tmp_path / "a", buckets=BUCKETS, page_size=4)
    assert Manifest.load(tmp_path / "a").has_tokenizer


def test_default_pool():
    caches = (CacheSpec("k", 30, (3, 64), "float32"),)
    page = 16 * 30 * 3 * 64 * 4
    assert default_num_pages(caches, 16, pages_per_request=8, max_batch=4, platform="cpu") == 4 * 8 + 1
    assert default_num_pages(caches, 16, 512, 64, "cpu") == CPU_POOL_BYTES // page + 1
    assert default_num_pages(caches, 16, 9999, 64, "cpu") == 10000
    assert default_num_pages(caches, 16, 512, 64, "cuda") == 512 * 64 + 1


def test_weights_read_back_with_the_reference_reader_and_are_aligned(tmp_path):
    rng = np.random.default_rng()
    weights = {
        "odd": rng.normal(size=(3,)).astype(np.float32),
        "scalar": np.float32(2.5).reshape(()),
        "half": jnp.asarray(rng.normal(size=(8, 4)), jnp.float16),
        "brain": jnp.asarray(rng.normal(size=(5, 64)), jnp.bfloat16),
        "transposed": rng.normal(size=(16, 32)).astype(np.float32).T,
        "bytes": rng.integers(0, 255, size=(7, 64)).astype(np.uint8),
        "empty": np.zeros((0, 4), np.int8),
    }
    specs = write_weights(weights, tmp_path, max_file_bytes=1000)
    assert [spec.name for spec in specs] == list(weights)
    assert len({spec.file for spec in specs}) > 1
    for spec in specs:
        data = (tmp_path / spec.file).read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        assert start % 64 == 0
        offset = json.loads(data[8:start])[spec.name]["data_offsets"][0]
        assert offset % 64 == 0 or spec.bytes % 64
        read = dict(safetensors.deserialize(data))[spec.name]
        assert (read["dtype"], tuple(read["shape"])) == (DTYPE_NAMES[spec.dtype], spec.shape)
        assert bytes(read["data"]) == np.asarray(weights[spec.name]).tobytes()


def test_a_weight_of_a_foreign_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'w' has dtype complex64"):
        write_weights({"w": np.zeros(2, np.complex64)}, tmp_path)


def test_text_checks():
    def f(pages, index):
        return pages.at[index].set(jnp.linalg.cholesky(pages[None, :1])[0, 0]), index + 1

    shapes = jax.ShapeDtypeStruct((4,), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    text = jax.jit(f, donate_argnums=0).lower(*shapes).as_text(debug_info=True)
    assert donated_arguments(text) == {0}
    assert donated_arguments(jax.jit(f).lower(*shapes).as_text()) == set()
    assert operation_counts(text)["scatter"] == 1
    assert "lapack_spotrf_ffi" in custom_calls(text)
    assert __file__ in source_files(text)
    with pytest.raises(ValueError, match="@main"):
        donated_arguments("module {}")
