"""Log-probabilities in the forms of both APIs. Values below -9999 (also minus infinity) are sent as -9999."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distaff.runtime.outputs import Logprob, PositionLogprobs
from distaff.runtime.tokenizer import Tokenizer

_FLOOR = -9999.0


class TokenNames:
    """How tokens are written: as their text, or as ``token_id:<id>`` where that was asked for or there is no text."""

    def __init__(self, tokenizer: Tokenizer | None, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids or tokenizer is None

    def name(self, token_id: int, entry: Logprob | None = None) -> str:
        """The token's name."""
        if self._as_ids or self._tokenizer is None:
            return f"token_id:{token_id}"
        known = None if entry is None else entry.decoded_token
        return self._tokenizer.token_text(token_id) if known is None else known

    def bytes(self, token_id: int) -> list[int] | None:
        """The token's bytes, which join to whole characters where names cannot; None without a tokenizer."""
        return None if self._tokenizer is None else list(self._tokenizer.token_bytes(token_id))


def most_likely(position: PositionLogprobs, count: int) -> list[tuple[int, Logprob]]:
    """The ``count`` likeliest candidates (-1: all of them), best first."""
    ranked = sorted(position.items(), key=lambda candidate: candidate[1].rank)
    return ranked if count == -1 else ranked[:count]


def _value(entry: Logprob) -> float:
    return max(entry.logprob, _FLOOR)


def chat_logprobs(
    names: TokenNames, token_ids: Sequence[int], positions: Sequence[PositionLogprobs], top: int
) -> dict[str, Any]:
    """``logprobs`` of a chat choice: one entry a token with its ``top`` likeliest alternatives."""

    def entry(token_id: int, found: Logprob) -> dict[str, Any]:
        return {"token": names.name(token_id, found), "logprob": _value(found), "bytes": names.bytes(token_id)}

    return {
        "content": [
            entry(token_id, position[token_id])
            | {"top_logprobs": [entry(*candidate) for candidate in most_likely(position, top)]}
            for token_id, position in zip(token_ids, positions, strict=True)
        ],
        "refusal": None,
    }


def completion_logprobs(
    names: TokenNames,
    token_ids: Sequence[int],
    positions: Sequence[PositionLogprobs | None],
    top: int,
    offset: int = 0,
) -> dict[str, Any]:
    """``logprobs`` of a completion choice: parallel lists, one entry a token.

    ``top_logprobs`` also holds the token itself where it is not among the ``top``. ``text_offset`` counts characters of
    token names from ``offset``. The first token of an echoed prompt follows nothing and has null.
    """
    tokens, values, tops, offsets = [], [], [], []
    for token_id, position in zip(token_ids, positions, strict=True):
        own = None if position is None else position[token_id]
        name = names.name(token_id, own)
        tokens.append(name)
        values.append(None if own is None else _value(own))
        tops.append(None if position is None or own is None else _by_name(names, position, top) | {name: _value(own)})
        offsets.append(offset)
        offset += len(name)
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _by_name(names: TokenNames, position: PositionLogprobs, top: int) -> dict[str, float]:
    return {names.name(token_id, entry): _value(entry) for token_id, entry in most_likely(position, top)}


def prompt_logprobs(positions: Sequence[PositionLogprobs | None] | None) -> list[Any] | None:
    """vLLM's ``prompt_logprobs``: for each prompt token candidates by token id, null for the first."""
    if positions is None:
        return None
    return [
        None
        if position is None
        else {
            str(token_id): {"logprob": _value(entry), "rank": entry.rank, "decoded_token": entry.decoded_token}
            for token_id, entry in position.items()
        }
        for position in positions
    ]
