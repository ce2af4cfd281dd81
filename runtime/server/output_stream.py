"""The outputs of all prompts of one HTTP request as one stream that can be closed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Self, TypeVar, cast

from distaff.runtime.outputs import RequestOutput

T = TypeVar("T")


async def merge(sources: Sequence[AsyncIterator[T]]) -> AsyncGenerator[tuple[int, T]]:
    """Items of all sources with the source's index, as they come.

    Each source is asked for one item ahead, no more, so that a slow reader slows its sources. Closing the stream, or an
    error in one source, closes them all.
    """
    if len(sources) == 1:  # the common case needs no tasks
        async with contextlib.aclosing(cast(AsyncGenerator[T], sources[0])) as only:
            async for item in only:
                yield 0, item
        return
    pending = {asyncio.ensure_future(anext(source)): index for index, source in enumerate(sources)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = pending.pop(task)
                try:
                    item = task.result()
                except StopAsyncIteration:
                    continue
                pending[asyncio.ensure_future(anext(sources[index]))] = index
                yield index, item
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for source in sources:
            await cast(AsyncGenerator[T], source).aclose()


class OutputStream:
    """An iterator over ``(prompt index, output)``; `aclose` aborts what still runs."""

    def __init__(self, sources: Sequence[AsyncIterator[RequestOutput]]) -> None:
        self._merged = merge(sources)
        self._first: tuple[int, RequestOutput] | None = None

    async def start(self) -> None:
        """Waits for the first output, so that what the engine refuses is known before the response begins."""
        self._first = await anext(self._merged)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, RequestOutput]:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        return await anext(self._merged)

    async def aclose(self) -> None:
        """Aborts every request that has not finished."""
        await self._merged.aclose()

    async def final(self, count: int) -> list[RequestOutput]:
        """The last output of each of ``count`` prompts."""
        async with contextlib.aclosing(self):
            last = {index: output async for index, output in self}
        return [last[index] for index in range(count)]
