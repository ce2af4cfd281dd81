"""Hugging Face transformers with static batches: the requests as they come, padded on the left."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM


class Engine:
    """``options``: ``dtype``, ``threads``, ``batch_size``."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        torch.set_num_threads(options["threads"])
        self._batch_size = options["batch_size"]
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, options["dtype"])).eval()
        self._model.generation_config.eos_token_id = None  # every request gets all its tokens

    def generate(self, prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
        """See `harness.Engine`."""
        outputs: list[list[int]] = []
        for start in range(0, len(prompts), self._batch_size):
            batch = slice(start, start + self._batch_size)
            outputs += self._generate_batch(prompts[batch], counts[batch])
        return outputs

    def _generate_batch(self, prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
        """As many steps as the longest output needs; what others got beyond their count is thrown away."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            rows = self._model.generate(
                ids, attention_mask=mask, max_new_tokens=max(counts), do_sample=False, pad_token_id=0
            )
        return [row[width : width + count].tolist() for row, count in zip(rows, counts, strict=True)]
