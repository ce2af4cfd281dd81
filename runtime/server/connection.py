"""What is tied to the client's connection: work that ends with it, bounded bodies, server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from distaff.runtime.server.errors import ApiError, as_api_error
from distaff.runtime.server.output_stream import OutputStream

T = TypeVar("T")


def check_json_type(content_type: str | None) -> None:
    """Raises 415 for a body that says that it is no JSON; one that does not say passes."""
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if media_type and media_type != "application/json" and not media_type.endswith("+json"):
        raise ApiError(415, f"The body must be application/json, not {media_type}.", code="unsupported_media_type")


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The request's body; 413 as soon as it is known to be too large."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise ApiError(413, f"The request body is larger than {max_bytes} bytes.", code="body_too_large")
    return bytes(body)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled (and then `ClientDisconnect` raised) if the client goes away.

    Only after the whole body has been received.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return await working
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events: JSON objects, after a failure one ``error`` object, and always ``[DONE]`` at the end.

    ``outputs`` is closed with the response, however that ends.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[Mapping[str, Any]], outputs: OutputStream) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._outputs = outputs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events until they end or the client has gone."""
        async with contextlib.aclosing(self._outputs), contextlib.aclosing(self._events):
            with contextlib.suppress(ClientDisconnect):
                await while_connected(receive, self._send_events(send))

    async def _send_events(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await send(_body(event))
        except Exception as error:
            await send(_body(as_api_error(error).body))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def _body(event: Mapping[str, Any]) -> dict[str, Any]:
    """ASCII only: some clients take the line separators of Unicode for the end of an event's line."""
    data = json.dumps(event, separators=(",", ":"), allow_nan=False)
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True}
