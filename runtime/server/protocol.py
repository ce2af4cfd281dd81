"""The bodies of requests: OpenAI's fields and vLLM's additions, under vLLM's names.

Ranges of sampling parameters are `SamplingParams`' to check; here stand types, what depends on several fields, and what
this server refuses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from distaff.runtime.sampling_params import RequestOutputKind, SamplingParams
from distaff.runtime.server.errors import bad_request
from distaff.runtime.server.fields import (
    INT64_MAX,
    array,
    boolean,
    integer,
    mapping,
    nested,
    number,
    one_of,
    optional,
    required,
    string,
    string_or_strings,
    text,
    unsupported,
)
from distaff.runtime.server.messages import message, template_variables, tool

MAX_COMPLETIONS = 1024  # prompts times n in one request

_NO_STRUCTURED_OUTPUT = "structured output is not available yet."
_NO_REASONING = "there is no parser for reasoning yet."
_NO_TRANSFER = "serving is not disaggregated yet."
_NO_MEDIA = "this model takes and gives text only."
_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """How a stream reports usage: in a last chunk, or in every chunk too."""

    include_usage: bool = optional(boolean, False)
    continuous_usage_stats: bool = optional(boolean, False)


def _response_format(value: Any, path: str) -> None:
    if mapping(value, path).get("type") != "text":
        raise bad_request(
            path, f"`{path}` may only be {{'type': 'text'}}: {_NO_STRUCTURED_OUTPUT}", "unsupported_parameter"
        )


def _logit_bias(value: Any, path: str) -> Mapping[int, float]:
    given = mapping(value, path)
    if wrong := [key[:40] for key in given if not (key.isascii() and key.isdecimal() and len(key) < 12)]:
        raise bad_request(path, f"`{path}` maps token ids to numbers; {', '.join(wrong[:20])} are no token ids.")
    return {int(key): number(entry, f"{path}.{key}") for key, entry in given.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What both generation endpoints take; the defaults of the five fields in ``_DEFAULTS`` may be the model's own."""

    model: str | None = optional(text)
    stream: bool = optional(boolean, False)
    stream_options: StreamOptions | None = optional(nested(StreamOptions))  # noqa: RUF009
    n: int = optional(integer(1, 128), 1)
    frequency_penalty: float = optional(number, 0.0)
    presence_penalty: float = optional(number, 0.0)
    repetition_penalty: float | None = optional(number)
    temperature: float | None = optional(number)
    top_p: float | None = optional(number)
    top_k: int | None = optional(integer())
    min_p: float | None = optional(number)
    seed: int | None = optional(integer())
    stop: Sequence[str] = optional(string_or_strings, ())
    stop_token_ids: Sequence[int] = optional(array(integer(0)), ())
    bad_words: Sequence[str] = optional(array(text), ())
    include_stop_str_in_output: bool = optional(boolean, False)
    ignore_eos: bool = optional(boolean, False)
    max_tokens: int | None = optional(integer())
    min_tokens: int = optional(integer(), 0)
    logit_bias: Mapping[int, float] | None = optional(_logit_bias)
    allowed_token_ids: Sequence[int] | None = optional(array(integer(0)))
    prompt_logprobs: int | None = optional(integer(-1))
    skip_special_tokens: bool = optional(boolean, True)
    spaces_between_special_tokens: bool = optional(boolean, True)
    truncate_prompt_tokens: int | None = optional(integer(-1))
    truncation_side: str = optional(one_of("left", "right"), "left")
    return_tokens_as_token_ids: bool | None = optional(boolean)
    return_token_ids: bool = optional(boolean, False)
    echo: bool = optional(boolean, False)
    priority: int = optional(integer(), 0)
    cache_salt: str | None = optional(string(1, 1024))
    request_id: str | None = optional(string(1, 128))
    user: str | None = optional(text)
    response_format: None = optional(_response_format)
    structured_outputs: None = optional(unsupported(_NO_STRUCTURED_OUTPUT))
    guided_json: None = optional(unsupported(_NO_STRUCTURED_OUTPUT))
    guided_regex: None = optional(unsupported(_NO_STRUCTURED_OUTPUT))
    guided_choice: None = optional(unsupported(_NO_STRUCTURED_OUTPUT))
    guided_grammar: None = optional(unsupported(_NO_STRUCTURED_OUTPUT))
    use_beam_search: None = optional(unsupported("set n for several samples.", False))
    length_penalty: None = optional(unsupported("there is no beam search; set n for several samples.", 1, 1.0))
    logprob_token_ids: None = optional(unsupported("ask for the most likely tokens."))
    thinking_token_budget: None = optional(unsupported(_NO_REASONING, -1))
    repetition_detection: None = optional(unsupported("use the penalties or stop strings."))
    kv_transfer_params: None = optional(unsupported(_NO_TRANSFER))
    ec_transfer_params: None = optional(unsupported(_NO_TRANSFER))
    mm_processor_kwargs: None = optional(unsupported(_NO_MEDIA))
    vllm_xargs: None = optional(unsupported("there are no extensions of sampling."))

    def __post_init__(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options", "`stream_options` needs `stream` to be true.")
        if self.prompt_logprobs is not None and self.stream:
            raise bad_request("prompt_logprobs", "`prompt_logprobs` are not available when `stream` is true.")
        if self.truncate_prompt_tokens == 0:
            raise bad_request("truncate_prompt_tokens", "`truncate_prompt_tokens` must be -1 or at least 1.")

    @property
    def sample_logprobs(self) -> int | None:
        """Candidates to report for each output token; 0 is the sampled token alone, None is no report."""
        raise NotImplementedError

    @property
    def requested_tokens(self) -> int | None:
        """How many tokens to generate at most; None stands for as many as fit."""
        return self.max_tokens

    @property
    def prompt_only(self) -> bool:
        """Whether the answer is the prompt itself: the engine generates one token that is not sent."""
        return False

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        """Candidates to report for each prompt token."""
        return self.prompt_logprobs

    def sampling_params(self, max_tokens: int, model_defaults: Mapping[str, Any], detokenize: bool) -> SamplingParams:
        """The engine's parameters; raises `SamplingParamsError` that names the parameter that is out of range.

        Where the request leaves one of ``_DEFAULTS`` open the model's recommendation stands, or else the engine's.
        """
        given = {name: getattr(self, name) for name in _DEFAULTS}
        open_ones = {name: model_defaults.get(name) for name, value in given.items() if value is None}
        chosen = {name: value for name, value in (given | open_ones).items() if value is not None}
        return SamplingParams(
            n=self.n,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            seed=self.seed,
            stop=list(self.stop),
            stop_token_ids=list(self.stop_token_ids),
            bad_words=list(self.bad_words),
            include_stop_str_in_output=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            logprobs=None if self.prompt_only else self.sample_logprobs,
            prompt_logprobs=self.wanted_prompt_logprobs,
            detokenize=detokenize,
            skip_special_tokens=self.skip_special_tokens,
            spaces_between_special_tokens=self.spaces_between_special_tokens,
            logit_bias=None if self.logit_bias is None else dict(self.logit_bias),
            allowed_token_ids=None if self.allowed_token_ids is None else list(self.allowed_token_ids),
            output_kind=RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY,
            **chosen,
        )


TokenIds = list[int]

# In vLLM's words, which clients look for.
NO_PROMPT = "Either prompt or prompt_embeds must be provided and non-empty."


def _token_ids(value: Any, path: str) -> TokenIds:
    if isinstance(value, list) and all(type(entry) is int and 0 <= entry <= INT64_MAX for entry in value):
        return value  # prompts may be long, and the check of each item costs more
    return array(integer(0))(value, path)  # type: ignore[no-any-return]


def _prompt(value: Any, path: str) -> Sequence[str | TokenIds]:
    """A text, some texts, token ids, or several prompts of token ids; as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if value == []:
        return ()
    if isinstance(value, list):
        if isinstance(value[0], str):
            return array(text)(value, path)  # type: ignore[no-any-return]
        if isinstance(value[0], list):
            return array(_token_ids)(value, path)  # type: ignore[no-any-return]
        return [_token_ids(value, path)]
    raise bad_request(path, f"`{path}` must be a string, or an array of strings, token ids or arrays of token ids.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``."""

    prompt: Sequence[str | TokenIds] = optional(_prompt, ())
    max_tokens: int = optional(integer(), 16)
    logprobs: int | None = optional(integer(-1))
    best_of: int | None = optional(integer(1))
    add_special_tokens: bool = optional(boolean, True)
    suffix: None = optional(unsupported("this model only continues its prompt.", ""))
    prompt_embeds: None = optional(unsupported("send text or token ids as `prompt`.", []))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompt:
            raise bad_request("prompt", NO_PROMPT)
        if self.best_of is not None and self.best_of != self.n:
            raise bad_request("best_of", "`best_of` is not supported beyond `n`; set `n` and choose among the results.")
        if len(self.prompt) * self.n > MAX_COMPLETIONS:
            raise bad_request("prompt", f"One request may ask for {MAX_COMPLETIONS} completions (prompts times `n`).")

    @property
    def sample_logprobs(self) -> int | None:
        """``logprobs`` as it is."""
        return self.logprobs

    @property
    def prompt_only(self) -> bool:
        """With ``echo`` and no tokens asked for."""
        return self.echo and self.max_tokens == 0

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        """With ``echo`` the prompt's tokens are reported like the output's."""
        return self.logprobs if self.echo and self.prompt_logprobs is None else self.prompt_logprobs


def _tool_choice(value: Any, path: str) -> str:
    if value != "none":
        raise bad_request(
            path, f"`{path}` may only be 'none': there is no parser for tool calls yet.", "unsupported_parameter"
        )
    return "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatPrompt:
    """How a conversation becomes a prompt; ``messages`` come out in the form that templates take."""

    messages: Sequence[dict[str, Any]] | None = optional(array(message, 1))
    tools: Sequence[dict[str, Any]] | None = optional(array(tool, 1))
    add_generation_prompt: bool | None = optional(boolean)
    continue_final_message: bool = optional(boolean, False)
    chat_template: str | None = optional(text)
    chat_template_kwargs: Mapping[str, Any] | None = optional(template_variables)
    documents: Sequence[dict[str, Any]] | None = optional(array(mapping))
    reasoning_effort: str | None = optional(text)

    def __post_init__(self) -> None:
        if self.continue_final_message and self.add_generation_prompt:
            raise bad_request(
                "continue_final_message", "Set only one of `continue_final_message` and `add_generation_prompt`."
            )

    @property
    def opens_answer(self) -> bool:
        """Whether the prompt ends with the start of a new message (``add_generation_prompt`` or its default)."""
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """Further variables for the template."""
        named = {"documents": self.documents, "reasoning_effort": self.reasoning_effort}
        return {k: v for k, v in named.items() if v is not None} | dict(self.chat_template_kwargs or {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatCompletionRequest(ChatPrompt, GenerationRequest):
    """``POST /v1/chat/completions``."""

    messages: Sequence[dict[str, Any]] = required(array(message, 1))
    max_completion_tokens: int | None = optional(integer())
    logprobs: bool = optional(boolean, False)
    top_logprobs: int | None = optional(integer(-1))
    add_special_tokens: bool = optional(boolean, False)
    tool_choice: str | None = optional(_tool_choice)
    functions: None = optional(unsupported("there is no parser for tool calls yet.", []))
    function_call: None = optional(unsupported("there is no parser for tool calls yet.", "none"))
    modalities: None = optional(unsupported(_NO_MEDIA, ["text"]))
    audio: None = optional(unsupported(_NO_MEDIA))
    media_io_kwargs: None = optional(unsupported(_NO_MEDIA))
    web_search_options: None = optional(unsupported("this server searches nothing."))

    def __post_init__(self) -> None:
        ChatPrompt.__post_init__(self)
        GenerationRequest.__post_init__(self)
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs", "`top_logprobs` needs `logprobs` to be true.")
        if self.tools is not None and self.tool_choice is None:
            _tool_choice("auto", "tool_choice")  # OpenAI's default when there are tools

    @property
    def sample_logprobs(self) -> int | None:
        """``top_logprobs`` if ``logprobs`` is on."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def requested_tokens(self) -> int | None:
        """``max_tokens`` is the old name of ``max_completion_tokens``."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizeRequest(ChatPrompt):
    """``POST /tokenize``: a text, or a conversation. Special tokens are added to texts unless asked otherwise."""

    model: str | None = optional(text)
    prompt: str | None = optional(text)
    add_special_tokens: bool | None = optional(boolean)
    return_token_strs: bool = optional(boolean, False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.prompt is None) == (self.messages is None):
            raise bad_request("prompt", "Give one of `prompt` and `messages`.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetokenizeRequest:
    """``POST /detokenize``."""

    model: str | None = optional(text)
    tokens: Sequence[int] = required(_token_ids)
