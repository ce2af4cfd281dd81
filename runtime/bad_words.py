"""Words that must not be generated: which token sequences spell them, and which token may not come next.

A word is forbidden at the beginning of a text and after a space, and only its last token is, where the output ends with
the others. vLLM looks at the spelling after a space only if it has as many tokens; here it always counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from distaff.runtime.sampling_params import SamplingParamsError

if TYPE_CHECKING:
    from distaff.runtime.tokenizer import Tokenizer

TokenSequences: TypeAlias = tuple[tuple[int, ...], ...]


def spellings(words: Sequence[str], tokenizer: Tokenizer) -> TokenSequences:
    """The token sequences of each word, and with a space before it where that is not just the space's token more.

    Raises `SamplingParamsError` for a word without tokens.
    """
    found: list[tuple[int, ...]] = []
    for word in words:
        plain, spaced = (
            tuple(tokenizer.encode(space + word.lstrip(), add_special_tokens=False)) for space in ("", " ")
        )
        if not plain:
            raise SamplingParamsError("bad_words", f"holds {word!r}, which has no tokens")
        found.append(plain)
        if spaced[-len(plain) :] != plain:
            found.append(spaced)
    return tuple(dict.fromkeys(found))


def forbidden_tokens(sequences: TokenSequences, output: Sequence[int]) -> frozenset[int]:
    """The tokens that would complete one of ``sequences`` after ``output``."""
    return frozenset(
        sequence[-1]
        for sequence in sequences
        if len(sequence) <= len(output) + 1 and tuple(output[len(output) - len(sequence) + 1 :]) == sequence[:-1]
    )
