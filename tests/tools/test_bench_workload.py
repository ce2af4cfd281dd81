"""Workloads: equal for equal seeds, within their lengths, and the same after a round trip through a file."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distaff.tools.workload import KINDS, WorkloadSpec, load_workload, save_workload

RANGES = st.tuples(st.integers(1, 50), st.integers(0, 50)).map(lambda pair: (pair[0], sum(pair)))


def length(prompt):
    return len(prompt.split()) if isinstance(prompt, str) else len(prompt)


@given(st.sampled_from(KINDS), st.integers(1, 20), st.integers(), RANGES, RANGES, st.sampled_from([None, 17, 999]))
def test_lengths_and_token_ids_are_within_their_limits(kind, count, seed, inputs, outputs, vocab_size):
    spec = WorkloadSpec(
        kind=kind,
        num_prompts=count,
        seed=seed,
        input_len=inputs,
        output_len=outputs,
        prefix_len=7,
        vocab_size=vocab_size,
    )
    items = spec.make()
    assert items == spec.make() and len(items) == count
    extra = 7 if kind == "shared-prefix" else 0
    for item in items:
        low = inputs[1] if kind == "fixed" else inputs[0]
        assert low + extra <= length(item.prompt) <= inputs[1] + extra
        assert (outputs[1] if kind == "fixed" else outputs[0]) <= item.output_tokens <= outputs[1]
        if vocab_size is not None:
            assert all(16 <= token < vocab_size for token in item.prompt)


def test_the_default_is_64_mixed_requests():
    items = WorkloadSpec().make()
    assert len(items) == 64 and len({length(item.prompt) for item in items}) > 40
    assert items != WorkloadSpec(seed=1).make()


def test_prefixes_are_shared():
    items = WorkloadSpec(kind="shared-prefix", prefix_len=30).make()
    assert len({" ".join(item.prompt.split()[:30]) for item in items}) == 1
    assert len({item.prompt for item in items}) == 64


@pytest.mark.parametrize("vocab_size", [None, 500])
def test_a_file_gives_the_same_requests(tmp_path, vocab_size):
    items = WorkloadSpec(vocab_size=vocab_size).make()
    save_workload(tmp_path / "w.jsonl", items)
    assert load_workload(tmp_path / "w.jsonl") == items


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"prompt": "a"}', '{"prompt": 5, "output_tokens": 1}', '{"prompt": "a", "output_tokens": 0}'],
)
def test_damaged_files_are_refused(tmp_path, text):
    path = tmp_path / "w.jsonl"
    path.write_text(text + "\n" if text else "")
    with pytest.raises(ValueError, match=r"w\.jsonl"):
        load_workload(path)


@pytest.mark.parametrize(
    "wrong",
    [{"kind": "odd"}, {"input_len": (0, 5)}, {"output_len": (5, 4)}, {"num_prompts": 0}, {"vocab_size": 16}],
)
def test_impossible_specs_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        WorkloadSpec(**wrong)
