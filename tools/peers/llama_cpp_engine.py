"""llama.cpp, batched continuously by hand through its low-level interface, as the high-level one runs one request.

Each decode call takes the next token of every running sequence first and fills up with pieces of prompts.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import Any

import llama_cpp
import numpy as np


@dataclasses.dataclass
class _Sequence:
    """A running request: ``pending`` tokens are still to be fed from ``position`` on; ``slot`` is llama.cpp's id."""

    slot: int
    pending: list[int]
    output: list[int]
    count: int
    position: int = 0


class Engine:
    """``model`` is a GGUF file; ``options``: ``threads``, ``sequences`` (most at once), ``context`` (tokens of each),
    ``batch`` (tokens a call).
    """

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(model.encode(), model_params)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = options["sequences"] * options["context"]
        params.n_seq_max = options["sequences"]
        params.n_batch = params.n_ubatch = options["batch"]
        params.n_threads = params.n_threads_batch = options["threads"]
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp could not load {model}")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._slots = options["sequences"]
        self._room = options["batch"]
        self._batch = llama_cpp.llama_batch_init(self._room, 0, 1)

    def generate(self, prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
        """See `harness.Engine`."""
        outputs: list[list[int]] = [[] for _ in prompts]
        waiting = deque(zip(prompts, outputs, counts, strict=True))
        free = list(range(self._slots))
        running: list[_Sequence] = []
        while waiting or running:
            while waiting and free:
                prompt, output, count = waiting.popleft()
                running.append(_Sequence(free.pop(), list(prompt), output, count))
            self._step(running)
            for sequence in [s for s in running if len(s.output) == s.count]:
                llama_cpp.llama_memory_seq_rm(self._memory, sequence.slot, -1, -1)
                free.append(sequence.slot)
                running.remove(sequence)
        return outputs

    def _step(self, running: list[_Sequence]) -> None:
        """One decode call; every sequence with nothing left to feed gets its next token."""
        batch = self._batch
        batch.n_tokens = 0
        sampled: list[tuple[int, _Sequence]] = []
        for sequence in sorted(running, key=lambda s: not s.output):  # those that decode go first
            taken = sequence.pending[: self._room - batch.n_tokens]
            del sequence.pending[: len(taken)]
            for token in taken:
                self._add(token, sequence)
            if taken and not sequence.pending:
                batch.logits[batch.n_tokens - 1] = 1
                sampled.append((batch.n_tokens - 1, sequence))
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        for place, sequence in sampled:
            logits = llama_cpp.llama_get_logits_ith(self._context, place)
            token = int(np.argmax(np.ctypeslib.as_array(logits, shape=(self._vocab_size,))))
            sequence.output.append(token)
            sequence.pending.append(token)

    def _add(self, token: int, sequence: _Sequence) -> None:
        place = self._batch.n_tokens
        self._batch.token[place] = token
        self._batch.pos[place] = sequence.position
        self._batch.n_seq_id[place] = 1
        self._batch.seq_id[place][0] = sequence.slot
        self._batch.logits[place] = 0
        self._batch.n_tokens = place + 1
        sequence.position += 1
