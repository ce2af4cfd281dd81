"""An iterator that reads ahead in a thread of its own."""

from __future__ import annotations

import collections
import threading
import warnings
from collections.abc import Iterator
from typing import Any, Self


class PrefetchIterator:
    """Keeps the next ``buffer_size`` items of ``data_iter`` ready; an error in it is raised where its item was due.

    Deprecated in Flax, which warns; so does this. Data loaders such as Grain and tf.data read ahead by themselves.
    """

    def __init__(self, data_iter: Iterator[Any], buffer_size: int = 1) -> None:
        warnings.warn(
            "PrefetchIterator is deprecated; let the data loader read ahead.", DeprecationWarning, stacklevel=2
        )
        self.buffer_size = buffer_size
        self._items: collections.deque[Any] = collections.deque()
        self._reading = True
        self._error: Exception | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._read, args=(data_iter,), daemon=True).start()

    def _read(self, data_iter: Iterator[Any]) -> None:
        error = None
        try:
            for item in data_iter:
                with self._changed:
                    self._items.append(item)
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: len(self._items) < self.buffer_size or not self._reading)
                    if not self._reading:
                        return
        except Exception as raised:
            error = raised
        with self._changed:
            self._error, self._reading = error, False
            self._changed.notify_all()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        with self._changed:
            self._changed.wait_for(lambda: self._items or not self._reading)
            if self._items:
                self._changed.notify_all()
                return self._items.popleft()
            if self._error is not None:
                raise self._error
            raise StopIteration

    def close(self) -> None:
        """Stop reading; items that were read can still be taken."""
        with self._changed:
            self._reading = False
            self._changed.notify_all()
