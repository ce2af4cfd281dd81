"""A toy language model in the place of compiled programs, which checks every batch that it is given.

Its pages hold token ids. A token is written through its slot; logits are a pseudo-random function of the whole context,
read back through the block table. A wrong slot, table, position or start, a page that is reused too early or shared
wrongly: all of them change the context, and so the output differs from `plain_generate`, or an assertion fails here.
"""

from __future__ import annotations

import zlib

import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from distaff.compiler.artifact import PROGRAMS, TOKENIZER, Manifest, ProgramSpec
from distaff.compiler.buckets import default_buckets
from distaff.kernels.sampling import draw_tokens, greedy_tokens
from distaff.runtime.executables import ExecutableCache

VOCAB = 330
EOS = 2


def toy_logits(context):
    """Logits float32 [VOCAB] of the token after ``context``."""
    seed = zlib.crc32(np.asarray(context, np.int32).tobytes())
    return np.random.default_rng(seed).normal(size=VOCAB).astype(np.float32) * 3


def plain_generate(prompt, max_tokens, *, ignore_eos=False, adjust=lambda logits, output: logits):
    """Greedy output of the toy model, one token after the other over the plain context."""
    output = []
    while len(output) < max_tokens:
        logits = adjust(toy_logits([*prompt, *output]).astype(np.float64), output)
        output.append(int(np.argmax(logits)))
        if output[-1] == EOS and not ignore_eos:
            break
    return output


def byte_backend():
    """One token a byte; 3 is a special token, 2 the end of the sequence."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": EOS, "<|special|>": 3} | {c: i for i, c in enumerate(alphabet, 4)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "<pad>", "</s>", "<|special|>"])
    return backend


def save_toy_artifact(folder, *, tokenizer=None, num_pages=65, page_size=4, max_model_len=64, max_batch=8, max_step=32):
    """An artifact folder that `ToyRunner` serves."""
    programs = tuple(
        ProgramSpec(b.name, b.tokens, b.requests, b.samples, f"{b.name}.bin", "")
        for b in default_buckets(max_batch, max_step)
    )
    manifest = Manifest(
        model="toy",
        architecture="toy",
        vocab_size=VOCAB,
        max_model_len=max_model_len,
        page_size=page_size,
        num_pages=num_pages,
        dtype="float32",
        platform="cpu",
        caches=(),
        weights=(),
        programs=programs,
        eos_token_ids=(EOS,),
        has_tokenizer=tokenizer is not None,
    )
    (folder / PROGRAMS).mkdir(parents=True)
    for program in programs:
        (folder / PROGRAMS / program.file).touch()
    if tokenizer is not None:
        (folder / TOKENIZER).mkdir()
        tokenizer.save(str(folder / TOKENIZER / "tokenizer.json"))
    manifest.save(folder)
    return manifest


class ToyRunner:
    """Has the interface of `ModelRunner`. ``executables`` is a folder for the sampler's compiled programs."""

    def __init__(
        self,
        executables,
        folder,
        manifest,
        *,
        num_pages=None,
        kv_cache_bytes=None,
        memory_share=None,
        forbid_compiles,
        progress,
    ):
        self._manifest = manifest
        self.num_pages = num_pages or manifest.num_pages
        self.executables = ExecutableCache(executables)
        self.executables.forbid_compiles = forbid_compiles
        self.compiles = 0
        self.steps = []  # tokens, requests and samples of every step, without padding
        self.break_row = None  # gives the logits of requests whose context begins with this token NaN
        self.fail = None  # an exception to raise at the next step
        self._pages = np.full((self.num_pages, manifest.page_size), -1)
        self._positions = np.full((self.num_pages, manifest.page_size), -1)

    def warm_up(self):
        pass

    def close(self):
        pass

    def bucket(self, tokens, requests, samples):
        for p in sorted(self._manifest.programs, key=lambda p: (p.tokens, p.samples, p.requests)):
            fits = p.tokens >= tokens and p.requests >= requests and p.samples >= samples
            if fits and (tokens == requests or not p.is_decode):
                return p
        raise AssertionError(f"no program for {tokens} tokens, {requests} requests, {samples} samples")

    def execute(self, program, batch, rows=None):
        if self.fail is not None:
            raise self.fail
        count = int((batch.contexts > 0).sum())
        total = int(batch.starts[count])
        self._check_shapes(program, batch)
        self._check_padding(program, batch, count, total)
        for row in range(count):
            self._write_row(batch, row)
        logits = np.zeros((program.samples, VOCAB), np.float32)
        for i, index in enumerate(batch.samples):
            context = self._context(batch, int(batch.rows[index]), int(batch.positions[index]))
            logits[i] = np.nan if self.break_row == context[0] else toy_logits(context)
        self.steps.append((total, count, len(set(batch.samples.tolist()))))
        logits = jnp.asarray(logits)
        return logits, greedy_tokens(logits) if rows is None else draw_tokens(logits, rows)

    def _check_shapes(self, program, batch):
        t, r, s = program.tokens, program.requests, program.samples
        width = self._manifest.pages_per_request
        expected = [(t,), (t,), (t,), (t,), (r + 1,), (r,), (r, width), (), (s,)]
        assert [field.shape for field in batch] == expected
        assert all(field.dtype == np.int32 for field in batch)

    def _check_padding(self, program, batch, count, total):
        assert count > 0 and (batch.contexts[count:] == 0).all() and (batch.starts[count:] == total).all()
        assert (batch.rows[total:] == program.requests - 1).all()
        assert not batch.tokens[total:].any() and not batch.positions[total:].any() and not batch.slots[total:].any()
        assert not batch.tables[count:].any()
        assert (batch.samples < total).all()
        lengths = np.diff(batch.starts[: count + 1])
        assert (lengths > 0).all() and (lengths[: batch.decodes] == 1).all()
        if program.is_decode:
            assert batch.decodes == count

    def _write_row(self, batch, row):
        start, end = batch.starts[row], batch.starts[row + 1]
        assert (batch.rows[start:end] == row).all()
        positions = np.arange(batch.contexts[row] - (end - start), batch.contexts[row])
        assert batch.positions[start:end].tolist() == positions.tolist()
        size = self._manifest.page_size
        pages = batch.tables[row, positions // size]
        assert (pages > 0).all() and (pages < self.num_pages).all(), "no token is kept in the null page"
        assert batch.slots[start:end].tolist() == (pages * size + positions % size).tolist()
        self._pages[pages, positions % size] = batch.tokens[start:end]
        self._positions[pages, positions % size] = positions

    def _context(self, batch, row, position):
        positions = np.arange(position + 1)
        size = self._manifest.page_size
        pages = batch.tables[row, positions // size]
        assert (self._positions[pages, positions % size] == positions).all(), "the context has holes"
        return self._pages[pages, positions % size].tolist()
