"""Text of a growing token sequence, piece by piece: no torn characters, stop strings found across token borders.

Two ways to decode: byte-level tokenizers spell bytes, so an incremental UTF-8 decoder does it exactly; for all others
(sentencepiece style, where the text of a token depends on its neighbours) a short window of tokens is decoded with
and without the new ones, and the difference is the new text.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from distaff.runtime.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTEXT_TOKENS = 5  # of the prompt; enough for a decoder to see that the text goes on and does not start here


class IncrementalDecoder(Protocol):
    """Turns tokens into text as they come; what is not yet certain is held back."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""

    def flush(self) -> str:
        """The rest; incomplete characters become U+FFFD."""


class _ByteLevelDecoder:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(b"".join(map(self._token_bytes, token_ids)))

    def flush(self) -> str:
        return self._decoder.decode(b"", True)


class _WindowDecoder:
    """``_ids[:_read]`` has been emitted as ``_known`` (in this window's decoding); the rest is held back."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context)
        self._read = len(self._ids)
        self._known = self._text()
        if self._known.endswith(_REPLACEMENT):  # the context is torn, so differences to it would be as well
            self._ids, self._read, self._known = [], 0, ""

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=False)

    def push(self, token_ids: Sequence[int]) -> str:
        self._ids += token_ids
        text = self._text()
        if len(text) <= len(self._known) or text.endswith(_REPLACEMENT):
            return ""
        return self._emit(text)

    def flush(self) -> str:
        return self._emit(self._text())

    def _emit(self, text: str) -> str:
        """Everything up to ``text`` is out; the window goes on from the tokens just emitted."""
        new = text[len(self._known) :]
        del self._ids[: self._read]
        self._read = len(self._ids)
        self._known = self._text()
        return new


class Detokenizer:
    """The text of one completion.

    ``prompt_token_ids`` give the context for a tokenizer whose first token would otherwise lose its space. ``stop``
    strings end the text where the first of them begins, or where it ends with ``include_stop``; they count only in
    text that comes after the first ``min_tokens`` tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        self._skip = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._decoder: IncrementalDecoder = (
            _ByteLevelDecoder(tokenizer)
            if tokenizer.is_byte_level
            else _WindowDecoder(tokenizer, self._visible(prompt_token_ids[-_CONTEXT_TOKENS:]))
        )
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._taken = 0
        self.text = ""

    def _visible(self, token_ids: Sequence[int]) -> Sequence[int]:
        return [i for i in token_ids if i not in self._skip] if self._skip else token_ids

    def update(self, token_ids: Sequence[int]) -> str | None:
        """Adds tokens; returns the stop string that was completed, after which the text is final."""
        for token_id in token_ids:
            before = len(self.text)
            self.text += self._decoder.push(self._visible((token_id,)))
            self._num_tokens += 1
            if self._stop and self._num_tokens > self._min_tokens and (found := self._find_stop(before)):
                return found
        return None

    def _find_stop(self, before: int) -> str | None:
        """Looks for stop strings that end after ``before``, and cuts the text at the first."""
        places = ((self.text.find(stop, max(0, before - len(stop) + 1)), stop) for stop in self._stop)
        at, stop = min((place for place in places if place[0] >= 0), key=lambda place: place[0], default=(-1, ""))
        if at < 0:
            return None
        self.text = self.text[: at + len(stop) if self._include_stop else at]
        return stop

    def finish(self) -> None:
        """Ends a text that no stop string ended: what was held back comes out."""
        self.text += self._decoder.flush()

    def take(self, finished: bool) -> str:
        """The text since the last call; unless ``finished``, without an end that may become a stop string."""
        end = len(self.text) if finished or self._include_stop else len(self.text) - self._held_back()
        new = self.text[self._taken : end]
        self._taken = max(self._taken, end)
        return new

    def _held_back(self) -> int:
        """Length of the longest end of the text with which a stop string could begin."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stop):
                return length
        return 0
