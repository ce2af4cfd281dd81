"""bench-offline on a tiny artifact."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from tiny_step import tiny_step

from distaff.compiler.buckets import default_buckets
from distaff.compiler.lowering.build import ModelInfo, build_artifact
from distaff.tools.bench_offline import main


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    model = ModelInfo("tiny", max_model_len=32)
    build_artifact(tiny_step(), model, folder, buckets=default_buckets(2, 8), page_size=4, num_pages=40)
    return folder


def test_a_benchmark_counts_and_writes(artifact, tmp_path):
    flags = ["--vocab-size", 32, "--num-prompts", 5, "--input-len", 3, 9, "--output-len", 4, 12]
    files = ["--json", tmp_path / "r.json", "--save-dataset", tmp_path / "w.jsonl"]
    result = CliRunner().invoke(main, list(map(str, [artifact, *flags, *files])))
    assert result.exit_code == 0, result.output
    measured = json.loads((tmp_path / "r.json").read_text())
    items = [json.loads(line) for line in (tmp_path / "w.jsonl").read_text().splitlines()]
    assert measured["requests"] == 5
    assert measured["output tokens"] == sum(item["output_tokens"] for item in items)
    assert measured["prompt tokens"] == sum(len(item["prompt"]) for item in items)
    assert 0 < measured["load [s]"] < measured["start to first token [s]"]
    assert measured["peak memory [MiB]"] > 50
    assert [len(measured["seconds"][name]) for name in ("TTFT", "TPOT", "E2E")] == [5, 5, 5]


def test_prompts_that_do_not_fit_are_one_line(artifact):
    result = CliRunner().invoke(main, [str(artifact), "--vocab-size", "32", "--input-len", "40", "50"])
    assert result.exit_code == 1 and "error: the prompt has" in result.output


def test_a_folder_that_is_no_model(tmp_path):
    result = CliRunner().invoke(main, [str(tmp_path)])
    assert result.exit_code == 1 and "error: " in result.output and "config.json" in result.output
