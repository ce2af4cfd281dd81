"""Beam search over a `generate` call, which gives one more token to every beam of every prompt at a time.

Names and scores are vLLM's: beams are ranked by their summed log-probability over their length (prompt included, a last
end token not) to the power of ``length_penalty``. Prefix caching makes a beam cost little more than its new token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

from distaff.runtime.outputs import PositionLogprobs, RequestOutput, SampleLogprobs
from distaff.runtime.sampling_params import MAX_N, SamplingParams, check_int

# Prompts as `LLM.generate` takes them.
Prompts: TypeAlias = Sequence[Mapping[str, Any]]
Generate: TypeAlias = Callable[[Prompts, SamplingParams], list[RequestOutput]]


@dataclasses.dataclass(kw_only=True)
class BeamSearchParams:
    """What to search: ``beam_width`` sequences of up to ``max_tokens`` new tokens.

    Raises `SamplingParamsError` with the parameter's name.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    # Of the random draw that may add a token to the most likely ones; 0 draws none.
    temperature: float = 0.0
    # Above 1 favours long sequences, as log-probabilities are negative.
    length_penalty: float = 1.0
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        check_int("beam_width", self.beam_width, 1, MAX_N)
        check_int("max_tokens", self.max_tokens, 1)
        self.step()  # checks the temperature

    def step(self) -> SamplingParams:
        """How the next token of each beam is asked for: as transformers does, with twice as many candidates."""
        return SamplingParams(
            max_tokens=1, temperature=self.temperature, logprobs=2 * self.beam_width, detokenize=False, ignore_eos=True
        )


@dataclasses.dataclass
class BeamSearchSequence:
    """One beam: ``tokens`` begin with the prompt and hold the end token; ``logprobs`` has one entry a new token."""

    tokens: list[int]
    logprobs: SampleLogprobs
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def with_token(self, token_id: int, candidates: PositionLogprobs) -> BeamSearchSequence:
        """This beam, longer by one of the candidates."""
        total = self.cum_logprob + candidates[token_id].logprob
        return BeamSearchSequence([*self.tokens, token_id], [*self.logprobs, candidates], total)

    def score(self, end_tokens: Collection[int], length_penalty: float) -> float:
        """What beams are ranked by; higher is better."""
        length = len(self.tokens) - (self.tokens[-1] in end_tokens)
        return self.cum_logprob / math.pow(max(length, 1), length_penalty)


@dataclasses.dataclass
class BeamSearchOutput:
    """The best sequences of one prompt, the best first."""

    sequences: list[BeamSearchSequence]


def beam_search(
    generate: Generate, prompts: Prompts, params: BeamSearchParams, end_tokens: Collection[int]
) -> list[BeamSearchOutput]:
    """Searches for all prompts (with ``prompt_token_ids``) side by side: a token of every live beam at a time."""
    searches = [_Search(prompt["prompt_token_ids"], params, end_tokens) for prompt in prompts]
    step = params.step()
    for _ in range(params.max_tokens):
        beams = [
            {**prompt, "prompt_token_ids": beam.tokens}
            for prompt, search in zip(prompts, searches, strict=True)
            for beam in search.beams
        ]
        if not beams:
            break
        outputs = iter(generate(beams, step))
        for search in searches:
            search.advance([next(outputs) for _ in search.beams])
    return [search.result() for search in searches]


class _Search:
    """The beams of one prompt, and those that ended."""

    def __init__(self, prompt: Sequence[int], params: BeamSearchParams, end_tokens: Collection[int]):
        self._params = params
        self._end_tokens = end_tokens
        self.beams = [BeamSearchSequence(list(prompt), [])]
        self._completed: list[BeamSearchSequence] = []

    def advance(self, outputs: Sequence[RequestOutput]) -> None:
        """Replaces the beams by the best of their continuations."""
        going: list[BeamSearchSequence] = []
        for beam, output in zip(self.beams, outputs, strict=True):
            for candidates in output.outputs[0].logprobs or []:
                for token_id in candidates:
                    longer = beam.with_token(token_id, candidates)
                    if token_id in self._end_tokens and not self._params.ignore_eos:
                        longer.finish_reason, longer.stop_reason = "stop", token_id
                        self._completed.append(longer)
                    else:
                        going.append(longer)
        self.beams = self._best(going)

    def result(self) -> BeamSearchOutput:
        """The best of the beams that ended and of those that did not."""
        for beam in self.beams:
            beam.finish_reason = "length"
        return BeamSearchOutput(self._best(self._completed + self.beams))

    def _best(self, beams: list[BeamSearchSequence]) -> list[BeamSearchSequence]:
        def score(beam: BeamSearchSequence) -> float:
            return beam.score(self._end_tokens, self._params.length_penalty)

        return sorted(beams, key=score, reverse=True)[: self._params.beam_width]
