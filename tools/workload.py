"""What benchmarks ask for: prompts and output lengths, the same ones for every engine and every run of a seed.

Prompts are English words (about one token each) or, with a vocabulary size, random token ids of exact count.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path

KINDS = ("mixed", "fixed", "shared-prefix")

_WORDS = (
    "the of and to in is that it was for on are with as his they be at one have this from or had by hot but some what "
    "there we can out other were all your when up use word how said an each she which do their time if will way about "
    "many then them would write like so these her long make thing see him two has look more day could go come did my "
    "sound no most number who over know water than call first people may down side been now find any new work part "
    "take get place made live where after back little only round man year came show every good me give our under name "
    "very through just form much great think say help low line before turn cause same mean differ move right boy old "
    "too does tell sentence set three want air well also play small end put home read hand port large spell add even "
    "land here must big high such follow act why ask men change went light kind off need house picture try us again"
).split()
_FIRST_RANDOM_ID = 16  # below it vocabularies keep their special tokens


@dataclasses.dataclass(frozen=True)
class WorkItem:
    """One request: a text or token ids, and how many tokens to generate (end of sequence ignored)."""

    prompt: str | list[int]
    output_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkloadSpec:
    """A workload: ``kind`` mixed draws lengths evenly from the ranges (both ends included), fixed takes their upper
    ends, shared-prefix is mixed with ``prefix_len`` more tokens in front that all prompts share. Lengths are in tokens
    where ``vocab_size`` is given, else in words.
    """

    kind: str = "mixed"
    num_prompts: int = 64
    seed: int = 0
    input_len: tuple[int, int] = (20, 600)
    output_len: tuple[int, int] = (16, 256)
    prefix_len: int = 256
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; known are {', '.join(KINDS)}")
        for name, (low, high) in (("input_len", self.input_len), ("output_len", self.output_len)):
            if not 1 <= low <= high:
                raise ValueError(f"{name} is {low} to {high}; it must be at least 1 and not fall")
        if self.num_prompts < 1:
            raise ValueError(f"num_prompts is {self.num_prompts}; it must be at least 1")
        if self.vocab_size is not None and self.vocab_size <= _FIRST_RANDOM_ID:
            raise ValueError(f"vocab_size is {self.vocab_size}; random prompts need more than {_FIRST_RANDOM_ID}")

    def make(self) -> list[WorkItem]:
        """The requests; equal specs give equal requests."""
        rng = random.Random(self.seed)
        prefix = self._tokens(rng, self.prefix_len) if self.kind == "shared-prefix" else []
        items = []
        for _ in range(self.num_prompts):
            fixed = self.kind == "fixed"
            size = self.input_len[1] if fixed else rng.randint(*self.input_len)
            output = self.output_len[1] if fixed else rng.randint(*self.output_len)
            items.append(WorkItem(self._prompt([*prefix, *self._tokens(rng, size)]), output))
        return items

    def _tokens(self, rng: random.Random, count: int) -> list[int]:
        """Token ids, or places in the list of words."""
        low, high = (0, len(_WORDS)) if self.vocab_size is None else (_FIRST_RANDOM_ID, self.vocab_size)
        return [rng.randrange(low, high) for _ in range(count)]

    def _prompt(self, tokens: list[int]) -> str | list[int]:
        return " ".join(_WORDS[token] for token in tokens) if self.vocab_size is None else tokens


def save_workload(path: Path, items: Sequence[WorkItem]) -> None:
    """Writes requests as JSON lines."""
    path.write_text("".join(json.dumps(dataclasses.asdict(item)) + "\n" for item in items))


def load_workload(path: Path) -> list[WorkItem]:
    """Reads what `save_workload` wrote; raises `ValueError` with the line that is wrong."""
    items = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            item = WorkItem(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if not isinstance(item.prompt, str | list) or type(item.output_tokens) is not int or item.output_tokens < 1:
            raise ValueError(f"{path}, line {number}: a prompt and output_tokens of at least 1 are needed")
        items.append(item)
    if not items:
        raise ValueError(f"{path} holds no requests")
    return items
