"""What happens around every request: API keys, request ids, the count of requests under way. Plain ASGI."""

from __future__ import annotations

import hashlib
import secrets
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from distaff.runtime.server.errors import ApiError, error_response
from distaff.runtime.server.metrics import PrometheusStatLogger

_MAX_ID_LENGTH = 128
_METHODS = frozenset(("GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE"))  # clients must not make up labels


class Authentication:
    """Paths under ``/v1``, and ``/invocations``, need one of the keys as ``Authorization: Bearer <key>``.

    Others, and CORS preflights, do not.

    Keys are compared as digests in constant time.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 401 or passes the request on."""
        if scope["type"] != "http" or scope["method"] == "OPTIONS" or not _is_guarded(scope) or self._allowed(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "Incorrect or missing API key; send it as `Authorization: Bearer <key>`.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error_response(error)(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = _digest(key.strip())
        matches = [secrets.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _is_guarded(scope: Scope) -> bool:
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path in ("/v1", "/invocations") or path.startswith("/v1/")


class RequestId:
    """Takes over ``X-Request-Id`` if the client sent a printable one.

    With ``answers`` every response carries the header, with a new id where there was none.
    """

    def __init__(self, app: ASGIApp, answers: bool) -> None:
        self._app = app
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Notes the id, and adds the header."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        usable = 0 < len(given) <= _MAX_ID_LENGTH and given.isascii() and given.isprintable()
        scope.setdefault("state", {})["client_request_id"] = given if usable else None
        request_id = given if usable else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id if self._answers else send)


class RequestCount:
    """Counts requests under way (``current``; generation only) and answered ones (a metric)."""

    def __init__(self, metrics: PrometheusStatLogger) -> None:
        self._metrics = metrics
        self.current = 0

    def wrap(self, app: ASGIApp) -> ASGIApp:
        """The application, counted."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            status = 0

            async def send_and_note(message: Message) -> None:
                nonlocal status
                status = message.get("status", status)
                await send(message)

            generates = scope["method"] == "POST" and _is_guarded(scope)
            self.current += generates
            try:
                await app(scope, receive, send_and_note)
            finally:
                self.current -= generates
                route = scope.get("route")
                handler = getattr(route, "path", "none")
                method = scope["method"] if scope["method"] in _METHODS else "other"
                self._metrics.http_requests.labels(handler, method, status or "none").inc()

        return counted
