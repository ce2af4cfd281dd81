"""profile-run counts what the steps of a run computed."""

from __future__ import annotations

from rich.console import Console
from tiny_step import tiny_step

from distaff.compiler.buckets import default_buckets
from distaff.compiler.lowering.build import ModelInfo, build_artifact
from distaff.runtime.engine import Engine
from distaff.tools.profile_run import RecordingRunner, run, table


def test_tokens_of_all_steps_are_those_of_the_requests(tmp_path):
    model = ModelInfo("tiny", max_model_len=32)
    build_artifact(tiny_step(), model, tmp_path / "tiny", buckets=default_buckets(2, 8), page_size=4, num_pages=40)
    runners = []

    def make_runner(*arguments, **settings):
        runners.append(RecordingRunner(*arguments, **settings))
        return runners[0]

    engine = Engine(tmp_path / "tiny", make_runner=make_runner)
    prompts, counts = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9], [7]], [3, 4, 2]
    steps, cached = run(engine, runners[0], prompts, counts)
    known = sum(map(len, prompts)) + sum(counts) - 3
    assert cached == 4 and sum(step.tokens for step in steps) == known - cached
    assert all(step.decodes <= step.tokens <= step.program.tokens for step in steps)
    assert all(0 < step.program_seconds < step.seconds for step in steps)
    console = Console(record=True, width=120)
    console.print(table("tiny", steps, cached, known))
    assert "18 tokens, 4 of them found in the prefix cache, 0 computed again" in console.export_text()
    engine.shutdown()
