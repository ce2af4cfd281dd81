"""What the served model can do for a request: everything else is refused before anything has changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from distaff.runtime.errors import PromptError
from distaff.runtime.sampling_params import SamplingParams, SamplingParamsError


@dataclasses.dataclass(frozen=True)
class ModelLimits:
    """What requests are checked against; ``max_logprobs`` is the most top log-probabilities."""

    vocab_size: int
    max_model_len: int
    max_logprobs: int
    has_tokenizer: bool
    eos_token_ids: frozenset[int] = frozenset()

    def check_prompt(self, token_ids: Sequence[int], params: SamplingParams) -> list[int]:
        """The prompt, cut to its last ``truncate_prompt_tokens``; raises `PromptError` if it cannot be served."""
        prompt = list(token_ids)
        if params.truncate_prompt_tokens is not None:
            keep = params.truncate_prompt_tokens if params.truncate_prompt_tokens > 0 else self.max_model_len - 1
            prompt = prompt[-keep:]
        if not prompt:
            raise PromptError("the decoder prompt cannot be empty; send at least one token")
        if len(prompt) >= self.max_model_len:
            raise PromptError(
                f"the prompt has {len(prompt)} tokens, but this model serves at most {self.max_model_len} tokens, of "
                "which at least one must be left for the output; shorten the prompt or set truncate_prompt_tokens"
            )
        if min(prompt) < 0 or max(prompt) >= self.vocab_size:
            wrong = next(token_id for token_id in prompt if not 0 <= token_id < self.vocab_size)
            raise PromptError(f"token id {wrong} in the prompt is out of vocabulary (0 to {self.vocab_size - 1})")
        return prompt

    def check_params(self, params: SamplingParams) -> SamplingParams:
        """The parameters, where -1 log-probabilities are the whole vocabulary; raises `SamplingParamsError`."""
        params.check_model(self.vocab_size, self.max_logprobs)
        for name in ("stop", "bad_words"):
            if getattr(params, name) and not self.has_tokenizer:
                raise SamplingParamsError(name, "needs a tokenizer, and this artifact has none")
        ends = self.eos_token_ids.union(params.stop_token_ids)
        if params.min_tokens and params.allowed_token_ids is not None and ends.issuperset(params.allowed_token_ids):
            raise SamplingParamsError(
                "min_tokens", f"is {params.min_tokens}, but each of allowed_token_ids ends the output; allow one more"
            )
        return dataclasses.replace(
            params,
            logprobs=self.vocab_size if params.logprobs == -1 else params.logprobs,
            prompt_logprobs=self.vocab_size if params.prompt_logprobs == -1 else params.prompt_logprobs,
        )
