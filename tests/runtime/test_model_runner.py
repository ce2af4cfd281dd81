import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_step import one_request, plain, tiny_step, tiny_weights

from distaff.compiler.artifact import ArtifactError, Manifest
from distaff.compiler.buckets import parse_buckets
from distaff.compiler.lowering.build import ModelInfo, build_artifact
from distaff.kernels import native
from distaff.kernels.sampling import SamplingRows, draw_tokens
from distaff.runtime.executables import CompileForbiddenError
from distaff.runtime.model_runner import ModelRunner, NoProgramError
from distaff.runtime.platforms import MemoryTooSmallError, choose_num_pages, memory_limit, zeros


def build(folder, text="decode=1,4 mixed=8x2,16x4 scoring=16x4", step=None):
    model = ModelInfo("tiny", 32)
    buckets = parse_buckets(text)
    return build_artifact(step or tiny_step(), model, folder, buckets=buckets, page_size=4)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifacts") / "tiny"
    build(folder)
    return folder, Manifest.load(folder)


def generate_like(runner, manifest, prompt, decoded, table, row=0):
    """Logits of the last prompt token and of each decoded one."""
    program = runner.bucket(len(prompt), row + 1, 1)
    logits = [np.asarray(runner.execute(program, one_request(manifest, program, prompt, 0, table, row))[0])[0]]
    for index, token in enumerate(decoded):
        program = runner.bucket(1, 1, 1)
        batch = one_request(manifest, program, np.array([token]), len(prompt) + index, table)
        logits.append(np.asarray(runner.execute(program, batch)[0])[0])
    return np.stack(logits)


@pytest.mark.smoke
def test_logits_are_those_of_the_plain_model(artifact):
    folder, manifest = artifact
    runner = ModelRunner(folder, manifest)
    runner.warm_up()
    prompt, decoded = np.array([3, 5, 9, 1, 2, 7]), np.array([4, 4, 30])
    for table, row in ([5, 2, 9], 0), ([1, 3, 2], 1):
        logits = generate_like(runner, manifest, prompt, decoded, table, row)
        expected = plain(tiny_weights(), np.concatenate([prompt, decoded]))[len(prompt) - 1 :]
        np.testing.assert_allclose(logits, expected, atol=1e-5)
    runner.close()


def test_pages_stay_where_they_are(artifact):
    folder, manifest = artifact
    runner = ModelRunner(folder, manifest)
    pointer = runner.pages[0].unsafe_buffer_pointer()
    generate_like(runner, manifest, np.array([1, 2, 3]), np.array([4, 5]), [1, 2])
    assert runner.pages[0].unsafe_buffer_pointer() == pointer
    runner.close()


def test_the_second_start_compiles_nothing(artifact):
    folder, manifest = artifact
    first = ModelRunner(folder, manifest, num_pages=23)
    first.warm_up()
    assert len(first.executables.records) >= len(manifest.programs)
    first.close()
    second = ModelRunner(folder, manifest, num_pages=23, forbid_compiles=True)
    second.warm_up()
    generate_like(second, manifest, np.array([1, 2, 3]), np.array([4, 5]), [1, 22])
    second.close()
    assert second.executables.records
    assert not any(record.compiled for record in second.executables.records)
    assert second.compiles == 0


def test_forbidden_compiles_raise_before_the_step(tmp_path):
    manifest = build(tmp_path / "a", "mixed=8x2")
    runner = ModelRunner(tmp_path / "a", manifest, forbid_compiles=True)
    program = manifest.programs[0]
    batch = one_request(manifest, program, np.array([1, 2]), 0, [1])
    with pytest.raises(CompileForbiddenError, match="mixed-8x2"):
        runner.execute(program, batch)
    runner.warm_up()
    logits, tokens = runner.execute(program, batch)
    assert logits.shape == (2, 32) and tokens.tolist() == np.argmax(logits, axis=1).tolist()
    runner.close()


def test_a_step_draws_tokens_as_its_rows_say(artifact):
    folder, manifest = artifact
    runner = ModelRunner(folder, manifest)
    program = runner.bucket(3, 1, 1)
    batch = one_request(manifest, program, np.array([1, 2, 3]), 0, [4])
    rng = np.random.default_rng(0)
    floats, ints = np.zeros((program.samples, 7), np.float32), np.zeros((program.samples, 4), np.int32)
    seen = set()
    for _ in range(20):
        floats[0] = (0.05, 0.9, -np.inf, 0, 0, 1, rng.random())
        rows = SamplingRows(floats, ints)
        logits, tokens = runner.execute(program, batch, rows)
        np.testing.assert_array_equal(tokens, draw_tokens(logits, rows))
        seen.add(int(tokens[0]))
    assert len(seen) > 5
    runner.close()


def test_bucket_is_the_smallest_that_fits(artifact):
    folder, manifest = artifact
    runner = ModelRunner(folder, manifest)
    names = {
        (1, 1, 1): "decode-1",
        (2, 2, 2): "decode-4",
        (2, 1, 1): "mixed-8x2",
        (4, 3, 3): "mixed-16x4",
        (9, 1, 1): "mixed-16x4",
        (4, 1, 4): "mixed-16x4",
        (5, 1, 5): "scoring-16x4",
    }
    assert {numbers: runner.bucket(*numbers).name for numbers in names} == names
    for numbers in (17, 1, 1), (5, 5, 5), (16, 4, 17):
        with pytest.raises(NoProgramError, match="no program holds"):
            runner.bucket(*numbers)
    runner.close()


