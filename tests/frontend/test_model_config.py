"""Reading configs: both styles of rope fields, defaults of families, and errors that name the field."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff.frontend.models import ConfigError, ModelConfig, UnsupportedArchitectureError
from distaff.frontend.models.rope import LinearScaling, Llama3Scaling, Rope, TabulatedScaling, YarnScaling

LLAMA = dict(
    architectures=["LlamaForCausalLM"],
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)


def read(**changes):
    return ModelConfig.from_hf({k: v for k, v in (LLAMA | changes).items() if v != "absent"})


@pytest.mark.smoke
def test_defaults():
    config = read(num_key_value_heads="absent")
    assert (config.architecture, config.num_kv_heads, config.head_dim) == ("llama", 4, 4)
    assert config.rope == Rope(4, 10_000.0) and config.windows == (None,) * 4 and not config.tied_embeddings
    assert config.max_model_len == 64


@pytest.mark.smoke
@pytest.mark.parametrize(
    "scaling, expected",
    [
        (dict(rope_type="default"), None),
        (dict(rope_type="linear", factor=2.0), LinearScaling(2.0)),
        (LLAMA3, Llama3Scaling(8.0, 1.0, 4.0, 32)),
        (
            dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
            YarnScaling(4.0, 16, 0.1 * np.log(4.0) + 1.0),
        ),
    ],
)
def test_old_and_new_rope_fields_say_the_same(scaling, expected):
    new = read(rope_parameters=dict(scaling, rope_theta=500.0))
    old = read(rope_theta=500.0, rope_scaling=scaling)
    older = read(rope_theta=500.0, rope_scaling={("type" if k == "rope_type" else k): v for k, v in scaling.items()})
    assert new.rope == old.rope == older.rope == Rope(4, 500.0, expected)


@pytest.mark.smoke
def test_lengths_that_scalings_reach():
    assert read(rope_scaling=dict(type="linear", factor=2.0)).max_model_len == 128
    assert read(rope_scaling=LLAMA3).max_model_len == 64
    yarn = dict(type="yarn", factor=4.0, original_max_position_embeddings=32)
    assert read(rope_scaling=yarn).max_model_len == 128


@pytest.mark.smoke
def test_tabulated_factors_can_stand_for_llama3_scaling():
    scaled = Rope(64, 5e5, Llama3Scaling(8.0, 1.0, 4.0, 8192)).frequencies()
    plain = Rope(64, 5e5).frequencies()
    factors = tuple((plain / scaled).tolist())
    assert min(factors) == 1.0 and max(factors) == pytest.approx(8.0)
    np.testing.assert_allclose(Rope(64, 5e5, TabulatedScaling(factors)).frequencies(), scaled, rtol=1e-6)


@pytest.mark.smoke
def test_windows():
    assert read(architectures=["MistralForCausalLM"], sliding_window=8).windows == (8,) * 4
    assert read(architectures=["MistralForCausalLM"], sliding_window=None).windows == (None,) * 4
    qwen = dict(architectures=["Qwen2ForCausalLM"], sliding_window=8, max_window_layers=3)
    assert read(**qwen).windows == (None,) * 4
    assert read(**qwen, use_sliding_window=True).windows == (None, None, None, 8)
    types = ["sliding_attention", "full_attention"] * 2
    assert read(**qwen, use_sliding_window=True, layer_types=types).windows == (8, None, 8, None)
    gemma = dict(architectures=["Gemma2ForCausalLM"], head_dim=8, sliding_window=8)
    assert read(**gemma).windows == (8, None, 8, None)
    assert read(**gemma).tied_embeddings and read(**gemma).attention_scale == 1 / 16


@pytest.mark.smoke
@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(vocab_size="absent"), ["vocab_size", "missing"]),
        (dict(hidden_size=0), ["hidden_size", "0", "at least 1"]),
        (dict(hidden_size=True), ["hidden_size", "True"]),
        (dict(num_hidden_layers="12"), ["num_hidden_layers", "'12'"]),
        (dict(num_key_value_heads=3), ["num_key_value_heads", "divide"]),
        (dict(head_dim=5), ["head_dim", "even"]),
        (dict(hidden_act="relu"), ["hidden_act", "relu", "silu"]),
        (dict(rms_norm_eps=-1.0), ["rms_norm_eps"]),
        (dict(tie_word_embeddings="yes"), ["tie_word_embeddings", "true or false"]),
        (dict(rope_scaling=dict(type="dynamic", factor=2.0)), ["dynamic", "cached", "yarn"]),
        (dict(rope_scaling=dict(type="longrope", factor=2.0)), ["longrope", "implemented"]),
        (dict(rope_scaling=dict(type=["linear"], factor=2.0)), ["rope_type"]),
        (dict(rope_scaling=dict(type="linear")), ["factor", "missing"]),
        (dict(rope_scaling=LLAMA3 | dict(high_freq_factor=0.5)), ["high_freq_factor", "above"]),
        (dict(rope_scaling="linear"), ["rope_parameters", "str"]),
        (dict(rope_parameters=dict(full_attention=dict(rope_theta=3.0))), ["differ between layers"]),
        (dict(rope_theta=1.0), ["rope_theta", "above 1"]),
        (dict(partial_rotary_factor=0.5), ["partial_rotary_factor"]),
        (dict(quantization_config=dict(quant_method="gptq")), ["quantization_config", "GGUF"]),
        (dict(architectures=["Gemma2ForCausalLM"]), ["head_dim", "missing"]),
        (
            dict(architectures=["Gemma2ForCausalLM"], head_dim=8, use_bidirectional_attention=True),
            ["use_bidirectional_attention", "causal"],
        ),
        (dict(architectures=["Qwen3ForCausalLM"], head_dim=8, layer_types=["full_attention"]), ["layer_types", "4"]),
        (
            dict(architectures=["Qwen3ForCausalLM"], head_dim=8, layer_types=[["full_attention"]] * 4),
            ["layer_types", "sliding_attention"],
        ),
    ],
)
def test_errors_name_the_field(changes, words):
    with pytest.raises(ConfigError) as caught:
        read(**changes)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "changes",
    [
        dict(architectures=["MixtralForCausalLM"]),
        dict(architectures=["LlamaForSequenceClassification"], model_type="llama"),
        dict(architectures="absent", model_type="gpt2"),
        dict(architectures="absent"),
        dict(architectures=[7]),
    ],
)
def test_unknown_architecture_lists_those_supported(changes):
    with pytest.raises(UnsupportedArchitectureError, match=r"LlamaForCausalLM.*Qwen3ForCausalLM"):
        read(**changes)


@pytest.mark.smoke
def test_unknown_dtype():
    with pytest.raises(ConfigError, match=r"float64.*bfloat16"):
        ModelConfig.from_hf(LLAMA, dtype="float64")


FIELDS = sorted(
    {*LLAMA, "head_dim", "rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "use_sliding_window"}
    | {"layer_types", "hidden_act", "hidden_activation", "rms_norm_eps", "attention_bias", "model_type"}
    | {"tie_word_embeddings", "query_pre_attn_scalar", "attn_logit_softcapping", "max_window_layers"}
)
ROPE_FIELDS = ["type", "rope_type", "factor", "rope_theta", "low_freq_factor", "high_freq_factor", "beta_fast"]
ROPE_FIELDS += ["mscale", "mscale_all_dim", "truncate", "original_max_position_embeddings", "attention_factor"]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.floats(allow_nan=True)
    | st.sampled_from(["llama3", "yarn", "linear", "dynamic", "silu", "full_attention", ""]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(ROPE_FIELDS), inner, max_size=8),
    max_leaves=12,
)


@pytest.mark.smoke
@settings(max_examples=300, deadline=None)
@given(
    architecture=st.sampled_from(["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2"]),
    changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4),
)
def test_any_config_is_read_or_refused(architecture, changes):
    """Whatever stands in the fields: a usable config, or an error that is a ConfigError."""
    data = LLAMA | dict(architectures=[f"{architecture}ForCausalLM"], head_dim=8) | changes
    try:
        config = ModelConfig.from_hf(json.loads(json.dumps(data)))
    except ConfigError:
        return
    assert len(config.windows) == config.num_layers and config.num_heads % config.num_kv_heads == 0
    frequencies = config.rope.frequencies()
    assert frequencies.shape == (config.head_dim // 2,) and np.isfinite(frequencies).all()
    assert hash(config) == hash(config)
