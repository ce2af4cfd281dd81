"""Buckets: the batch shapes (T tokens, R requests, S samples) for which programs are compiled.

XLA programs have fixed shapes, so a step is padded to the smallest program that holds it. Three kinds exist:

* *decode*, T = R = S: every row is one token; the steady state of generation, so these are many and small;
* *mixed*, T > R = S: prefill chunks and decode rows together; any batch within the limits fits the largest of them;
* *scoring*, T >= S > R: logits of many tokens of a row, for log-probabilities of prompts.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

# Rows of the small mixed programs (a few users, short prompts) and the token counts that they come in.
SMALL_REQUESTS = 8
SMALL_TOKENS = (16, 64)
# Samples of a scoring program: its logits are float32 [samples, vocabulary], gigabytes if there were many more.
SCORED_TOKENS = 512

_MIXED_SIZE = re.compile(r"(\d+)x(\d+)")


class BucketError(ValueError):
    """The wanted set of batch shapes is malformed or cannot serve every batch within its own limits."""


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """One batch shape: ``tokens`` (T), ``requests`` (R) and ``samples`` (S)."""

    tokens: int
    requests: int
    samples: int

    @property
    def kind(self) -> str:
        """``decode``, ``mixed`` or ``scoring``."""
        if self.tokens == self.requests:
            return "decode"
        return "scoring" if self.samples > self.requests else "mixed"

    @property
    def name(self) -> str:
        """Kind and sizes, as in ``decode-8``, ``mixed-128x8`` and ``scoring-512x64``."""
        sizes = str(self.tokens) if self.kind == "decode" else f"{self.tokens}x{self.requests}"
        return f"{self.kind}-{sizes}"


def default_buckets(max_batch: int, max_step_tokens: int) -> tuple[Bucket, ...]:
    """The programs for up to ``max_batch`` requests and ``max_step_tokens`` tokens a step.

    Decode sizes are the powers of two up to ``max_batch``, which is itself a size. Raises `BucketError` unless
    1 <= max_batch < max_step_tokens.
    """
    if max_batch < 1:
        raise BucketError(f"max_batch is {max_batch}; it must be at least 1")
    if max_step_tokens <= max_batch:
        raise BucketError(
            f"max_step_tokens is {max_step_tokens} and max_batch {max_batch}: a step must have room for one token of "
            "every request and more for a prompt; raise max_step_tokens or lower max_batch"
        )
    decode = [Bucket(size, size, size) for size in (*_doubling(1, max_batch), max_batch)]
    few = min(SMALL_REQUESTS, max_batch)
    mixed = [Bucket(tokens, few, few) for tokens in SMALL_TOKENS if few < tokens < max_step_tokens]
    large = max(2 * max_batch, 2 * SMALL_TOKENS[-1])
    mixed += [Bucket(tokens, max_batch, max_batch) for tokens in (*_doubling(large, max_step_tokens), max_step_tokens)]
    return _ordered([*decode, *mixed, _scoring(max_step_tokens, max_batch)])


def parse_buckets(text: str) -> tuple[Bucket, ...]:
    """Reads exactly the programs that a user wants: ``decode=1,8,64 mixed=128x8,512x64 scoring=512x64``.

    Sizes are T for decode, TxR for the others. Limits follow from them: the largest batch is the largest R, the
    largest step the largest T. Raises `BucketError` if the text is malformed or if a batch within those limits would
    fit no program. Without ``scoring``, log-probabilities of prompts are limited to as many tokens as requests.
    """
    buckets: list[Bucket] = []
    for part in text.split():
        kind, _, sizes = part.partition("=")
        if kind not in ("decode", "mixed", "scoring") or not sizes:
            raise BucketError(
                f"cannot read {part!r}; write for example: decode=1,8,64 mixed=128x8,512x64 scoring=512x64"
            )
        buckets += [_parse_size(kind, size) for size in sizes.split(",")]
    if not buckets:
        raise BucketError("no programs are named; write for example: decode=1,8,64 mixed=128x8,512x64")
    _check_complete(buckets)
    return _ordered(buckets)


def _parse_size(kind: str, size: str) -> Bucket:
    if kind == "decode":
        if not size.isdecimal() or int(size) < 1:
            raise BucketError(f"decode takes numbers of requests of at least 1, not {size!r}")
        return Bucket(int(size), int(size), int(size))
    match = _MIXED_SIZE.fullmatch(size)
    if match is None:
        raise BucketError(f"{kind} takes sizes like 128x8 (tokens x requests), not {size!r}")
    tokens, requests = map(int, match.groups())
    if not 1 <= requests < tokens:
        raise BucketError(f"{kind}={size}: it must have more tokens than requests, and at least 1 request")
    return _scoring(tokens, requests) if kind == "scoring" else Bucket(tokens, requests, requests)


def _scoring(tokens: int, requests: int) -> Bucket:
    return Bucket(tokens, requests, max(min(tokens, SCORED_TOKENS), requests + 1))


def _check_complete(buckets: list[Bucket]) -> None:
    """Whatever the kinds of its rows, a batch within the largest T and the largest R must fit one program."""
    requests = max(bucket.requests for bucket in buckets)
    tokens = max(requests + 1, *(bucket.tokens for bucket in buckets))
    kinds = ["mixed", "scoring"] if any(bucket.kind == "scoring" for bucket in buckets) else ["mixed"]
    for kind in kinds:
        if not any((b.kind, b.tokens, b.requests) == (kind, tokens, requests) for b in buckets):
            raise BucketError(
                f"the largest step has {tokens} tokens and the largest batch {requests} requests, but no {kind} "
                f"program holds both; add {kind}={tokens}x{requests}"
            )


def _doubling(first: int, limit: int) -> Iterator[int]:
    while first < limit:
        yield first
        first *= 2


def _ordered(buckets: list[Bucket]) -> tuple[Bucket, ...]:
    return tuple(sorted(set(buckets)))