def test_weights_are_used_where_they_lie(tmp_path):
    rng = np.random.default_rng(0)
    step = tiny_step()
    weights = {**step.weights, "embedding": rng.normal(size=(32, 8)).astype(np.float32)}
    manifest = build(tmp_path / "a", "mixed=8x2", dataclasses.replace(step, weights=weights))
    runner = ModelRunner(tmp_path / "a", manifest)
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path / "a") in line]
    (low, high) = (int(number, 16) for number in mapped[0][0].split("-"))
    inside = [low <= weight.unsafe_buffer_pointer() < high for weight in runner._weights]
    assert inside == [True, True, True]
    np.testing.assert_array_equal(runner._weights[0], weights["embedding"])
    runner.close()


def damaged_copy(tmp_path):
    manifest = build(tmp_path / "a", "mixed=8x2")
    return tmp_path / "a", manifest, tmp_path / "a" / "weights" / manifest.weights[0].file


def test_damaged_weights_are_refused(tmp_path):
    folder, manifest, file = damaged_copy(tmp_path)
    good = file.read_bytes()
    for bad, message in (
        (good[:-5], "ends within the tensor 'bias'"),
        (b"", "no readable header"),
        (b"\xff" * 100, "no readable header"),
        (good.replace(b'"head"', b'"tail"'), "no proper entry for the tensor 'head'"),
        (good.replace(b"[8,32]", b"[32,8]"), r"holds 'head' .* manifest says float32\(8, 32\)"),
    ):
        file.write_bytes(bad)
        with pytest.raises(ArtifactError, match=message):
            ModelRunner(folder, manifest)


def test_damaged_programs_are_refused(tmp_path):
    folder, manifest, _ = damaged_copy(tmp_path)
    (folder / "programs" / manifest.programs[0].file).write_bytes(b"no")
    runner = ModelRunner(folder, manifest)
    with pytest.raises(ArtifactError, match="SHA-256"):
        runner.warm_up()
    runner.close()


def test_another_platforms_artifact_is_refused(artifact):
    folder, manifest = artifact
    with pytest.raises(ArtifactError, match="compiled for tpu and this process runs on cpu"):
        ModelRunner(folder, dataclasses.replace(manifest, platform="tpu"))


def test_pool_size(artifact):
    _, manifest = artifact
    plenty = 1 << 40
    assert choose_num_pages(manifest, plenty) == manifest.num_pages == 4 * 8 + 1
    assert choose_num_pages(manifest, plenty, num_pages=3) == 3
    assert choose_num_pages(manifest, plenty, kv_cache_bytes=10 * manifest.bytes_per_page + 1) == 10
    some = manifest.weight_bytes + 30 * manifest.bytes_per_page
    assert 9 <= choose_num_pages(manifest, some) <= 30
    half = 2 * (manifest.weight_bytes + 12 * manifest.bytes_per_page)
    assert choose_num_pages(manifest, half, memory_share=0.5) == 12
    with pytest.raises(MemoryTooSmallError, match="max-model-len"):
        choose_num_pages(manifest, manifest.weight_bytes)
    with pytest.raises(ValueError, match="give one"):
        choose_num_pages(manifest, plenty, num_pages=3, kv_cache_bytes=5)
    with pytest.raises(ValueError, match="null page"):
        choose_num_pages(manifest, plenty, num_pages=1)
    fixed = dataclasses.replace(manifest, fixed_num_pages=True)
    assert choose_num_pages(fixed, plenty, num_pages=manifest.num_pages) == manifest.num_pages
    with pytest.raises(ValueError, match="--num-pages 9"):
        choose_num_pages(fixed, plenty, num_pages=9)


def test_memory_limit_obeys_the_cgroup(monkeypatch, tmp_path):
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "small").write_text("12345678\n")
    monkeypatch.setattr("distaff.runtime.platforms._CGROUP_LIMITS", (tmp_path / "max", tmp_path / "gone"))
    physical = memory_limit(jax.devices()[0])
    assert physical > 1 << 28
    monkeypatch.setattr("distaff.runtime.platforms._CGROUP_LIMITS", (tmp_path / "max", tmp_path / "small"))
    assert memory_limit(jax.devices()[0]) == 12345678


@pytest.mark.parametrize("dtype", ["float32", "uint16", "int8"])
@pytest.mark.parametrize("shape", [(), (0, 3), (3, 5), (2, 7, 1 << 19)])
def test_zeros_are_zeros_where_something_else_was(shape, dtype):
    device = jax.devices()[0]
    before = jax.block_until_ready(jnp.ones(shape, dtype))
    del before  # its memory is free to be taken
    made = zeros(shape, dtype, device)
    assert (made.shape, made.dtype, made.device) == (shape, dtype, device)
    assert not np.asarray(made).any()


@pytest.mark.skipif(not native.available(), reason="needs the native kernels")
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no huge pages")
def test_large_zeros_ask_for_huge_pages():
    made = zeros((32 << 20,), "int8", jax.devices()[0])
    middle, inside, flags = made.unsafe_buffer_pointer() + made.nbytes // 2, False, []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if "-" in name and not name.endswith(":"):
            first, end = (int(address, 16) for address in name.split("-"))
            inside = first <= middle < end
        elif inside and name == "VmFlags:":
            flags = rest
    assert "hg" in flags
