"""distaff itself, from a compiled artifact."""

from __future__ import annotations

from typing import Any

from distaff.runtime import LLM, SamplingParams


class Engine:
    """``model`` is the artifact folder; ``options`` are the settings of `LLM`."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        self._llm = LLM(model, **options)

    def generate(self, prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
        """See `harness.Engine`."""
        params = [SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True) for count in counts]
        return [list(output.outputs[0].token_ids) for output in self._llm.generate(prompts, params, use_tqdm=False)]
