"""Offline inference: a list of prompts in, their outputs in the same order back; calls and names as vLLM's `LLM`."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NotRequired, TypeAlias, TypedDict, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from distaff.compiler.artifact import MANIFEST, ArtifactError
from distaff.runtime.beam_search import BeamSearchOutput, BeamSearchParams, beam_search
from distaff.runtime.chat_template import Message
from distaff.runtime.config import EngineConfig
from distaff.runtime.engine import Engine
from distaff.runtime.errors import EngineConfigError, PromptError
from distaff.runtime.outputs import RequestOutput
from distaff.runtime.sampling_params import RequestOutputKind, SamplingParams, SamplingParamsError
from distaff.runtime.tokenizer import Tokenizer
from distaff.runtime.vllm_arguments import without_neutral

COMPILE_ON_DEMAND = "distaff.compile_on_demand"


class TextPrompt(TypedDict):
    """A prompt of text; prompts with equal ``cache_salt`` share the prefix cache."""

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt of token ids; ``prompt`` is their text, where it is known."""

    prompt_token_ids: Sequence[int]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


Prompt: TypeAlias = str | Sequence[int] | TextPrompt | TokensPrompt | Mapping[str, Any]
_PROMPT_KEYS = frozenset(TextPrompt.__annotations__) | frozenset(TokensPrompt.__annotations__)
# Names in generation_config.json and the sampling parameters that they set.
_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


class LLM:
    """A model, ready to generate.

    ``model`` is an artifact folder. Anything else (a checkpoint folder, a GGUF file, a name) is compiled first, if
    distaff's tools are installed; ``dtype``, ``quantization`` (as ``compile-model --quantize``), ``block_size`` (tokens
    a page) and ``others``, compile options, are for that, and an artifact that was compiled differently is refused.
    Of ``others`` those that vLLM has and distaff needs not (``enforce_eager``, …) are taken where they ask for nothing.
    ``tokenizer`` is a folder whose tokenizer replaces the artifact's. ``num_gpu_blocks_override`` is the number of
    pages, whatever the device. The other settings are those of `EngineConfig`. Raises `ArtifactError` if there is
    nothing that can be served, `EngineConfigError` otherwise.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | Path | None = None,
        dtype: str = "auto",
        quantization: str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        block_size: int | None = None,
        enable_prefix_caching: bool = True,
        enable_chunked_prefill: bool = True,
        scheduling_policy: str = "fcfs",
        seed: int = 0,
        num_gpu_blocks_override: int | None = None,
        kv_cache_memory_bytes: int | None = None,
        gpu_memory_utilization: float | None = None,
        max_logprobs: int = 20,
        **others: Any,
    ) -> None:
        compile_options = without_neutral(others)
        wanted = {"dtype": None if dtype == "auto" else dtype, "page_size": block_size}
        is_artifact = (Path(model) / MANIFEST).is_file()
        if is_artifact and quantization is not None:
            raise EngineConfigError(f"quantization is for a model that is compiled; {model} is an artifact already")
        if is_artifact and compile_options:
            names = ", ".join(compile_options)
            raise EngineConfigError(f"{names}: LLM has no such setting for an artifact, and {model} is one")
        folder = _artifact_for(
            model,
            {
                **wanted,
                "quantize": quantization,
                "max_model_len": max_model_len,
                "max_batch": max_num_seqs,
                "max_step_tokens": max_num_batched_tokens,
                **compile_options,
            },
        )
        config = EngineConfig(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            num_pages=num_gpu_blocks_override,
            kv_cache_bytes=kv_cache_memory_bytes,
            gpu_memory_utilization=gpu_memory_utilization,
            enable_prefix_caching=enable_prefix_caching,
            enable_chunked_prefill=enable_chunked_prefill,
            scheduling_policy=scheduling_policy,
            seed=seed,
            max_logprobs=max_logprobs,
            progress=True,
        )
        self.engine = Engine(folder, config, tokenizer=None if tokenizer is None else Tokenizer.load(tokenizer))
        if is_artifact:
            _check_compiled_with(self.engine, wanted)
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Completes the prompts; outputs come in their order.

        ``sampling_params`` is one for all or one for each prompt (None: the model's defaults); ``use_tqdm`` shows a
        bar on standard error. Raises, before anything runs, what `Engine.add_request` raises, and `EngineConfigError`
        for a ``lora_request``.
        """
        if lora_request is not None:
            raise EngineConfigError("lora_request is not supported: adapters are not available yet")
        wanted = _as_list(prompts)
        chosen = self.get_default_sampling_params() if sampling_params is None else sampling_params
        params = _one_for_each("sampling_params", chosen, len(wanted))
        priorities = _one_for_each("priority", 0 if priority is None else priority, len(wanted))
        ids: list[str] = []
        texts: dict[str, str | None] = {}
        try:
            for prompt, own_params, own_priority in zip(wanted, params, priorities, strict=True):
                text, token_ids, salt = self._read(prompt)
                if own_params.truncate_prompt_tokens is not None:
                    token_ids = self._truncated(token_ids, own_params.truncate_prompt_tokens)
                request_id = str(next(self._ids))
                final = dataclasses.replace(own_params, output_kind=RequestOutputKind.FINAL_ONLY)
                self.engine.add_request(request_id, token_ids, final, priority=own_priority, cache_salt=salt)
                ids.append(request_id)
                texts[request_id] = text
            outputs = self._run(len(ids), use_tqdm)
        finally:
            self.engine.abort(ids)  # what an error or an interrupt left behind
        for output in outputs.values():
            output.prompt = texts[output.request_id]
        return [outputs[request_id] for request_id in ids]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or several, rendered with the chat template; else as `generate`."""
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations = cast(Sequence[Sequence[Message]], messages if several else [messages])
        tokenizer = self.get_tokenizer()
        prompts: list[Prompt] = []
        for conversation in conversations:
            text = tokenizer.apply_chat_template(
                conversation,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template=chat_template,
                **(chat_template_kwargs or {}),
            )
            # The template has put in what special tokens the model wants.
            prompts.append({"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)})
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, lora_request=lora_request)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        lora_request: None = None,
        use_tqdm: bool = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """The best ``params.beam_width`` continuations of each prompt, the best first; tokens and text hold the prompt.

        ``concurrency_limit`` is how many prompts are searched at the same time. Raises, before anything runs,
        `SamplingParamsError` if the engine gives too few log-probabilities for so many beams, and `PromptError` if a
        prompt with its new tokens would be longer than the model takes.
        """
        candidates, limit = 2 * params.beam_width, self.engine.config.top_logprobs(self.engine.manifest)
        if candidates > limit:
            raise SamplingParamsError("beam_width", f"{params.beam_width} needs max_logprobs={candidates}, not {limit}")
        given: list[Mapping[str, Any]] = []
        for prompt in _as_list(prompts):
            text, token_ids, salt = self._read(prompt)
            if len(token_ids) + params.max_tokens > self.engine.max_model_len:
                raise PromptError(
                    f"the prompt has {len(token_ids)} tokens, which with max_tokens={params.max_tokens} is more than "
                    f"the model's length of {self.engine.max_model_len}"
                )
            given.append({"prompt": text, "prompt_token_ids": token_ids, "cache_salt": salt})
        at_once = concurrency_limit or max(1, len(given))
        generate = functools.partial(self.generate, use_tqdm=False, lora_request=lora_request)
        outputs: list[BeamSearchOutput] = []
        with _progress_bar(len(given), use_tqdm) as advance:
            for first in range(0, len(given), at_once):
                chosen = given[first : first + at_once]
                outputs += beam_search(generate, chosen, params, self.engine.eos_token_ids)
                advance(len(chosen))
        for sequence in (sequence for output in outputs for sequence in output.sequences):
            sequence.text = self.get_tokenizer().decode(sequence.tokens, params.skip_special_tokens)
        return outputs

    def reset_prefix_cache(self) -> bool:
        """Forgets cached prompts; False, and nothing changes, while pages are in use."""
        return self.engine.reset_prefix_cache()

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer in use; raises `TokenizerError` if there is none."""
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's authors recommend in ``generation_config.json``, else the plain defaults."""
        recommended = self.engine.generation_config
        given = {ours: recommended[theirs] for theirs, ours in _DEFAULTS.items() if recommended.get(theirs) is not None}
        return SamplingParams(**given)

    def _read(self, prompt: Prompt) -> tuple[str | None, Sequence[int], str | None]:
        """Text (if known), token ids and cache salt of a prompt."""
        if isinstance(prompt, str):
            prompt = {"prompt": prompt}
        if not isinstance(prompt, Mapping):
            return None, prompt, None
        given = cast(Mapping[str, Any], prompt)
        if unknown := [key for key, value in given.items() if key not in _PROMPT_KEYS and value is not None]:
            raise PromptError(
                f"a prompt holds {', '.join(unknown)}, but this model takes only {', '.join(sorted(_PROMPT_KEYS))}"
            )
        text, token_ids = given.get("prompt"), given.get("prompt_token_ids")
        if token_ids is None:
            if not isinstance(text, str):
                raise PromptError('a prompt needs "prompt" (text) or "prompt_token_ids"')
            token_ids = self.get_tokenizer().encode(text)
        return text, token_ids, given.get("cache_salt")

    def _truncated(self, token_ids: Sequence[int], keep: int) -> Sequence[int]:
        """The last ``keep`` tokens; -1 keeps as many as leave room for one more."""
        return token_ids[-(keep if keep > 0 else self.engine.max_model_len - 1) :]

    def _run(self, count: int, show: bool) -> dict[str, RequestOutput]:
        """Steps until all requests are done."""
        outputs: dict[str, RequestOutput] = {}
        with _progress_bar(count, show) as advance:
            while self.engine.has_unfinished:
                for output in self.engine.step():
                    outputs[output.request_id] = output
                    advance()
        return outputs


