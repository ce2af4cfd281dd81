import dataclasses
import json

import pytest

from distaff.compiler.artifact import FORMAT_VERSION, ArtifactError, CacheSpec, Manifest, ProgramSpec, TensorSpec


def manifest(**changes) -> Manifest:
    values = dict(
        model="m",
        architecture="llama",
        vocab_size=32,
        max_model_len=50,
        page_size=16,
        num_pages=9,
        dtype="float32",
        platform="cpu",
        caches=(CacheSpec("k", 2, (3, 4), "float32"), CacheSpec("v", 2, (6,), "bfloat16", window=8)),
        weights=(TensorSpec("w", (2, 5), "bfloat16", "model-00000.safetensors"),),
        programs=(ProgramSpec("decode-4", 4, 4, 4, "d.bin", "00"), ProgramSpec("scoring-9x4", 9, 4, 9, "s.bin", "11")),
        eos_token_ids=(1, 2),
        report={"layers": 2},
    )
    return Manifest(**{**values, **changes})


def write(folder, m: Manifest) -> None:
    for name in ("programs/d.bin", "programs/s.bin", "weights/model-00000.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    m.save(folder)


@pytest.mark.smoke
def test_round_trip(tmp_path):
    write(tmp_path, manifest())
    assert Manifest.load(tmp_path) == manifest()


def test_sizes():
    m = manifest()
    assert m.pages_per_request == 4
    assert m.bytes_per_token == 2 * 12 * 4 + 2 * 6 * 2
    assert m.bytes_per_page == 16 * m.bytes_per_token
    assert m.weight_bytes == 20
    assert (m.max_batch, m.max_step_tokens, m.max_samples) == (4, 9, 9)
    assert [p.is_decode for p in m.programs] == [True, False]


def test_a_folder_without_a_manifest_is_no_artifact(tmp_path):
    with pytest.raises(ArtifactError, match="did not finish"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("missing", ["programs/d.bin", "weights/model-00000.safetensors"])
def test_missing_files_are_named(tmp_path, missing):
    write(tmp_path, manifest())
    (tmp_path / missing).unlink()
    with pytest.raises(ArtifactError, match=missing):
        Manifest.load(tmp_path)


def test_a_promised_tokenizer_must_be_there(tmp_path):
    write(tmp_path, manifest(has_tokenizer=True))
    with pytest.raises(ArtifactError, match=r"tokenizer/tokenizer\.json"):
        Manifest.load(tmp_path)


def edited(**changes) -> str:
    data = dataclasses.asdict(manifest())
    for name, value in changes.items():
        data[name] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "no format_version"),
        ("{}", "no format_version"),
        (edited(format_version=99), f"99 and this distaff reads {FORMAT_VERSION}"),
        (edited(programs=[]), "lists no programs"),
        (edited(color="red"), "color"),
        (edited(page_size=0), "page_size 0"),
        (edited(num_pages="many"), "num_pages 'many'"),
        (edited(caches=[{"name": "k", "layers": 1, "shape": [2], "dtype": "complex64"}]), "complex64"),
        (edited(caches=[{"name": "k", "layers": 0, "shape": [2], "dtype": "int8"}]), "layers 0"),
        (edited(weights=[{"name": "w", "shape": [-2], "dtype": "int8", "file": "w"}]), "shape"),
        (edited(weights=[{"name": "w", "shape": [2], "dtype": "int8", "file": "../w"}]), "plain file name"),
        (edited(weights=[{"name": "w", "shape": [2]}]), "dtype"),
        (edited(weights=3), "damaged"),
    ],
)
def test_damage_is_one_clear_error(text, message):
    with pytest.raises(ArtifactError, match=message):
        Manifest.from_json(text, "there/manifest.json")
