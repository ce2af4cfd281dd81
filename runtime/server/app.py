"""The application: which path goes where, and the small endpoints that tell about the server itself."""

from __future__ import annotations

import importlib.metadata
import time
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from distaff.runtime.errors import EngineDeadError
from distaff.runtime.server.config import EngineClient, ServerConfig
from distaff.runtime.server.errors import (
    Endpoint,
    error_response,
    http_exception_handler,
    no_such_model,
    reporting_errors,
)
from distaff.runtime.server.generation import Generation
from distaff.runtime.server.metrics import PrometheusStatLogger
from distaff.runtime.server.middleware import Authentication, RequestCount, RequestId


class About:
    """Endpoints that tell about the server."""

    def __init__(
        self, engine: EngineClient, config: ServerConfig, metrics: PrometheusStatLogger, count: RequestCount
    ) -> None:
        self._engine = engine
        self._names = config.served_model_names
        self._metrics = metrics
        self._count = count
        self._started = int(time.time())

    async def health(self, http: Request) -> Response:
        """``/health`` and ``/ping``: 200, or 503 once the engine has died."""
        if self._engine.errored:
            return error_response(EngineDeadError("its loop has died; see the log"))
        return Response()

    async def version(self, http: Request) -> Response:
        """``/version``."""
        return JSONResponse({"version": importlib.metadata.version("distaff")})

    async def load(self, http: Request) -> Response:
        """``/load``: generation requests under way."""
        return JSONResponse({"server_load": self._count.current})

    async def metrics(self, http: Request) -> Response:
        """``/metrics`` in Prometheus' text format; the gauges are of now, not of the latest step."""
        self._metrics.set_gauges(self._engine.stats())
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self, http: Request) -> Response:
        """``/v1/models``."""
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self._names]})

    async def model(self, http: Request) -> Response:
        """``/v1/models/{name}``."""
        name = http.path_params["name"]
        if name not in self._names:
            raise no_such_model(name)
        return JSONResponse(self._card(name))

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "distaff",
            "root": self._engine.manifest.model,
            "parent": None,
            "max_model_len": self._engine.max_model_len,
        }


def build_app(engine: EngineClient, config: ServerConfig, metrics: PrometheusStatLogger) -> Starlette:
    """The application for an engine that has been started; ``metrics`` is the stat logger given to that engine."""
    count = RequestCount(metrics)
    about = About(engine, config, metrics, count)
    generation = Generation(engine, config)

    def route(path: str, endpoint: Endpoint, *methods: str) -> Route:
        return Route(path, reporting_errors(endpoint), methods=list(methods))

    middleware = [
        Middleware(RequestId, answers=config.enable_request_id_headers),
        Middleware(count.wrap),
        Middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=config.allowed_methods,
            allow_headers=config.allowed_headers,
            allow_credentials=config.allow_credentials,
        ),
    ]
    if config.api_keys:
        middleware.append(Middleware(Authentication, api_keys=config.api_keys))
    if config.enable_tokenizer_info_endpoint:
        optional = [route("/tokenizer_info", generation.tokenizer_info, "GET")]
    else:
        optional = []
    return Starlette(
        routes=[
            *optional,
            route("/v1/models", about.models, "GET"),
            route("/v1/models/{name:path}", about.model, "GET"),
            route("/v1/completions", generation.completions, "POST"),
            route("/v1/chat/completions", generation.chat_completions, "POST"),
            route("/invocations", generation.invocations, "POST"),
            route("/tokenize", generation.tokenize, "POST"),
            route("/detokenize", generation.detokenize, "POST"),
            route("/health", about.health, "GET"),
            route("/ping", about.health, "GET", "POST"),
            route("/version", about.version, "GET"),
            route("/load", about.load, "GET"),
            route("/metrics", about.metrics, "GET"),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: http_exception_handler},
    )
