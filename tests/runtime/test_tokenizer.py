"""Reading Hugging Face tokenizer folders, special tokens, and chat templates."""

from __future__ import annotations

import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from distaff.runtime.errors import ChatTemplateError, TokenizerError
from distaff.runtime.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}\n{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = [
    "Hello world, this is a test of the tokenizer.",
    "naïve café 東京 привет 👋🏽 emoji",
    "for i in range(10):\n    print(i)",
]


def byte_level_backend():
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    backend.add_tokens([tokenizers.AddedToken("<tool call>", special=False)])
    return backend


def metaspace_backend():
    words = ["▁Hello", "▁wor", "ld", "▁", "H", "e", "l", "o", ",", "▁the", "re", "!", "<s>", "</s>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*words, *(f"<0x{b:02X}>" for b in range(256))])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def save(folder, backend, config=None, generation=None, template=None):
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config or {}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return Tokenizer.load(folder)


@pytest.mark.smoke
def test_round_trip_and_special_tokens(tmp_path):
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    tokenizer = save(tmp_path, byte_level_backend(), config, {"eos_token_id": [1, 3]})
    for text in CORPUS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.eos_token_ids) == (0, 1, (1, 3))
    assert tokenizer.special_token_ids == {0, 1, 2, 3}
    ids = tokenizer.encode("<s>hi</s>")
    assert tokenizer.decode(ids) == "hi" and tokenizer.decode(ids, skip_special_tokens=False) == "<s>hi</s>"
    assert tokenizer.token_string(tokenizer.vocab_size - 1) == "<tool call>"


def test_add_bos_token_decides_over_the_post_processor(tmp_path):
    plain = byte_level_backend()
    adding = byte_level_backend()
    adding.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    expected = plain.encode("hi").ids
    for backend, wanted, begins in [(plain, True, True), (plain, False, False), (plain, None, False)] + [
        (adding, True, True),
        (adding, False, False),
        (adding, None, True),
    ]:
        config = {"bos_token": "<s>"} | ({} if wanted is None else {"add_bos_token": wanted})
        tokenizer = save(tmp_path, backend, config)
        assert tokenizer.encode("hi") == ([0] if begins else []) + expected
        assert tokenizer.encode("hi", add_special_tokens=False) == expected


def test_token_bytes_join_to_the_text(tmp_path):
    tokenizer = save(tmp_path, byte_level_backend())
    for text in [*CORPUS, "a <tool call> b"]:
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
    assert tokenizer.token_bytes(10**6) == b"" and tokenizer.token_string(10**6) == ""


def test_sentencepiece_tokens_as_text(tmp_path):
    tokenizer = save(tmp_path, metaspace_backend())
    assert tokenizer.token_text(0) == " Hello"
    assert tokenizer.token_bytes(15 + 0xE4) == b"\xe4" and tokenizer.token_text(15 + 0xE4) == "\ufffd"


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)
    byte_level_backend().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TokenizerError, match="an object was expected"):
        Tokenizer.load(tmp_path)


MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, "}]


@pytest.mark.smoke
def test_chat_template_from_config_file_and_argument(tmp_path):
    tokenizer = save(tmp_path, byte_level_backend(), {"chat_template": CHATML, "eos_token": "</s>"})
    opened = "<|im_start|>user\nHi<|im_end|>\n"
    assert tokenizer.apply_chat_template(MESSAGES[:1]) == opened + "<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(MESSAGES[:1], add_generation_prompt=False) == opened
    template = "{{ messages[0].content }}{{ eos_token }}{{ colour }}"
    assert tokenizer.apply_chat_template(MESSAGES, chat_template=template, colour="red") == "Hi</s>red"
    assert save(tmp_path, byte_level_backend(), {"chat_template": CHATML}, template="over").has_chat_template
    assert Tokenizer.load(tmp_path).apply_chat_template(MESSAGES) == "over"


def test_continuing_the_final_message(tmp_path):
    tokenizer = save(tmp_path, byte_level_backend(), {"chat_template": CHATML})
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert tokenizer.apply_chat_template(MESSAGES, **options).endswith("<|im_start|>assistant\nWell, ")
    trimming = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
    assert tokenizer.apply_chat_template(MESSAGES, chat_template=trimming, **options) == "[Hi][Well,"
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    template = "{% for p in messages[0].content %}{{ p.text }}!{% endfor %}"
    assert tokenizer.apply_chat_template(parts, chat_template=template, **options) == "Hi"
    assert parts == [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    for messages, template, add, complaint in [
        (MESSAGES, CHATML, True, "only one"),
        ([], CHATML, False, "at least one message"),
        ([{"role": "user", "content": None}], CHATML, False, "text"),
        (MESSAGES, "nothing", False, "drops"),
    ]:
        with pytest.raises(ChatTemplateError, match=complaint):
            tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=add, continue_final_message=True
            )


def test_named_templates_choose_tools(tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | tojson }}"}]
    tokenizer = save(tmp_path, byte_level_backend(), {"chat_template": named})
    assert tokenizer.apply_chat_template(MESSAGES) == "plain"
    assert tokenizer.apply_chat_template(MESSAGES, tools=[{"a": "<é>"}]) == '[{"a": "<é>"}]'
    assert tokenizer.apply_chat_template(MESSAGES, chat_template="tool_use", tools=[]) == "[]"


def test_template_environment_is_as_in_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers")
    template = (
        "{%- for m in messages %}\n    {%- if m.role == 'skip' %}{% continue %}{% endif %}\n    {% generation %}\n"
        "{{ m | tojson(indent=2) }}\n{% endgeneration %}\n  {% set ns = namespace(n=loop.index) %}{{ ns.n }}\n"
        "{% endfor %}{{ strftime_now('%Y') }}{{ bos_token }}"
    )
    tokenizer = save(tmp_path, byte_level_backend(), {"chat_template": template, "bos_token": "<s>"})
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>")
    messages = [{"role": "user", "content": "<b> & é"}, {"role": "skip", "content": ""}, *MESSAGES]
    expected = reference.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=False) == expected


def test_chat_errors(tmp_path):
    tokenizer = save(tmp_path, byte_level_backend())
    with pytest.raises(ChatTemplateError, match="no chat template"):
        tokenizer.apply_chat_template(MESSAGES)
    for template, complaint in [
        ("{% if %}", "not valid Jinja"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "refused"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refused"),
    ]:
        with pytest.raises(ChatTemplateError, match=complaint):
            tokenizer.apply_chat_template(MESSAGES, chat_template=template)
