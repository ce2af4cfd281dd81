"""What goes wrong, as HTTP: one status and one OpenAI error object for each kind of failure.

Clients retry 408, 409, 429 and 5xx, so a client's mistake is always another 4xx and overload says when to come back.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from distaff.runtime.errors import ChatTemplateError, EngineDeadError, EngineOverloadedError, PromptError
from distaff.runtime.sampling_params import SamplingParamsError

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499  # nginx's code for logs; the client is not there to read it


class ApiError(Exception):
    """A failure with the HTTP status and the fields of OpenAI's error object that report it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.body: dict[str, Any] = {"error": {"message": message, "type": type, "param": param, "code": code}}


def bad_request(param: str | None, message: str, code: str | None = None) -> ApiError:
    """A client's mistake in the field ``param``."""
    return ApiError(400, message, param=param, code=code)


def no_such_model(name: str) -> ApiError:
    """The request names a model that is not served here."""
    return ApiError(404, f"The model `{name}` does not exist.", param="model", code="model_not_found")


def as_api_error(error: Exception) -> ApiError:
    """The HTTP form of any exception; one that nobody expected is logged with its traceback and becomes a 500."""
    match error:
        case ApiError():
            return error
        case SamplingParamsError():
            return bad_request(error.parameter, str(error))
        case PromptError():
            return bad_request("prompt", str(error))
        case ChatTemplateError():
            return bad_request("messages", str(error))
        case EngineOverloadedError():
            wait = str(max(1, round(error.retry_after)))
            return ApiError(
                429, str(error), type="overloaded_error", code="engine_overloaded", headers={"Retry-After": wait}
            )
        case EngineDeadError():
            return ApiError(
                503,
                f"The engine is not running: {error}",
                type="server_error",
                code="engine_dead",
                headers={"Retry-After": "30"},
            )
        case HTTPException():
            return ApiError(error.status_code, error.detail, headers=error.headers)
    logger.error("unexpected error", exc_info=error)
    return ApiError(500, "The server had an internal error; its log says more.", type="server_error")


def error_response(error: Exception) -> Response:
    """The response that reports an exception."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    api_error = as_api_error(error)
    return JSONResponse(api_error.body, api_error.status, headers=api_error.headers)


async def http_exception_handler(request: Request, error: Exception) -> Response:
    """Starlette's own errors (no such path, wrong method) as error objects."""
    if isinstance(error, HTTPException) and error.status_code == 404:
        error = ApiError(404, f"There is no {request.url.path} here.", code="unknown_url")
    elif isinstance(error, HTTPException) and error.status_code == 405:
        error = ApiError(
            405,
            f"{request.url.path} does not take {request.method}.",
            code="method_not_allowed",
            headers=error.headers,
        )
    return error_response(error)


Endpoint = Callable[[Request], Awaitable[Response]]


def reporting_errors(endpoint: Endpoint) -> Endpoint:
    """The endpoint with every exception turned into a response, so that middleware sees it like any other."""

    async def guarded(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Exception as error:
            return error_response(error)

    return guarded
