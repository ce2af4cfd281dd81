"""Every model family, from a transformers checkpoint through derivation: logits with mixed prefill and decode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints as tiny

from distaff.compiler import derive_serve_step
from distaff.compiler.validate import serve
from distaff.frontend.loading import load_model

FAMILIES = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama3-rope": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "mistral": ("Mistral", {"sliding_window": 6}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 12}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_derived_logits_match_transformers(name, tmp_path):
    pytest.importorskip("transformers")
    family, changes = FAMILIES[name]
    model = tiny.make_reference(family, seed=3, **changes)
    loaded = load_model(tiny.save(model, tmp_path / name), dtype="float32", progress=False)
    step = derive_serve_step(loaded.apply, loaded.params, max_model_len=64, page_size=4)
    assert {f["served_by"] for f in step.report["attentions"]} == {"kernel"}
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, step.vocab_size, n).astype(np.int32) for n in (23, 9, 16, 1)]
    expected = [tiny.reference_logits(model, p[None])[0] for p in prompts]
    found = serve(step, prompts, max_model_len=64, page_size=4, rng=rng)
    for mine, theirs in zip(found, expected, strict=True):
        assert tiny.relative_error(mine, theirs) < 1e-4


def test_windows_and_softcaps_reach_the_kernel(tmp_path):
    pytest.importorskip("transformers")
    model = tiny.make_reference("Gemma2", **FAMILIES["gemma2"][1], num_hidden_layers=2)
    loaded = load_model(tiny.save(model, tmp_path / "gemma2"), dtype="float32", progress=False)
    found = derive_serve_step(loaded.apply, loaded.params, max_model_len=64).report["attentions"]
    assert [f.get("window") for f in found] == [6, None]
    assert all(f["softcap"] == pytest.approx(50.0) for f in found)
    assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), loaded.params))
