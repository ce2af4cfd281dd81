"""How a request wants its tokens sampled: vLLM's parameters, with its names, defaults and limits.

The values are checked when the object is made, and once more against the served model (`SamplingParams.check_model`),
so nothing behind this module has to doubt them.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

# As in vLLM: temperatures below this mean greedy.
GREEDY_BELOW = 1e-5
MAX_N = 16384
MAX_LOGIT_BIAS = 100.0
_REFUSED = (
    "structured_outputs", "logits_processors", "logprob_token_ids", "thinking_token_budget", "repetition_detection",
)  # fmt: skip


class SamplingParamsError(ValueError):
    """A sampling parameter is invalid; ``parameter`` is its name."""

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(f"{parameter} {message}")
        self.parameter = parameter


class RequestOutputKind(enum.Enum):
    """What each output of a running request holds."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # what is new
    FINAL_ONLY = 2  # nothing until the end


@dataclasses.dataclass(kw_only=True)
class SamplingParams:
    """Parameters of a request. Assigned values are checked when a request is made of them, which keeps a copy.

    Sequences may be given as any sequence or None and are kept as tuples; ``stop`` may be one string. Raises
    `SamplingParamsError` with the parameter's name.
    """

    # How many completions of the prompt; greedy sampling gives only one.
    n: int = 1
    # -2..2: subtracted from logits of tokens generated so far: once, and once for each time.
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    # > 0: divides positive logits of tokens in prompt and output (1 = off).
    repetition_penalty: float = 1.0
    # 0..2; below 1e-5 is greedy, and top_p, top_k and min_p do nothing.
    temperature: float = 1.0
    # (0, 1]: smallest set of tokens with at least this much probability.
    top_p: float = 1.0
    # Most likely tokens to choose from; 0 or -1 is all.
    top_k: int = 0
    # [0, 1]: least probability of a token, relative to the most likely one.
    min_p: float = 0.0
    # A signed 64-bit number; None and -1 leave the choice to the engine.
    seed: int | None = None
    # Strings that end the output, which does not hold them unless include_stop_str_in_output.
    stop: Sequence[str] = ()
    # Tokens that end the output, besides the model's end of sequence.
    stop_token_ids: Sequence[int] = ()
    # Words that are not generated: the last token of one is masked where the output ends with its other tokens.
    bad_words: Sequence[str] = ()
    include_stop_str_in_output: bool = False
    # Go on after the model's end of sequence.
    ignore_eos: bool = False
    # Most tokens to generate; None is until the model's length.
    max_tokens: int | None = 16
    # Tokens to generate before any end token may be sampled.
    min_tokens: int = 0
    # Log-probabilities of this many most likely tokens, besides the sampled (or prompt) token; -1 is all tokens.
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    # Keep only the last tokens of the prompt; -1 is as many as the model takes. Whoever tokenises the prompt cuts it.
    truncate_prompt_tokens: int | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    # Added to logits; token ids may be numeric strings, values are limited to -100..100.
    logit_bias: Mapping[int, float] | None = None
    # The only tokens that may be sampled.
    allowed_token_ids: Sequence[int] | None = None
    # Kept for the caller, unused here.
    extra_args: Mapping[str, Any] | None = None
    # vLLM's, and refused unless None.
    structured_outputs: None = None
    logits_processors: None = None
    logprob_token_ids: None = None
    thinking_token_budget: None = None
    repetition_detection: None = None

    def __post_init__(self) -> None:
        self._normalise()
        self._check_numbers()
        self._check_strings()
        if self.is_greedy and self.n > 1:
            raise SamplingParamsError("n", f"is {self.n}, but greedy sampling (temperature 0) gives only one output")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingParamsError("min_tokens", f"is {self.min_tokens}, above max_tokens {self.max_tokens}")

    def clone(self) -> SamplingParams:
        """A copy, checked again."""
        return dataclasses.replace(self)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < GREEDY_BELOW

    def check_model(self, vocab_size: int, max_logprobs: int) -> None:
        """Raises `SamplingParamsError` for token ids outside the vocabulary and for too many log-probabilities."""
        for name, ids in (
            ("stop_token_ids", self.stop_token_ids),
            ("allowed_token_ids", self.allowed_token_ids or ()),
            ("logit_bias", self.logit_bias or ()),
        ):
            if outside := [token_id for token_id in ids if token_id >= vocab_size]:
                raise SamplingParamsError(name, f"holds {outside[:5]}, and the model has token ids below {vocab_size}")
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None and (vocab_size if count == -1 else count) > max_logprobs:
                raise SamplingParamsError(name, f"is {count}, and this engine gives at most {max_logprobs}")

    def _normalise(self) -> None:
        """Brings the accepted spellings of a value to one; the rest of the class sees only that."""
        self.stop = (self.stop,) if isinstance(self.stop, str) else _as_tuple("stop", self.stop)
        self.bad_words = _as_tuple("bad_words", self.bad_words)
        self.stop_token_ids = _as_token_ids("stop_token_ids", self.stop_token_ids)
        if self.allowed_token_ids is not None:
            allowed = _as_token_ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise SamplingParamsError("allowed_token_ids", "is empty: no token could be sampled")
            self.allowed_token_ids = allowed
        if self.logit_bias is not None:
            self.logit_bias = _as_logit_bias(self.logit_bias)
        if self.seed == -1:
            self.seed = None
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is True:
                setattr(self, name, 1)

    def _check_numbers(self) -> None:
        _check_int("n", self.n, 1, MAX_N)
        _check_float("presence_penalty", self.presence_penalty, -2, 2)
        _check_float("frequency_penalty", self.frequency_penalty, -2, 2)
        _check_float("repetition_penalty", self.repetition_penalty, 0, math.inf, low_open=True)
        _check_float("temperature", self.temperature, 0, 2)
        _check_float("top_p", self.top_p, 0, 1, low_open=True)
        _check_int("top_k", self.top_k, -1)
        _check_float("min_p", self.min_p, 0, 1)
        _check_int("min_tokens", self.min_tokens, 0)
        for name, low, high in (
            ("seed", -(2**63), 2**63 - 1),
            ("max_tokens", 1, None),
            ("logprobs", -1, None),
            ("prompt_logprobs", -1, None),
            ("truncate_prompt_tokens", -1, None),
        ):
            value = getattr(self, name)
            if value is not None:
                _check_int(name, value, low, high)
        if self.truncate_prompt_tokens == 0:
            raise SamplingParamsError("truncate_prompt_tokens", "is 0, which would leave no prompt")

    def _check_strings(self) -> None:
        for name in ("stop", "bad_words"):
            if not all(isinstance(text, str) and text for text in getattr(self, name)):
                raise SamplingParamsError(name, "must hold only non-empty strings")
        if self.stop and not self.detokenize:
            raise SamplingParamsError("stop", "needs the output's text, so it cannot go with detokenize=False")
        for name in _REFUSED:
            if getattr(self, name) is not None:
                raise SamplingParamsError(name, "is not supported")


