"""vLLM, from a Hugging Face folder."""

from __future__ import annotations

from typing import Any

from vllm import LLM, SamplingParams


class Engine:
    """``options`` are the settings of vLLM's ``LLM``."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        self._llm = LLM(model, skip_tokenizer_init=True, **options)

    def generate(self, prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
        """See `harness.Engine`."""
        params = [
            SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, detokenize=False) for count in counts
        ]
        wanted = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(output.outputs[0].token_ids) for output in self._llm.generate(wanted, params, use_tqdm=False)]
