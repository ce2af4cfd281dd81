"""Sampling on the device: which program a batch needs, and the parameters and state of its rows.

The step's own program draws tokens, greedily or at random. Where a request has a state (penalties, biases, masks), a
program of its own draws them again from changed logits. The state lives on the device; a request's line is written when
it is admitted and from then on the program itself counts the tokens that it samples. Log-probabilities are a program of
their own as well, run only for those who asked.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import math
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from distaff.kernels import native, sampling
from distaff.kernels.sampling import SamplingRows, TokenLogprobs
from distaff.runtime import logits as device
from distaff.runtime.bad_words import forbidden_tokens
from distaff.runtime.logits import SamplerState
from distaff.runtime.request import Request
from distaff.runtime.sampling_params import SamplingParams

_ALL_BITS = 2**64 - 1
_FLOAT32 = np.finfo(np.float32)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Executables(Protocol):
    """Where compiled programs come from (`distaff.runtime.executables.ExecutableCache`)."""

    forbid_compiles: bool

    def get(self, name: str, jitted: Any, *arguments: Any, program: str | None = None) -> Callable[..., Any]:
        """The executable of ``jitted`` for ``arguments``."""

    def has(self, name: str, *arguments: Any, program: str) -> bool:
        """Whether `get` would load it and not compile."""


class Method(enum.IntEnum):
    """What a request needs; a batch is sampled as its most demanding row wants it."""

    GREEDY = 0
    RANDOM = 1
    STATEFUL = 2


def method_of(params: SamplingParams) -> Method:
    """The cheapest method that does what ``params`` ask for."""
    penalised = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
    masked = params.allowed_token_ids is not None or params.bad_words or params.min_tokens
    if penalised or params.logit_bias or masked:
        return Method.STATEFUL
    return Method.GREEDY if params.is_greedy else Method.RANDOM


def uniform(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """One number in [0, 1) for each seed and position: SplitMix64 (Steele, Lea and Flood, 2014) in counter mode.

    Drawn on the host, because a counter-based generator in every sampling program would double the time to compile it.
    """
    bits = _mix(_mix(seeds + _GOLDEN) + positions.astype(np.uint64) * _GOLDEN)
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def _mix(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


class Sampler:
    """Samples for up to ``max_rows`` requests at a time; every request keeps one row from admission to its end.

    ``top`` is the largest number of top log-probabilities that a request may ask for.
    """

    def __init__(self, vocab_size: int, max_rows: int, top: int, executables: Executables) -> None:
        self._vocab_size = vocab_size
        self._max_rows = max_rows
        self._top = top
        self._executables = executables
        native.register()  # stored programs may call what they were compiled with
        self._programs: dict[str, Callable[..., Any]] = {}
        # One row more than requests: padding, which is greedy and outside of the state.
        self._methods = np.zeros(max_rows + 1, np.int32)
        self._floats = np.zeros((max_rows + 1, 7), np.float32)
        self._ints = np.zeros((max_rows + 1, 4), np.int32)
        self._ints[:, 0] = np.arange(max_rows + 1)
        self._seeds = np.zeros(max_rows + 1, np.uint64)
        self._forbidden: dict[int, frozenset[int]] = {}  # of rows with a state: what bad words mask in it
        self._state: SamplerState | None = None

    def admit(self, row: int, request: Request, seed: int) -> None:
        """Gives ``row`` to a request, new or resumed after some output.

        Equal 64-bit seeds give equal draws at equal output positions, whatever else is in the batch.
        """
        p = request.sampling_params
        self._methods[row] = method_of(p)
        sharpness, top_p, min_p = (0.0, 1.0, 0.0) if p.is_greedy else (1 / p.temperature, p.top_p, p.min_p)
        log_min_p = math.log(min_p) if min_p > 0 else -math.inf
        # As a normal float32: zero and infinity would turn logits into NaN.
        repetition = min(max(p.repetition_penalty, float(_FLOAT32.tiny)), float(_FLOAT32.max))
        penalties = (p.presence_penalty, p.frequency_penalty, repetition)
        self._floats[row] = (sharpness, top_p, log_min_p, *penalties, 0)
        self._ints[row, 1:] = (0, p.top_k if not p.is_greedy and 0 < p.top_k < self._vocab_size else 0, p.min_tokens)
        self._seeds[row] = seed & _ALL_BITS
        if self._methods[row] == Method.STATEFUL:
            self._forbidden[row] = forbidden_tokens(request.bad_words, request.output_token_ids)
            self._write_line(row, request)

    def forbid(self, row: int, request: Request) -> None:
        """Brings the tokens that may not come next up to date, for a request with bad words."""
        forbidden = forbidden_tokens(request.bad_words, request.output_token_ids)
        if forbidden != self._forbidden[row]:
            self._forbidden[row] = forbidden
            self._write_line(row, request)

    def _write_line(self, row: int, request: Request) -> None:
        line = self._line(request, self._forbidden[row])
        self._state = self._program("write-row")(self._allocated(), np.int32(row), line)

    def _line(self, request: Request, forbidden: Collection[int]) -> SamplerState:
        """A request's line of the state."""
        params, size = request.sampling_params, self._vocab_size
        in_prompt, ends = np.zeros(size, np.bool_), np.zeros(size, np.bool_)
        in_prompt[list(request.prompt_token_ids)] = True
        ends[list(request.end_token_ids)] = True
        bias = np.zeros(size, np.float32)
        if params.allowed_token_ids is not None:
            bias[:] = -np.inf
            bias[list(params.allowed_token_ids)] = 0
        for token_id, value in (params.logit_bias or {}).items():
            bias[token_id] += value
        bias[list(forbidden)] = -np.inf
        counts = np.bincount(np.array(request.output_token_ids, np.int64), minlength=size).astype(np.int32)
        arrays: list[Any] = [counts, in_prompt, bias, ends]
        return SamplerState(*arrays)

    def _allocated(self) -> SamplerState:
        """The state; made when a request first needs it, because with large vocabularies it is not small."""
        if self._state is None:
            shapes = self._abstract_state(self._max_rows)
            # Uploaded, because zeros made on the device would be one more program to compile.
            self._state = SamplerState(*(jax.device_put(np.zeros(leaf.shape, leaf.dtype)) for leaf in shapes))
        return self._state

    def parameters(
        self, size: int, rows: npt.NDArray[np.int32], positions: npt.NDArray[np.int32]
    ) -> tuple[Method, SamplingRows]:
        """How a batch of ``size`` rows is sampled: the method, and by which parameters.

        The first are the requests in ``rows``, which have generated ``positions`` tokens before this one.
        """
        method = Method(self._methods[rows].max())
        padded = np.full(size, self._max_rows)
        padded[: len(rows)] = rows
        floats, ints = self._floats[padded], self._ints[padded]
        ints[: len(rows), 1] = positions
        if method != Method.GREEDY:
            floats[:, 6] = uniform(self._seeds[padded], ints[:, 1])
        packed: list[Any] = [floats, ints]
        return method, SamplingRows(*packed)

    def sample_with_state(self, logits: jax.Array, parameters: SamplingRows) -> jax.Array:
        """Tokens for the rows of ``logits`` [S, V], of which some have a state; int32 [S] on the device.

        A token is `INVALID_TOKEN` where the logits are not finite or the masks allow no token.
        """
        tokens, self._state = self._program("stateful", logits.shape[0])(logits, parameters, self._allocated())
        return cast(jax.Array, tokens)

    def logprobs(self, logits: jax.Array, tokens: jax.Array | npt.NDArray[np.int32]) -> TokenLogprobs:
        """Raw log-probabilities of ``tokens`` (int32 [S]) and of the most likely tokens at each row of ``logits``."""
        return cast(TokenLogprobs, self._program("logprobs", logits.shape[0])(logits, tokens))

    def warm_up(self, sample_sizes: Iterable[int], scoring_sizes: Iterable[int]) -> None:
        """Compiles what is not stored yet: for batches of ``sample_sizes`` rows, and log-probabilities of both.

        Stored programs are loaded when they are first needed.
        """
        sampled = set(sample_sizes)
        wanted = [("stateful", size) for size in sorted(sampled)]
        wanted += [("logprobs", size) for size in sorted(sampled | set(scoring_sizes))]
        wanted.append(("write-row", 0))
        forbidden, self._executables.forbid_compiles = self._executables.forbid_compiles, False
        try:
            for kind, size in wanted:
                name, _, arguments = self._specification(kind, size)
                if not self._executables.has(name, *arguments, program=_program_hash()):
                    self._program(kind, size)
        finally:
            self._executables.forbid_compiles = forbidden

    def _program(self, kind: str, size: int = 0) -> Callable[..., Any]:
        key = f"{kind}-{size}"
        if key not in self._programs:
            name, jitted, arguments = self._specification(kind, size)
            self._programs[key] = self._executables.get(name, jitted, *arguments, program=_program_hash())
        return self._programs[key]

    def _specification(self, kind: str, size: int) -> tuple[str, Any, list[Any]]:
        """Name, function and abstract arguments of the program for batches of ``size`` rows."""
        logits = _abstract((size, self._vocab_size), jnp.float32)
        rows = SamplingRows(*cast(Any, sampling.sampling_shapes(size)))
        if kind == "stateful":
            jitted = jax.jit(device.sample_with_state, donate_argnums=2)
            return f"sample-stateful-{size}", jitted, [logits, rows, self._abstract_state(self._max_rows)]
        if kind == "logprobs":
            jitted = jax.jit(functools.partial(sampling.token_logprobs, top=self._top))
            return f"logprobs-{size}-top-{self._top}", jitted, [logits, _abstract((size,), jnp.int32)]
        jitted = jax.jit(device.write_row, donate_argnums=0)
        arguments = [self._abstract_state(self._max_rows), _abstract((), jnp.int32), self._abstract_state()]
        return "sampler-write-row", jitted, arguments

    def _abstract_state(self, *rows: int) -> SamplerState:
        shape = (*rows, self._vocab_size)
        return SamplerState(*(_abstract(shape, dtype) for dtype in (jnp.int32, jnp.bool_, jnp.float32, jnp.bool_)))


def _abstract(shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


@functools.cache
def _program_hash() -> str:
    """Identifies what the programs compute, so that stored ones can be found without tracing.

    That is their source, and which implementations serve: a program that calls native code must not be loaded by an
    installation that has none.
    """
    files = [Path(device.__file__), *sorted(Path(sampling.__file__).parent.glob("*.py"))]
    source = b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(source + repr(sampling.serving()).encode()).hexdigest()
