"""The two generation endpoints and the two that only use the tokenizer."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from distaff.runtime.server.answer import Answer
from distaff.runtime.server.chat import ChatAnswer
from distaff.runtime.server.completions import CompletionAnswer
from distaff.runtime.server.config import EngineClient, ServerConfig
from distaff.runtime.server.connection import EventStream, check_json_type, read_body, while_connected
from distaff.runtime.server.errors import bad_request, no_such_model
from distaff.runtime.server.fields import parse, parse_json
from distaff.runtime.server.logprobs import TokenNames
from distaff.runtime.server.output_stream import OutputStream
from distaff.runtime.server.prompts import Prompt, PromptProcessor
from distaff.runtime.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
)

logger = logging.getLogger(__name__)


class Generation:
    """Serves requests with one engine."""

    def __init__(self, engine: EngineClient, config: ServerConfig) -> None:
        self._engine = engine
        self._config = config
        self._prompts = PromptProcessor(engine, config)

    async def completions(self, http: Request) -> Response:
        """``POST /v1/completions``."""
        return await self._connected(http, self._complete)

    async def chat_completions(self, http: Request) -> Response:
        """``POST /v1/chat/completions``."""
        return await self._connected(http, self._chat)

    async def invocations(self, http: Request) -> Response:
        """``POST /invocations``, SageMaker's one path: a chat or a completion, whichever the body is."""
        return await self._connected(http, self._invoke)

    async def tokenizer_info(self, http: Request) -> Response:
        """``GET /tokenizer_info``: what the tokenizer's files say, and the chat template in use."""
        tokenizer = self._prompts.tokenizer_for("tokenizer")
        template = self._config.chat_template or tokenizer.chat_template
        return JSONResponse(tokenizer.info() | {"chat_template": template})

    async def tokenize(self, http: Request) -> Response:
        """``POST /tokenize``."""
        return await self._connected(http, self._tokenize)

    async def detokenize(self, http: Request) -> Response:
        """``POST /detokenize``."""
        return await self._connected(http, self._detokenize)

    async def _connected(
        self, http: Request, respond: Callable[[Request, Any], Coroutine[Any, Any, Response]]
    ) -> Response:
        """What ``respond`` makes of the body, unless the client goes away first."""
        check_json_type(http.headers.get("content-type"))
        body = parse_json(await read_body(http, self._config.max_body_bytes))
        return await while_connected(http.receive, respond(http, body))

    async def _invoke(self, http: Request, body: Any) -> Response:
        chat = isinstance(body, dict) and body.get("messages") is not None
        return await (self._chat if chat else self._complete)(http, body)

    async def _complete(self, http: Request, body: Any) -> Response:
        request = parse(CompletionRequest, body)
        model = self._check(request)
        prompts = []
        for given in request.prompt:
            text = given if isinstance(given, str) else None
            ids = given if not isinstance(given, str) else await self._prompts.encode(given, request.add_special_tokens)
            prompts.append(self._prompts.fitted(request, ids, text))
        texts = [self._echoed(request, prompt) if request.echo else "" for prompt in prompts]
        answer_id = _answer_id("cmpl", http, request)
        answer = CompletionAnswer(request, answer_id, model, self._names(request), self._config, texts)
        return await self._respond(request, prompts, answer_id, answer)

    async def _chat(self, http: Request, body: Any) -> Response:
        request = parse(ChatCompletionRequest, body)
        model = self._check(request)
        text = await self._prompts.chat_text(request)
        ids = await self._prompts.encode(text, request.add_special_tokens, "messages")
        prompt = self._prompts.fitted(request, ids, text)
        answer_id = _answer_id("chatcmpl", http, request)
        answer = ChatAnswer(request, answer_id, model, self._names(request), self._config)
        return await self._respond(request, [prompt], answer_id, answer)

    async def _respond(
        self, request: GenerationRequest, prompts: Sequence[Prompt], answer_id: str, answer: Answer[Any]
    ) -> Response:
        sources = []
        for i, prompt in enumerate(prompts):
            params = request.sampling_params(
                prompt.max_tokens, self._prompts.model_defaults, self._prompts.tokenizer is not None
            )
            # Clients may repeat their ids; the engine's must differ.
            engine_id = f"{answer_id}-{i}-{uuid.uuid4().hex[:8]}"
            if self._config.enable_log_requests:
                logger.info("request %s: %d prompt tokens, %s", engine_id, len(prompt.token_ids), params)
            sources.append(
                self._engine.generate(
                    prompt.token_ids,
                    params,
                    engine_id,
                    priority=request.priority,
                    cache_salt=request.cache_salt,
                )
            )
        outputs = OutputStream(sources)
        if not request.stream:
            return JSONResponse(answer.response(await outputs.final(len(prompts))))
        await outputs.start()
        return EventStream(answer.chunks(outputs), outputs)

    def _model(self, name: str | None) -> str:
        """The name to answer with, the first; 404 for a model that is not served here. No name stands for that one."""
        if name and name not in self._config.served_model_names:
            raise no_such_model(name)
        return self._config.served_model_names[0]

    def _check(self, request: GenerationRequest) -> str:
        model = self._model(request.model)
        if request.priority and not self._config.priority_scheduling:
            raise bad_request("priority", "`priority` needs a server that runs with --scheduling-policy priority.")
        return model

    def _names(self, request: GenerationRequest) -> TokenNames:
        as_ids = request.return_tokens_as_token_ids
        return TokenNames(
            self._prompts.tokenizer, self._config.return_tokens_as_token_ids if as_ids is None else as_ids
        )

    def _echoed(self, request: CompletionRequest, prompt: Prompt) -> str:
        if prompt.text is not None:
            return prompt.text
        if self._prompts.tokenizer is None and request.return_token_ids:
            return ""  # the prompt goes back as token ids
        return self._prompts.tokenizer_for("echo").decode(prompt.token_ids, skip_special_tokens=False)

    async def _tokenize(self, http: Request, body: Any) -> Response:
        request = parse(TokenizeRequest, body)
        self._model(request.model)
        chat = request.prompt is None
        text = await self._prompts.chat_text(request) if request.prompt is None else request.prompt
        special = not chat if request.add_special_tokens is None else request.add_special_tokens
        ids = await self._prompts.encode(text, special, "messages" if chat else "prompt")
        names = self._prompts.tokenizer_for("prompt")
        strings = [names.token_string(token_id) for token_id in ids] if request.return_token_strs else None
        return JSONResponse(
            {"count": len(ids), "max_model_len": self._engine.max_model_len, "tokens": ids, "token_strs": strings}
        )

    async def _detokenize(self, http: Request, body: Any) -> Response:
        request = parse(DetokenizeRequest, body)
        self._model(request.model)
        size = self._engine.manifest.vocab_size
        if request.tokens and max(request.tokens) >= size:
            raise bad_request("tokens", f"Token id {max(request.tokens)} is out of vocabulary ({size} tokens).")
        return JSONResponse({"prompt": self._prompts.tokenizer_for("tokens").decode(request.tokens, False)})


def _answer_id(prefix: str, http: Request, request: GenerationRequest) -> str:
    """From the client's ``X-Request-Id``, or its ``request_id``, or at random."""
    return f"{prefix}-{http.state.client_request_id or request.request_id or uuid.uuid4().hex}"
