"""An engine without a model, for tests of the server: honours `AsyncEngine`'s contract and says what it is told to."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from distaff.runtime.errors import EngineDeadError, EngineOverloadedError, TokenizerError
from distaff.runtime.outputs import CompletionOutput, Logprob, RequestOutput
from distaff.runtime.sampling_params import RequestOutputKind, SamplingParams
from distaff.runtime.stats import FinishedStats, StepStats
from distaff.runtime.tokenizer import Tokenizer

MODEL = "fake"
EOS = 256
TEMPLATE = (
    "{% for t in tools or [] %}[tool {{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[call {{ c.function.arguments.x }}]{% endfor %}</s>{% endfor %}"
    "{% if style %}[{{ style }}]{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(generation_config: dict[str, object] | None = None) -> Tokenizer:
    """One token a byte, in byte order, then the end of sequence, ``</s>``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = {b: c for b, c in zip([*range(33, 127), *range(161, 173), *range(174, 256)], _visible(), strict=True)}
    rest = iter(sorted(c for c in alphabet if c not in names.values()))
    vocabulary = {names.get(b) or next(rest): b for b in range(256)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    config = {"eos_token": "</s>", "chat_template": TEMPLATE}
    return Tokenizer(backend, json.loads(json.dumps(config)), generation_config)


def _visible() -> list[str]:
    return [chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]]


class FakeEngine:
    """Answers every prompt with ``reply`` (repeated up to ``max_tokens`` if ``endless``), a byte a token.

    ``fails`` is raised instead of the first output, ``breaks_after`` ends each request with an error after so many
    tokens, ``gate`` (if set) holds every token back until it is set. ``running`` and ``aborted`` are request ids,
    ``calls`` the arguments of each call.
    """

    def __init__(self, reply: str = "Hello, wörld!", max_model_len: int = 128, has_tokenizer: bool = True) -> None:
        self.reply = reply
        self.endless = False
        self.fails: Exception | None = None
        self.breaks_after: int | None = None
        self.break_with: Exception | None = None
        self.delay = 0.0
        self.gate: asyncio.Event | None = None
        self.errored = False
        self.max_model_len = max_model_len
        self.manifest = SimpleNamespace(vocab_size=300, model="fake/model", has_tokenizer=has_tokenizer)
        self._tokenizer = byte_tokenizer({"temperature": 0.6, "top_k": 7, "max_length": 20})
        self.running: set[str] = set()
        self.aborted: list[str] = []
        self.calls: list[SimpleNamespace] = []
        self.shut_down = threading.Event()
        self.stat_loggers: list[object] = []
        self._stopping = False

    @property
    def tokenizer(self) -> Tokenizer:
        if not self.manifest.has_tokenizer:
            raise TokenizerError("this artifact has no tokenizer")
        return self._tokenizer

    def stats(self) -> StepStats:
        return StepStats(running=len(self.running), waiting=2, kv_usage=0.25)

    async def start(self) -> None:
        pass

    async def shutdown(self, timeout: float = 0.0) -> None:
        end = asyncio.get_running_loop().time() + timeout
        while self.running and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.01)
        self._stopping = True
        while self.running:
            await asyncio.sleep(0.01)
        self.shut_down.set()

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        prompt = list(prompt_token_ids)
        assert 0 < len(prompt) < self.max_model_len and max(prompt) < self.manifest.vocab_size
        params.check_model(self.manifest.vocab_size, 20)
        self.calls.append(
            SimpleNamespace(prompt=prompt, params=params, id=request_id, priority=priority, salt=cache_salt)
        )
        if self.fails is not None:
            raise self.fails
        assert request_id not in self.running
        self.running.add(request_id)
        finished = False
        try:
            async for output in self._outputs(prompt, params, request_id):
                finished = output.finished
                if finished:
                    self.running.discard(request_id)
                yield output
        finally:
            self.running.discard(request_id)
            if not finished:
                self.aborted.append(request_id)

    async def _outputs(
        self, prompt: list[int], params: SamplingParams, request_id: str
    ) -> AsyncIterator[RequestOutput]:
        tokens = list(self.reply.encode())
        while self.endless and len(tokens) < params.max_tokens:
            tokens += tokens
        ended = len(tokens) < params.max_tokens
        tokens = tokens[: params.max_tokens]
        prompt_logprobs = None
        if params.prompt_logprobs is not None:
            prompt_logprobs = [None, *(self._logprobs(t, params.prompt_logprobs) for t in prompt[1:])]
        done, pending = [], b""
        for i, token in enumerate(tokens):
            if self.delay:
                await asyncio.sleep(self.delay)
            if self.gate is not None:
                await self.gate.wait()
            if i == self.breaks_after and self.break_with is not None:
                raise self.break_with
            last = i == len(tokens) - 1 or self._stopping or i == self.breaks_after
            pending += bytes([token])
            text = pending.decode(errors="ignore") if not last else pending.decode(errors="replace")
            pending = pending[len(text.encode()) :] if not last else b""
            reason = ("stop" if ended else "length") if last else None
            if last and i < len(tokens) - 1:
                reason = "error" if i == self.breaks_after else "abort"
            done.append((text, token))
            if params.output_kind == RequestOutputKind.DELTA:
                new = done[-1:]
            elif last:
                new = done
            else:
                continue
            yield RequestOutput(
                request_id,
                None,
                prompt,
                prompt_logprobs,
                [
                    CompletionOutput(
                        n,
                        "".join(t for t, _ in new) if params.detokenize else "",
                        [t for _, t in new],
                        logprobs=None
                        if params.logprobs is None
                        else [self._logprobs(t, params.logprobs) for _, t in new],
                        finish_reason=reason,
                    )
                    for n in range(params.n)
                ],
                finished=reason is not None,
                num_cached_tokens=len(prompt) // 4,
                error="the model is unwell" if reason == "error" else None,
            )
            await asyncio.sleep(0)
            if last:
                self._measure(params, prompt, done, reason or "")
                return

    def _measure(self, params: SamplingParams, prompt: list[int], done: list[object], reason: str) -> None:
        for logger in self.stat_loggers:
            logger.on_first_token(0.02)
            logger.on_token_gap(0.01)
            logger.on_step(StepStats(prompt_tokens=len(prompt)))
            logger.on_finished(
                FinishedStats(reason, len(prompt), len(done), 0, 0.1, 0.2, 0.3, 0.6, 0.3, 0.01, params.n, 16)
            )

    def _logprobs(self, token: int, count: int) -> dict[int, Logprob]:
        """The token is the third most likely; the likeliest of all is "a"; the last has no chance at all."""
        best = [t for t in range(97, 110) if t != token]
        ranked = [best[0], best[1], token, *best[2:]]
        entries = {
            t: Logprob(-0.5 - i if i < 5 else float("-inf"), i + 1, self._tokenizer.token_text(t))
            for i, t in enumerate(ranked)
        }
        chosen = ranked[:count]
        return {t: entries[t] for t in [token, *(t for t in chosen if t != token)]}


def overloaded() -> EngineOverloadedError:
    return EngineOverloadedError(7, 3.2)


def dead() -> EngineDeadError:
    return EngineDeadError("the engine's loop died: RuntimeError: boom")
