"""An iterator that reads ahead in a thread of its own."""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Iterator
from typing import Any, Self


class _End:
    """The end of the data, or the error that ended it."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error


class PrefetchIterator:
    """Keeps the next ``buffer_size`` items of ``data_iter`` ready; an error in it is raised where its item was due.

    Deprecated in Flax, which warns; so does this. Data loaders such as Grain and tf.data read ahead by themselves.
    """

    def __init__(self, data_iter: Iterator[Any], buffer_size: int = 1) -> None:
        warnings.warn(
            "PrefetchIterator is deprecated; let the data loader read ahead.", DeprecationWarning, stacklevel=2
        )
        self.buffer_size = buffer_size
        self._items: queue.Queue[Any] = queue.Queue(buffer_size)
        self._end: _End | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._read, args=(data_iter,), daemon=True).start()

    def _read(self, data_iter: Iterator[Any]) -> None:
        try:
            for item in data_iter:
                if not self._put(item):
                    return
            self._put(_End())
        except Exception as error:
            self._put(_End(error))

    def _put(self, item: Any) -> bool:
        """Wait for room; False once the iterator is closed."""
        while not self._closed.is_set():
            try:
                self._items.put(item, timeout=0.05)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        if self._end is None:
            item = self._next_item()
            if not isinstance(item, _End):
                return item
            self._end = item
        if self._end.error is not None:
            raise self._end.error
        raise StopIteration

    def _next_item(self) -> Any:
        """The next item that was read; after ``close`` only those that are there already."""
        while True:
            try:
                return self._items.get(timeout=0.05)
            except queue.Empty:
                if self._closed.is_set():
                    return _End()

    def close(self) -> None:
        """Stop reading; items that were read can still be taken."""
        self._closed.set()
