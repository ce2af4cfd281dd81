"""The engine for many callers: its loop runs in a thread of its own, callers await outputs in theirs.

Everything that touches the engine runs on its thread: callers put functions into an inbox, which the loop empties
between steps. Outputs travel back through each caller's event loop and wait in a stream that merges what its reader
has not fetched, so that a slow reader costs no memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

from distaff.compiler.artifact import Manifest
from distaff.runtime.engine import Engine
from distaff.runtime.errors import EngineDeadError
from distaff.runtime.outputs import RequestOutput
from distaff.runtime.sampling_params import RequestOutputKind, SamplingParams
from distaff.runtime.stats import StepStats
from distaff.runtime.tokenizer import Tokenizer

_T = TypeVar("_T")


class _Stream:
    """The way of one request's outputs to its reader; all methods run on the reader's event loop."""

    def __init__(self, kind: RequestOutputKind) -> None:
        self.loop = asyncio.get_running_loop()
        self._aggregate = kind == RequestOutputKind.DELTA
        self._waiting: RequestOutput | None = None
        self._error: EngineDeadError | None = None
        self._event = asyncio.Event()

    def put(self, output: RequestOutput) -> None:
        if self._waiting is None:
            self._waiting = output
        else:
            self._waiting.add(output, self._aggregate)
        self._event.set()

    def fail(self, error: EngineDeadError) -> None:
        self._error = error
        self._event.set()

    async def get(self) -> RequestOutput:
        await self._event.wait()
        self._event.clear()
        output, self._waiting = self._waiting, None
        if output is not None:
            if self._error is not None:
                self._event.set()
            return output
        assert self._error is not None, "woken for nothing"
        raise EngineDeadError(str(self._error)) from self._error.__cause__


class AsyncEngine:
    """Serves an `Engine` to coroutines of any number of event loops. `start` it before the first request."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: queue.SimpleQueue[tuple[Callable[[], None], Callable[[EngineDeadError], None]]] = (
            queue.SimpleQueue()
        )
        self._streams: dict[str, _Stream] = {}  # touched by the engine's thread alone
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._lock = threading.Lock()  # between posting and dying, so that no post is lost
        self._dead: EngineDeadError | None = EngineDeadError("the engine was not started")
        self._errored = False
        self._stop_at: float | None = None

    @property
    def manifest(self) -> Manifest:
        """What is being served."""
        return self._engine.manifest

    @property
    def tokenizer(self) -> Tokenizer:
        """The artifact's tokenizer; raises `TokenizerError` if it has none."""
        return self._engine.tokenizer

    @property
    def max_model_len(self) -> int:
        """The most tokens that prompt and output may have together."""
        return self._engine.max_model_len

    @property
    def errored(self) -> bool:
        """Whether the loop died of an exception."""
        return self._errored

    def stats(self) -> StepStats:
        """Measurements: counts of the latest step, queues and pages as they are now."""
        return self._engine.stats

    async def start(self) -> None:
        """Starts the loop; to be called once."""
        self._dead = None
        self._thread.start()

    async def shutdown(self, timeout: float = 0.0) -> None:
        """Takes no more requests, lets those that run go on for up to ``timeout`` seconds, aborts the rest, stops."""

        def stop() -> None:
            self._stop_at = time.monotonic() + timeout

        if self._thread.is_alive():
            with contextlib.suppress(EngineDeadError):  # it stopped by itself
                await self._call(stop)
            await asyncio.to_thread(self._thread.join)

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Yields the request's outputs until it is finished; closing or cancelling the iterator aborts it.

        A reader that is slower than the engine gets several deltas in one. Raises what `Engine.add_request` raises
        before the first output, and `EngineDeadError` as soon as the loop is no more.
        """
        stream = _Stream(params.output_kind)
        arrival = time.monotonic()

        def add() -> None:
            self._check_open()
            self._engine.add_request(
                request_id,
                prompt_token_ids,
                params,
                priority=priority,
                cache_salt=cache_salt,
                arrival_time=arrival,
                timeout=timeout,
            )
            self._streams[request_id] = stream

        def leave() -> None:
            if self._streams.get(request_id) is stream:
                del self._streams[request_id]
                self._engine.abort([request_id])

        finished = False
        try:
            # A reader that is cancelled while it waits here leaves as well: the inbox keeps the order.
            await self._call(add)
            while not finished:
                output = await stream.get()
                finished = output.finished
                yield output
        finally:
            if not finished:
                self._post(leave, lambda _: None)

    async def abort(self, request_id: str) -> None:
        """Ends a request, if it runs; its reader gets a last output with finish reason "abort"."""
        await self._call(lambda: self._deliver(self._engine.abort([request_id])))

    async def reset_prefix_cache(self) -> bool:
        """Forgets cached prompts; False, and nothing changes, while pages are in use."""
        return await self._call(self._engine.reset_prefix_cache)

    async def _call(self, function: Callable[[], _T]) -> _T:
        """Runs ``function`` on the engine's thread, between two steps."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()

        def settle(method: Callable[[Any], None], value: Any) -> None:
            if not future.done():
                method(value)

        def run() -> None:
            try:
                result = function()
            except Exception as error:
                _call_on(loop, settle, future.set_exception, error)
            else:
                _call_on(loop, settle, future.set_result, result)

        def fail(error: EngineDeadError) -> None:
            _call_on(loop, settle, future.set_exception, error)

        self._post(run, fail)
        return await future

    def _post(self, run: Callable[[], None], fail: Callable[[EngineDeadError], None]) -> None:
        """Puts ``run`` into the inbox; ``fail`` is called in its place if the loop dies before it comes to it."""
        with self._lock:
            if self._dead is None:
                self._inbox.put((run, fail))
                return
        fail(self._dead)

    def _check_open(self) -> None:
        if self._stop_at is not None:
            raise EngineDeadError("the engine is shutting down")

    def _run(self) -> None:
        """The thread: work through the inbox, then a step, until stopped."""
        try:
            while not self._is_done():
                self._empty_inbox(wait=not self._engine.has_unfinished and self._stop_at is None)
                if self._engine.has_unfinished:
                    self._deliver(self._engine.step())
            self._deliver(self._engine.abort(list(self._streams)))
            self._engine.shutdown()
            self._die(EngineDeadError("the engine was shut down"))
        except BaseException as error:
            self._errored = True
            dead = EngineDeadError(f"the engine's loop died: {type(error).__name__}: {error}")
            dead.__cause__ = error
            self._die(dead)

    def _is_done(self) -> bool:
        return self._stop_at is not None and (not self._engine.has_unfinished or time.monotonic() >= self._stop_at)

    def _empty_inbox(self, wait: bool) -> None:
        try:
            while True:
                run, _ = self._inbox.get(block=wait)
                run()
                wait = False
        except queue.Empty:
            return

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        """Sends each output to its reader, with one wake-up for each event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, RequestOutput]]] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            by_loop.setdefault(stream.loop, []).append((stream, output))
            if output.finished:
                del self._streams[output.request_id]
        for loop, pairs in by_loop.items():
            if not _call_on(loop, _put_all, pairs):
                gone = [output.request_id for _, output in pairs]
                self._engine.abort(gone)
                for request_id in gone:
                    self._streams.pop(request_id, None)

    def _die(self, error: EngineDeadError) -> None:
        """Nothing more will come: tells every reader and everyone whose call is still in the inbox."""
        with self._lock:
            self._dead = error
        for stream in self._streams.values():
            _call_on(stream.loop, stream.fail, error)
        self._streams.clear()
        while not self._inbox.empty():
            self._inbox.get()[1](error)


def _call_on(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> bool:
    """Calls a function on an event loop; False if the loop was closed and nobody is there any more."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        return False
    return True


def _put_all(pairs: Sequence[tuple[_Stream, RequestOutput]]) -> None:
    for stream, output in pairs:
        stream.put(output)