def _check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise SamplingParamsError(name, f"must be a whole number, not {value!r}")
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"from {low} to {high}"
        raise SamplingParamsError(name, f"must be {limits}, not {value}")


def _check_float(name: str, value: object, low: float, high: float, low_open: bool = False) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
        raise SamplingParamsError(name, f"must be a finite number, not {value!r}")
    if not low <= value <= high or (low_open and value == low):
        above = f"above {low}" if low_open else f"at least {low}"
        raise SamplingParamsError(
            name, f"must be {above}{'' if high == math.inf else f' and at most {high}'}, not {value}"
        )


def _as_tuple(name: str, value: object) -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Collection):
        raise SamplingParamsError(name, f"must be a list, not {value!r}")
    return tuple(value)


def _as_token_ids(name: str, value: object) -> tuple[int, ...]:
    """Token ids without repetitions."""
    ids = _as_tuple(name, value)
    for token_id in ids:
        _check_int(name, token_id, 0)
    return tuple(dict.fromkeys(ids))


def _as_logit_bias(value: Mapping[Any, Any]) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise SamplingParamsError("logit_bias", f"must map token ids to numbers, not be {value!r}")
    biases = {}
    for key, bias in value.items():
        token_id = int(key) if isinstance(key, str) and key.isdecimal() else key
        _check_int("logit_bias", token_id, 0)
        _check_float("logit_bias", bias, -math.inf, math.inf)
        biases[token_id] = min(MAX_LOGIT_BIAS, max(-MAX_LOGIT_BIAS, float(bias)))
    return biases
