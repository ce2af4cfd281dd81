"""The real checkpoint, compiled once for all end-to-end tests, and transformers on the same weights as the judge."""

from pathlib import Path

import numpy as np
import pytest
from tiny_gguf import reference_from_gguf

from distaff.compiler import compile_model
from distaff.compiler.buckets import parse_buckets
from distaff.frontend.loading import load_model
from distaff.frontend.loading.demo_model import find_demo_model


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in float32, from the packaged GGUF file."""
    return load_model("smollm2-135m", dtype="float32", progress=False)


@pytest.fixture(scope="session")
def smollm2_artifact(smollm2, tmp_path_factory) -> Path:
    """The compiled model, with few programs: what is tested is what they compute, not how fast."""
    folder = tmp_path_factory.mktemp("smollm2") / "artifact"
    compile_model(
        smollm2.apply,
        smollm2.params,
        output=folder,
        max_model_len=512,
        name=smollm2.name,
        architecture=smollm2.architecture,
        page_size=16,
        buckets=parse_buckets("decode=1,20 mixed=64x20 scoring=64x20"),
        eos_token_ids=smollm2.eos_token_ids,
        bos_token_id=smollm2.bos_token_id,
        tokenizer=smollm2.tokenizer,
    )
    return folder


@pytest.fixture(scope="session")
def reference(smollm2):
    """``reference(token_ids) -> float32 logits [S, vocab]`` of transformers on the same GGUF weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    c = smollm2.config
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    model = reference_from_gguf(find_demo_model(), config)

    def logits(token_ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([token_ids])).logits[0].float().numpy()

    return logits
