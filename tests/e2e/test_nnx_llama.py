"""The Llama family in NNX: logits of the Linen one, and greedy text served as the trained module's argmax says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fake_engine import byte_tokenizer
from tiny_checkpoints import make_reference, save

from distaff.compiler import compile_model
from distaff.compiler.buckets import parse_buckets
from distaff.frontend import nnx
from distaff.frontend.loading import load_model
from distaff.frontend.models import ModelConfig, build_model
from distaff.frontend.models.nnx_llama import Llama
from distaff.runtime import Engine, EngineConfig, SamplingParams

SIZES = dict(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
FAMILIES = {
    "llama": dict(architectures=["LlamaForCausalLM"], model_type="llama"),
    "tied": dict(architectures=["LlamaForCausalLM"], model_type="llama", tie_word_embeddings=True),
    "mistral": dict(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=6),
    "qwen2": dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2"),
    "qwen3": dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=16),
}


def is_box(x):
    return hasattr(x, "unbox")


def config_of(family):
    return ModelConfig.from_hf({**SIZES, **FAMILIES[family]})


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_logits_are_those_of_linen(family):
    config = config_of(family)
    linen = build_model(config)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)
    boxed = linen.init(jax.random.key(1), tokens)
    params = jax.tree.map(lambda x: x.unbox(), boxed["params"], is_leaf=is_box)
    params = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    model = Llama.from_params(config, params)
    np.testing.assert_allclose(model(tokens), linen.apply({"params": params}, tokens), rtol=1e-5, atol=1e-5)
    names = {path: tuple(v.get_metadata("out_sharding")) for path, v in nnx.to_flat_state(nnx.state(model))}
    boxes = jax.tree_util.tree_leaves_with_path(boxed["params"], is_leaf=is_box)
    assert names == {tuple(entry.key for entry in path): tuple(box.names) for path, box in boxes}


def test_a_tree_of_other_parameters_is_refused():
    config = config_of("llama")
    with pytest.raises(ValueError, match=r"norm\.scale"):
        Llama.from_params(config, {"embed": {"embedding": jnp.ones((256, 32))}})


def test_a_trained_model_is_served_unchanged(tmp_path):
    model = Llama(config_of("qwen3"), rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    text = np.tile(np.arange(40, 72, dtype=np.int32), 8)

    @nnx.jit
    def train(model, optimizer, tokens):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:]).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    rng = np.random.default_rng(0)
    losses = []
    for _ in range(40):
        starts = rng.integers(0, len(text) - 33, 8)
        losses.append(float(train(model, optimizer, np.stack([text[s : s + 33] for s in starts]))))
    assert losses[-1] < 0.7 * losses[0]

    graphdef, params = nnx.split(model)
    prompts = [rng.integers(1, 256, n).tolist() for n in (3, 11, 7)]
    served = serve(lambda params, tokens: nnx.merge(graphdef, params)(tokens), params, prompts, tmp_path / "artifact")
    assert served == [greedy(model, prompt) for prompt in prompts]


def test_a_checkpoint_is_served_as_its_module_says(tmp_path):
    pytest.importorskip("transformers")
    folder = save(make_reference("Llama", seed=3), tmp_path / "checkpoint")
    loaded = load_model(folder, api="nnx", progress=False)
    prompts = [[5, 7, 1], [9, 2, 2, 8, 4]]
    served = serve(loaded.apply, loaded.params, prompts, tmp_path / "artifact")
    assert served == [greedy(loaded.module, prompt) for prompt in prompts]


def serve(fn, params, prompts, artifact):
    """What the runtime generates for each prompt: 12 tokens, greedily."""
    compile_model(
        fn,
        params,
        output=artifact,
        max_model_len=64,
        name="nnx",
        architecture="llama",
        page_size=4,
        buckets=parse_buckets("decode=4 mixed=32x4"),
        eos_token_ids=(0,),
    )
    engine = Engine(artifact, EngineConfig(num_pages=64, warm_up=False), tokenizer=byte_tokenizer())
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
    served = {}
    while engine.has_unfinished:
        for output in engine.step():
            if output.finished:
                served[int(output.request_id)] = list(output.outputs[0].token_ids)
    return [served[i] for i in range(len(prompts))]


def greedy(model, prompt):
    """12 tokens by the module's argmax. Padding stands behind, which a causal model does not see."""
    tokens = list(prompt)
    for _ in range(12):
        padded = np.array([tokens + [0] * (24 - len(tokens))], np.int32)
        tokens.append(int(jnp.argmax(forward(model, padded)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


@nnx.jit
def forward(model, tokens):
    return model(tokens)
