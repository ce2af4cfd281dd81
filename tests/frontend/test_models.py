"""Every family against transformers on fresh random weights and tokens, through a saved checkpoint."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import make_reference, random_tokens, reference_logits, relative_error, save

from distaff.frontend import linen as nn
from distaff.frontend.loading import load_model
from distaff.frontend.models import ModelConfig, build_model

TOLERANCE = 1e-4

LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=1000.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)

VARIANTS = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", dict(tie_word_embeddings=True)),
    "llama-biases": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "llama-head-dim": ("Llama", dict(head_dim=12, num_key_value_heads=4)),
    "llama-one-kv-head": ("Llama", dict(num_key_value_heads=1)),
    "llama-gelu": ("Llama", dict(hidden_act="gelu_pytorch_tanh")),
    "llama-theta": ("Llama", dict(rope_parameters=dict(rope_type="default", rope_theta=500.0))),
    "llama-linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=3.0))),
    "llama-llama3": ("Llama", dict(rope_parameters=LLAMA3)),
    "llama-yarn": ("Llama", dict(rope_parameters=YARN)),
    "llama-yarn-options": (
        "Llama",
        dict(rope_parameters=YARN | dict(beta_fast=16.0, beta_slow=2.0, truncate=False, attention_factor=1.3)),
    ),
    "llama-yarn-mscale": ("Llama", dict(rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=1.1))),
    "mistral-window": ("Mistral", dict(sliding_window=5)),
    "mistral-full": ("Mistral", dict(sliding_window=None)),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2-window": ("Qwen2", dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)),
    "qwen2-window-unused": ("Qwen2", dict(use_sliding_window=False, sliding_window=6, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "qwen3-bias": ("Qwen3", dict(head_dim=8, attention_bias=True, tie_word_embeddings=True)),
    "gemma2": ("Gemma2", dict(head_dim=16, sliding_window=6, query_pre_attn_scalar=20)),
    "gemma2-caps": (
        "Gemma2",
        dict(head_dim=8, sliding_window=4, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    ),
    "gemma2-no-caps": (
        "Gemma2",
        dict(head_dim=8, sliding_window=4, attn_logit_softcapping=None, final_logit_softcapping=None),
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_transformers(variant, tmp_path):
    pytest.importorskip("transformers")
    family, changes = VARIANTS[variant]
    seed = int(np.random.default_rng().integers(1 << 30))
    reference = make_reference(family, seed, **changes)
    loaded = load_model(save(reference, tmp_path), dtype="float32", progress=False)
    tokens = random_tokens(seed)
    logits = loaded.apply(loaded.params, tokens)
    assert logits.shape == (2, 24, 96) and logits.dtype == jnp.float32
    assert relative_error(logits, reference_logits(reference, tokens)) < TOLERANCE, f"seed {seed}"


@pytest.mark.parametrize("variant", ["mistral-window", "gemma2"])
def test_the_window_matters(variant, tmp_path):
    """Guards the test above: without its window, the model is another one."""
    pytest.importorskip("transformers")
    family, changes = VARIANTS[variant]
    with_window = make_reference(family, 0, **changes)
    without = make_reference(family, 0, **(changes | dict(sliding_window=100)))
    tokens = random_tokens(0)
    assert relative_error(reference_logits(without, tokens), reference_logits(with_window, tokens)) > 10 * TOLERANCE


TINY = dict(
    model_type="llama",
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def tiny(**changes):
    config = ModelConfig.from_hf(TINY | changes)
    module = build_model(config)
    tokens = random_tokens(3, length=9, vocab=50)
    return module, module.init(jax.random.key(0), tokens), tokens


@pytest.mark.smoke
def test_parameters_name_their_logical_axes():
    _, variables, _ = tiny()
    names = {
        "/".join(k.key for k in path): spec
        for path, spec in jax.tree_util.tree_leaves_with_path(
            nn.get_partition_spec(variables)["params"], is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec)
        )
    }
    assert names["embed/embedding"] == jax.sharding.PartitionSpec("vocab", "embed")
    assert names["head/kernel"] == jax.sharding.PartitionSpec("embed", "vocab")
    assert names["layers_1/attention/query/kernel"] == jax.sharding.PartitionSpec("embed", "heads", "head_dim")
    assert names["layers_1/attention/key/kernel"] == jax.sharding.PartitionSpec("embed", "kv_heads", "head_dim")
    assert names["layers_1/attention/output/kernel"] == jax.sharding.PartitionSpec("heads", "head_dim", "embed")
    assert names["layers_0/mlp/down/kernel"] == jax.sharding.PartitionSpec("mlp", "embed")
    shapes = jax.tree.map(jnp.shape, nn.unbox(variables)["params"]["layers_0"]["attention"])
    assert shapes["query"]["kernel"] == (16, 4, 4) and shapes["value"]["kernel"] == (16, 2, 4)


@pytest.mark.smoke
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2"])
def test_later_tokens_do_not_change_earlier_logits(family):
    module, variables, tokens = tiny(model_type=family, head_dim=8, sliding_window=3)
    changed = tokens.copy()
    changed[:, 6:] = (changed[:, 6:] + 7) % 50
    before, after = module.apply(variables, tokens), module.apply(variables, changed)
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert not np.allclose(before[:, 6:], after[:, 6:])


@pytest.mark.smoke
def test_a_window_hides_what_lies_before_it():
    """One layer with a window of 3: the logits at position 5 depend on tokens 3, 4 and 5 alone."""
    module, variables, tokens = tiny(model_type="mistral", sliding_window=3, num_hidden_layers=1)
    base = module.apply(variables, tokens)[:, 5]
    for position, seen in ((2, False), (3, True), (5, True)):
        changed = tokens.copy()
        changed[:, position] = (changed[:, position] + 7) % 50
        assert np.array_equal(module.apply(variables, changed)[:, 5], base) is not seen, position


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_computes_near_float32(dtype):
    module, variables, tokens = tiny()
    params = jax.tree.map(lambda x: x * 4, nn.unbox(variables)["params"])
    expected = module.apply({"params": params}, tokens)
    half = build_model(ModelConfig.from_hf(TINY, dtype=dtype))
    found = half.apply({"params": jax.tree.map(lambda x: x.astype(dtype), params)}, tokens)
    assert found.dtype == jnp.float32
    error = relative_error(found, np.asarray(expected))
    assert 1e-5 < error < 5e-2  # the lower bound: it did compute in half precision
