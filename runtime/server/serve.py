"""Running the server: a socket, uvicorn, and an orderly end on SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
from collections.abc import Sequence
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from distaff.runtime.server.config import EngineClient, ServerConfig

logger = logging.getLogger(__name__)

_ABORT_SECONDS = 5.0  # after the grace period, for aborted requests to end their responses


class BindError(OSError):
    """The address to listen on is taken, unknown or not allowed."""


def bind(host: str, port: int, uds: str | None = None) -> socket.socket:
    """A bound socket, not yet listening: for TCP (port 0 takes a free one), or for a Unix path if ``uds`` is given.

    To be called before the model is loaded, so that a taken port is found at once. Raises `BindError`.
    """
    if uds is not None:
        sock = socket.socket(socket.AF_UNIX)
    else:
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        if uds is not None and os.path.exists(uds) and stat.S_ISSOCK(os.stat(uds).st_mode):
            os.unlink(uds)  # left by a server before
        sock.bind((host, port) if uds is None else uds)
    except OSError as error:
        sock.close()
        where = uds or f"{host}, port {port}"
        raise BindError(f"cannot listen on {where}: {error.strerror or error}; choose another address") from None
    return sock


def url(sock: socket.socket) -> str:
    """Where clients reach a bound socket."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{name}"
    return f"http://[{name[0]}]:{name[1]}" if sock.family == socket.AF_INET6 else f"http://{name[0]}:{name[1]}"


class Server(uvicorn.Server):
    """uvicorn that serves an engine: starts it, and ends it after the last request or the grace period.

    The first signal ends the server in an orderly way with exit code 0, a second one at once.
    """

    def __init__(self, app: Starlette, engine: EngineClient, config: ServerConfig, **uvicorn_settings: object) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                root_path=config.root_path,
                timeout_graceful_shutdown=round(config.shutdown_grace_seconds + _ABORT_SECONDS),
                **uvicorn_settings,  # type: ignore[arg-type]
            )
        )
        self._engine = engine
        self._grace = config.shutdown_grace_seconds
        self._names = config.served_model_names

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts the engine, then listens."""
        await self._engine.start()
        await super().startup(sockets)
        for sock in sockets or ():
            where = url(sock).replace("http:", "https:") if self.config.is_ssl else url(sock)
            logger.info("ready: %s serves %s", where, ", ".join(self._names))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Lets requests that run end, within the grace period; then, or at a second signal, aborts the rest."""
        engine_end = asyncio.create_task(self._engine.shutdown(self._grace))
        await super().shutdown(sockets)
        await self._engine.shutdown()
        await engine_end

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Signals are not raised again after the end, as uvicorn does: an orderly end is exit code 0."""
        self.force_exit = self.should_exit
        self.should_exit = True


def serve(
    app: Starlette,
    engine: EngineClient,
    config: ServerConfig,
    sockets: Sequence[socket.socket],
    **uvicorn_settings: object,
) -> None:
    """Serves until a signal. ``uvicorn_settings`` are further ones of `uvicorn.Config`."""
    Server(app, engine, config, **uvicorn_settings).run(list(sockets))
