"""The demo model for real: logits, tokenizer and chat template against transformers, and an answer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import reference_logits, relative_error
from tiny_gguf import reference_from_gguf

from distaff.frontend.loading import DownloadError, load_model
from distaff.frontend.loading.demo_model import DEMO_MODEL, find_demo_model
from distaff.runtime.tokenizer import Tokenizer

# As published in the model's config.json.
CONFIG = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_parameters=dict(rope_type="default", rope_theta=100000.0),
    tie_word_embeddings=True,
)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def loaded():
    try:
        find_demo_model()
    except DownloadError as error:
        pytest.skip(str(error))
    return load_model(DEMO_MODEL, progress=False)


@pytest.fixture(scope="module")
def tokenizer(loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    loaded.tokenizer.save(folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def their_tokenizer(loaded):
    transformers = pytest.importorskip("transformers")
    path = find_demo_model()
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def test_what_was_loaded(loaded):
    assert (loaded.name, loaded.architecture, loaded.max_model_len) == ("smollm2-135m", "llama", 8192)
    assert loaded.bos_token_id == 1 and loaded.eos_token_ids[0] == 2
    assert sum(leaf.size for leaf in jax.tree.leaves(loaded.params)) == 134_515_008


def test_logits_equal_those_of_transformers(loaded):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**CONFIG, attn_implementation="eager")
    reference = reference_from_gguf(find_demo_model(), config)
    tokens = np.random.default_rng().integers(0, 49152, (1, 48)).astype(np.int32)
    found = jax.jit(loaded.apply)(loaded.params, tokens)
    assert relative_error(found, reference_logits(reference, tokens)) < 1e-4


def test_it_knows_paris(loaded, tokenizer):
    """Greedy, token by token, by the plain forward pass on a padded prompt: what follows cannot matter."""
    tokens = tokenizer.encode(tokenizer.apply_chat_template(QUESTION), add_special_tokens=False)
    forward, start = jax.jit(loaded.apply), len(tokens)
    while len(tokens) < start + 16:
        padded = jnp.array([tokens + [0] * (start + 16 - len(tokens))])
        tokens.append(int(forward(loaded.params, padded)[0, len(tokens) - 1].argmax()))
        if tokens[-1] in loaded.eos_token_ids:
            break
    assert "Paris" in tokenizer.decode(tokens[start:], skip_special_tokens=True)


def test_chat_template_renders_as_in_transformers(tokenizer, their_tokenizer):
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi  <there> & \n ünïcode"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "12 + 7?"},
    ]
    for messages in (QUESTION, conversation):
        for prompt in (True, False):
            expected = their_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert tokenizer.apply_chat_template(messages, add_generation_prompt=prompt) == expected


@pytest.fixture(scope="module")
def published_splitting(their_tokenizer):
    """Transformers' tokenizer of the file, cut as the published tokenizer.json does: digits stand alone.

    transformers knows no splitting named "smollm" and falls back to GPT-2's, which joins digits to spaces.
    """
    import copy

    from tokenizers import pre_tokenizers

    backend = copy.deepcopy(their_tokenizer.backend_tokenizer)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return backend


# Control characters and the first bytes of unassigned planes, which the vocabulary lacks and so loses.
NOT_IN_VOCABULARY = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}

SNIPPETS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", " ", "  ", "\n", "\t", "'ll", "I'm", "the"]
SNIPPETS += [
    "\r\n",
    "3",
    "1984",
    " 3.14",
    "٣",
    "½",
    "中文",
    "🙂",
    "👩\u200d👧",
    "e\u0301",
    "été",
    "def f(x):\n    return x",
    "\r\n",
]


@settings(max_examples=400, deadline=None)
@given(text=st.text(max_size=60) | st.lists(st.sampled_from(SNIPPETS), max_size=12).map("".join))
def test_any_text_is_tokenised_as_by_transformers(text, tokenizer, published_splitting, their_tokenizer):
    found = list(tokenizer.encode(text, add_special_tokens=True))
    assert found == published_splitting.encode(text).ids
    if not any(char.isnumeric() for char in text):
        assert found == their_tokenizer.encode(text)
    for skip in (True, False):
        decoded = tokenizer.decode(found, skip_special_tokens=skip)
        assert decoded == their_tokenizer.decode(found, skip_special_tokens=skip)
    if not set(text.encode()) & NOT_IN_VOCABULARY:
        assert decoded == text


def test_digits_stand_alone(tokenizer):
    pieces = [tokenizer.decode([i], skip_special_tokens=False) for i in tokenizer.encode("in  1984", False)]
    assert pieces == ["in", "  ", "1", "9", "8", "4"]