def _artifact_for(model: str | Path, options: Mapping[str, Any]) -> Path:
    """The artifact folder of ``model``, which is compiled if it is something else."""
    if (Path(model) / MANIFEST).is_file():
        return Path(model)
    compilers = list(importlib.metadata.entry_points(group=COMPILE_ON_DEMAND))
    if not compilers:
        raise ArtifactError(f"{model} is not an artifact; make one with: compile-model {model}")
    compile_model = compilers[0].load()
    return Path(compile_model(model, **{name: value for name, value in options.items() if value is not None}))


def _check_compiled_with(engine: Engine, options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        compiled = getattr(engine.manifest, name)
        if value is not None and value != compiled:
            engine.shutdown()
            raise EngineConfigError(
                f"{name} {value} is wanted, but the artifact was compiled with {compiled}; leave it out, or compile "
                "the model again"
            )


def _as_list(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    if isinstance(prompts, str | Mapping) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [cast(Prompt, prompts)]
    return cast(Sequence[Prompt], prompts)


def _one_for_each(name: str, given: Any, count: int) -> Sequence[Any]:
    if not isinstance(given, Sequence):
        return [given] * count
    if len(given) != count:
        raise ValueError(f"{name} has {len(given)} entries for {count} prompts; give one, or one for each")
    return given


@contextmanager
def _progress_bar(count: int, show: bool) -> Iterator[Any]:
    """Gives a function that advances the bar by one prompt, or several."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), disable=not show
    ) as progress:
        task = progress.add_task("Generating", total=count)
        yield lambda count=1: progress.advance(task, count)
