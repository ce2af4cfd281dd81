"""How a request wants its tokens sampled: vLLM's parameters, with its names, defaults and limits.

The values are checked when the object is made, and once more against the served model (`SamplingParams.check_model`),
so nothing behind this module has to doubt them.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

logger = logging.getLogger(__name__)

# As in vLLM: temperatures between 0 and this are raised to it, as dividing by less would overflow.
LEAST_TEMPERATURE = 0.01
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


class SamplingType(enum.IntEnum):
    """How the tokens of a request are chosen."""

    GREEDY = 0
    RANDOM = 1
    RANDOM_SEED = 2  # with the request's own seed


class RequestOutputKind(enum.Enum):
    """What each output of a running request holds."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # what is new
    FINAL_ONLY = 2  # nothing until the end


@dataclasses.dataclass(kw_only=True)
class SamplingParams:
    """Parameters of a request. Assigned values are checked when a request is made of them, which keeps a copy.

    Sequences may be given as any sequence or None and are kept as lists; ``stop`` may be one string. Greedy sampling
    sets top_p, top_k and min_p to what does nothing. Raises `SamplingParamsError` with the parameter's name.
    """

    # How many completions of the prompt; greedy sampling gives only one.
    n: int = 1
    # -2..2: subtracted from logits of tokens generated so far: once, and once for each time.
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    # > 0: divides positive logits of tokens in prompt and output (1 = off).
    repetition_penalty: float = 1.0
    # 0..2; 0 is greedy, and what lies between 0 and 0.01 becomes 0.01.
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
    stop: Sequence[str] = dataclasses.field(default_factory=list)
    # Tokens that end the output, besides the model's end of sequence.
    stop_token_ids: Sequence[int] = dataclasses.field(default_factory=list)
    # Words that are not generated: the last token of one is masked where the output ends with its other tokens.
    bad_words: Sequence[str] = dataclasses.field(default_factory=list)
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
            raise SamplingParamsError(
                "n", f"must be 1 when using greedy sampling, got {self.n}: temperature 0 gives only one output"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingParamsError(
                "min_tokens", f"must be less than or equal to max_tokens={self.max_tokens}, got {self.min_tokens}"
            )

    @classmethod
    def from_optional(cls, **values: Any) -> SamplingParams:
        """The parameters of ``values``, where None is a parameter's default (for ``max_tokens``: no limit)."""
        given = {name: value for name, value in values.items() if value is not None or name == "max_tokens"}
        return cls(**given)

    def clone(self) -> SamplingParams:
        """A copy, checked again."""
        return dataclasses.replace(self)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0

    @property
    def sampling_type(self) -> SamplingType:
        """Greedy, random, or random with a seed of its own."""
        if self.is_greedy:
            return SamplingType.GREEDY
        return SamplingType.RANDOM if self.seed is None else SamplingType.RANDOM_SEED

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
        self.stop = [self.stop] if isinstance(self.stop, str) else _as_list("stop", self.stop)
        self.bad_words = _as_list("bad_words", self.bad_words)
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
            if isinstance(getattr(self, name), bool):
                setattr(self, name, int(getattr(self, name)))

    def _check_numbers(self) -> None:
        check_int("n", self.n, 1, MAX_N)
        _check_float("presence_penalty", self.presence_penalty, -2, 2)
        _check_float("frequency_penalty", self.frequency_penalty, -2, 2)
        _check_float("repetition_penalty", self.repetition_penalty, 0, math.inf, low_open=True)
        _check_float("temperature", self.temperature, 0, 2)
        if 0 < self.temperature < LEAST_TEMPERATURE:
            logger.warning("temperature %s is raised to %s, the least above 0", self.temperature, LEAST_TEMPERATURE)
            self.temperature = LEAST_TEMPERATURE
        _check_float("top_p", self.top_p, 0, 1, low_open=True)
        check_int("top_k", self.top_k, -1)
        _check_float("min_p", self.min_p, 0, 1)
        check_int("min_tokens", self.min_tokens, 0)
        for name, low, high in (
            ("seed", -(2**63), 2**63 - 1),
            ("max_tokens", 1, None),
            ("logprobs", -1, None),
            ("prompt_logprobs", -1, None),
            ("truncate_prompt_tokens", -1, None),
        ):
            value = getattr(self, name)
            if value is not None:
                check_int(name, value, low, high)
        if self.is_greedy:
            self.top_p, self.top_k, self.min_p = 1.0, 0, 0.0
        if self.truncate_prompt_tokens == 0:
            raise SamplingParamsError("truncate_prompt_tokens", "is 0, which would leave no prompt")

    def _check_strings(self) -> None:
        for name in ("stop", "bad_words"):
            if not all(isinstance(text, str) and text for text in getattr(self, name)):
                raise SamplingParamsError(name, "must hold strings, and cannot contain an empty string")
        if self.stop and not self.detokenize:
            raise SamplingParamsError("stop", "strings are only supported when detokenize is True")
        for name in _REFUSED:
            if getattr(self, name) is not None:
                raise SamplingParamsError(name, "is not supported")


def check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raises `SamplingParamsError` unless ``value`` is an integer from ``low`` on, up to ``high`` if given."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise SamplingParamsError(name, f"must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        least = "non-negative" if low == 0 else f"at least {low}"
        raise SamplingParamsError(name, f"must be {least if high is None else f'in [{low}, {high}]'}, got {value}")


def _check_float(name: str, value: object, low: float, high: float, low_open: bool = False) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
        raise SamplingParamsError(name, f"must be a finite number, got {value!r}")
    if not low <= value <= high or (low_open and value == low):
        limits = f"in {'(' if low_open else '['}{low}, {high}]" if high < math.inf else f"greater than {low}"
        raise SamplingParamsError(name, f"must be {limits}, got {value}")


def _as_list(name: str, value: object) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Collection):
        raise SamplingParamsError(name, f"must be a list, got {value!r}")
    return list(value)


def _as_token_ids(name: str, value: object) -> list[int]:
    """Token ids without repetitions."""
    ids = _as_list(name, value)
    for token_id in ids:
        check_int(name, token_id, 0)
    return list(dict.fromkeys(ids))


def _as_logit_bias(value: Mapping[Any, Any]) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise SamplingParamsError("logit_bias", f"must map token ids to numbers, not be {value!r}")
    biases = {}
    for key, bias in value.items():
        token_id = int(key) if isinstance(key, str) and key.isdecimal() else key
        check_int("logit_bias", token_id, 0)
        _check_float("logit_bias", bias, -math.inf, math.inf)
        biases[token_id] = min(MAX_LOGIT_BIAS, max(-MAX_LOGIT_BIAS, float(bias)))
    return biases
