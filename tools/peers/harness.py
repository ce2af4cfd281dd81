"""Measures one engine: ``python harness.py JOB``, run by the engine's own interpreter, which need not have distaff.

The job names the engine's module beside this file, whose ``Engine(model, options)`` has
``generate(prompts, counts) -> outputs``: token ids to greedy token ids, exactly ``counts`` of them, of
all requests at once.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Protocol

KEPT_TOKENS = 16  # of each output, for the comparison of engines


class Engine(Protocol):
    """An engine with its model loaded."""

    def generate(self, prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
        """The greedy continuation of each prompt, ``counts[i]`` tokens long whatever they are."""


def timed(engine: Engine, prompts: list[list[int]], counts: list[int]) -> tuple[float, list[list[int]]]:
    """Seconds and outputs; raises `RuntimeError` unless all the tokens came."""
    began = time.perf_counter()
    outputs = engine.generate(prompts, counts)
    seconds = time.perf_counter() - began
    if [len(output) for output in outputs] != counts:
        raise RuntimeError(f"wanted {counts} tokens, got {[len(output) for output in outputs]}")
    return seconds, outputs


def measure(engine: Engine, job: dict[str, Any]) -> dict[str, Any]:
    """Times the job: the first token, one request alone, a long prompt, all requests together, and a shared prefix.

    The decode rate of the request alone is over its tokens after the first: the time of one token is taken off, and
    the rate is None if others on the machine made that the longer one. Everything timed follows an untimed run of its
    shapes with other prompts; no two prompts have a prefix in common but those that are to share one.
    """
    short, warm_up, other, alone = job["single_prompts"]
    timed(engine, [short], [1])
    first_token_at = time.time()
    timed(engine, [warm_up], [job["single_count"]])
    one_token, _ = timed(engine, [other], [1])
    all_tokens, _ = timed(engine, [alone], [job["single_count"]])
    decode_seconds = all_tokens - one_token
    long_seconds = [timed(engine, [prompt], [1])[0] for prompt in job["long_prompts"]]
    seconds, outputs = timed(engine, job["prompts"], job["counts"])
    return {
        "first_token_at": first_token_at,
        "decode_per_s": (job["single_count"] - 1) / decode_seconds if decode_seconds > 0 else None,
        "long_prompt_s": statistics.median(long_seconds[1:]),
        "seconds": seconds,
        "shared_prefix_s": [_shared(engine, prompts, job["shared_count"]) for prompts in job["shared_prompts"]][-1],
        "outputs": [output[:KEPT_TOKENS] for output in outputs],
    }


def _shared(engine: Engine, prompts: list[list[int]], count: int) -> float:
    return timed(engine, prompts, [count] * len(prompts))[0]


def main() -> None:
    """Reads the job, measures, writes the results where the job says."""
    job = json.loads(Path(sys.argv[1]).read_text())
    engine = importlib.import_module(job["driver"]).Engine(job["model"], job["options"])
    Path(job["result"]).write_text(json.dumps(measure(engine, job)))


if __name__ == "__main__":
    main()
