import re
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from tiny_step import one_request

import distaff.frontend.loading as loading
from distaff.compiler.artifact import Manifest
from distaff.compiler.ir import StoredBlocks
from distaff.kernels import native
from distaff.runtime.model_runner import ModelRunner
from distaff.tools import compile_model, compile_on_demand
from distaff.tools.compile_on_demand import CompileOptions, NothingStoredError, artifact_for

VOCAB, WIDTH, HEADS = 64, 32, 4
SMALL = ["--dtype", "float32", "--max-model-len", "48", "--buckets", "decode=2 mixed=8x2", "--page-size", "4"]


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {name: (WIDTH, WIDTH) for name in "qkvo"} | {"embedding": (VOCAB, WIDTH)}
    return {name: (rng.normal(size=shape) * 0.3).astype(np.float32) for name, shape in shapes.items()}


def forward(params, tokens, causal=True):
    length = tokens.shape[1]
    x = params["embedding"][tokens]
    q, k, v = ((x @ params[name]).reshape(1, length, HEADS, WIDTH // HEADS) for name in "qkv")
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (WIDTH // HEADS) ** -0.5
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e30)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)
    return (x + mixed.reshape(1, length, WIDTH) @ params["o"]) @ params["embedding"].T


def loaded(**changes):
    values = dict(
        name="toy",
        architecture="toy-decoder",
        params=parameters(),
        apply=forward,
        eos_token_ids=(2,),
        bos_token_id=1,
        max_model_len=99,
        tokenizer=None,
        fingerprint="abc",
        blocks={},
    )
    return SimpleNamespace(**{**values, **changes})


@pytest.fixture
def loads(monkeypatch, tmp_path):
    """Puts a toy model in the place of checkpoints; the list tells what was loaded."""
    calls = []

    def load_model(model, **options):
        calls.append((model, options))
        if model == "broken":
            raise loading.CheckpointError("broken/model.safetensors lacks the tensor 'embedding'")
        if model == "bidirectional":
            return loaded(apply=lambda params, tokens: forward(params, tokens, causal=False))
        return loaded()

    monkeypatch.setattr(loading, "load_model", load_model)
    monkeypatch.setenv("DISTAFF_CACHE", str(tmp_path))
    return calls


def run(*arguments):
    return CliRunner().invoke(compile_model.main, [str(a) for a in arguments], catch_exceptions=False)


def test_compiles_an_artifact_that_serves_the_model(tmp_path, loads):
    result = run("toy", "-o", tmp_path / "a", "--explain", "--dump-ir", tmp_path / "ir", *SMALL)
    assert result.exit_code == 0, result.output
    for shown in ("decode-2", "mixed-8x2", "attentions", "validation", f"serve-model {tmp_path / 'a'}"):
        assert shown in result.output.replace("\n", "") or shown in result.output
    assert any((tmp_path / "ir").iterdir())
    assert loads == [("toy", {"dtype": "float32", "max_model_len": 48})]

    manifest = Manifest.load(tmp_path / "a")
    assert (manifest.model, manifest.max_model_len, manifest.eos_token_ids) == ("toy", 48, (2,))
    runner = ModelRunner(tmp_path / "a", manifest, forbid_compiles=True)
    tokens = np.array([5, 9, 33, 2, 60])
    program = runner.bucket(len(tokens), 1, 1)
    logits, _ = runner.execute(program, one_request(manifest, program, tokens, 0, [3, 1]))
    np.testing.assert_allclose(logits[0], forward(parameters(), tokens[None])[0, -1], atol=1e-5)
    runner.close()


def test_the_report_says_what_serves_and_what_a_format_costs(tmp_path, loads, monkeypatch):
    monkeypatch.setattr(compile_on_demand, "passages", lambda loaded, options: [[5, 9, 33, 2, 60, 1, 7]])
    result = run("toy", "-o", tmp_path / "a", "--quantize", "int8", *SMALL)
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "attention: 1 served by kernel, mask causal" in text
    assert re.search(r"derived: at most \S+e-0\d of the largest logit off the plain model", text)
    assert "with packed weights: at most" in text and "plain perplexity" in text
    assert "int8g32 4 0 8192" in text  # matrices, as stored, parameters; so small a table is there twice
    assert "matmul" in text and "passed over" not in text


def test_check_writes_nothing(tmp_path, loads, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("toy", "--check", *SMALL)
    assert result.exit_code == 0
    assert "toy can be served" in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--check"], ["-o", "a"]])
def test_a_refused_model_ends_with_3_and_the_users_line(tmp_path, loads, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    result = run("bidirectional", *arguments, *SMALL)
    assert result.exit_code == 3
    assert "not causal" in result.stderr
    assert "test_compile_model.py" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_broken_checkpoint_ends_with_4(tmp_path, loads):
    result = run("broken", "-o", tmp_path / "a")
    assert result.exit_code == 4
    assert result.stderr == "error: broken/model.safetensors lacks the tensor 'embedding'\n"


def test_wrong_usage_ends_with_2_before_anything_is_loaded(tmp_path, loads):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    for arguments, message in (
        (["toy"], "give the artifact's folder with -o"),
        (["toy", "-o", tmp_path / "a", "--buckets", "mixed=8"], "tokens x requests"),
        (["toy", "-o", tmp_path / "a", "--max-batch", "64", "--max-step-tokens", "8"], "raise max_step_tokens"),
        (["toy", "-o", tmp_path / "a", "--num-pages", "1"], "num-pages"),
        (["toy", "-o", tmp_path / "full"], "not an artifact"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert message in result.stderr
    assert loads == []


def test_blocks_are_kept_unless_a_dtype_is_asked_for():
    blocks = {
        "embed": StoredBlocks("Q8_0", (VOCAB, WIDTH), lambda: None),
        "q": StoredBlocks("Q4_0", (WIDTH, WIDTH), lambda: None),
        "k": StoredBlocks("Q6_K", (WIDTH, WIDTH), lambda: None),
    }
    model = loaded(blocks=blocks, config=SimpleNamespace(vocab_size=VOCAB))

    def kept(**options):
        return set(CompileOptions(**options).stored(model))

    assert kept() == ({"embed", "q"} if native.available() else set())
    assert kept(quantize="gguf") == kept(quantize="gguf", dtype="float32") == {"embed", "q"}
    assert kept(quantize="gguf", quantize_tables="int4") == {"q"}
    for options in ({"dtype": "float32"}, {"quantize": "none"}, {"quantize": "int8"}):
        assert kept(**options) == set()


def test_nothing_to_keep_ends_with_2(tmp_path, loads):
    result = run("toy", "-o", tmp_path / "a", "--quantize", "gguf", *SMALL)
    assert result.exit_code == 2
    assert "nothing of toy can be kept as it is: its matrices are not quantised" in result.stderr
    with pytest.raises(NothingStoredError, match="its matrices are Q5_0, Q6_K, and Q8_0"):
        blocks = {name: StoredBlocks(name, (WIDTH, WIDTH), lambda: None) for name in ("Q6_K", "Q5_0")}
        CompileOptions(quantize="gguf").stored(loaded(blocks=blocks))


@pytest.mark.parametrize(
    ("quantize", "formats"),
    [
        ("int8", ("int8g32", "int8g32")),
        ("int4", ("q4_1", "int8g32")),
        ("int4g64", ("int4g64", "int8g32")),
        ("q4_1", ("q4_1", "int8g32")),
    ],
)
def test_formats_that_names_stand_for(quantize, formats):
    chosen = CompileOptions(quantize=quantize).weight_formats()
    assert (chosen.matrices.name, chosen.tables.name) == formats


OPTIONS = {"max_model_len": 48, "buckets": "mixed=8x2", "page_size": 4}


def test_on_demand_compiles_once_per_set_of_options(tmp_path, loads):
    first = artifact_for("toy", **OPTIONS)
    assert Manifest.load(first).fingerprint == "abc"
    assert artifact_for("toy", **OPTIONS) == first
    assert len(loads) == 1
    other = artifact_for("toy", **{**OPTIONS, "page_size": 8})
    assert other != first
    assert len(loads) == 2
    assert artifact_for(str(first)) == first


def test_on_demand_sees_a_changed_checkpoint(tmp_path):
    options = compile_on_demand.CompileOptions()
    checkpoint = tmp_path / "org" / "my model"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"one")
    before = compile_on_demand._key(str(checkpoint), options)
    assert compile_on_demand._key(str(checkpoint), options) == before
    (checkpoint / "model.safetensors").write_bytes(b"other")
    assert compile_on_demand._key(str(checkpoint), options) != before


def test_on_demand_leaves_nothing_of_a_failure(tmp_path, loads):
    with pytest.raises(loading.CheckpointError):
        artifact_for("broken")
    assert [file.suffix for file in (tmp_path / "artifacts").iterdir()] == [".lock"]


def test_the_lock_waits_for_whoever_holds_it(tmp_path, caplog):
    lock = tmp_path / "x.lock"
    order = []

    def wait():
        with compile_on_demand._locked(lock):
            order.append("second")

    with compile_on_demand._locked(lock):
        waiting = threading.Thread(target=wait)
        waiting.start()
        while "waiting for it" not in caplog.text:
            time.sleep(0.01)
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]
