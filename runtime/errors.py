"""Errors of the runtime: one class for each thing that can go wrong; every message says what to do about it.

Errors that are also `ValueError` are the caller's mistake and leave the engine unchanged. Two more live beside what
they describe: ``ArtifactError`` (``distaff.compiler.artifact``) and ``SamplingParamsError`` (``sampling_params``).
"""

from __future__ import annotations


class EngineConfigError(ValueError):
    """A setting of `EngineConfig` is invalid, or asks for more than the artifact was compiled for."""


class PromptError(ValueError):
    """A prompt cannot be served: empty, longer than the model allows, or with token ids outside the vocabulary."""


class DuplicateRequestError(ValueError):
    """A request has the id of one that is still running."""


class TokenizerError(Exception):
    """The artifact has no usable tokenizer, and the call needs one."""


class ChatTemplateError(ValueError):
    """A conversation could not be rendered: no template, a broken one, or messages that it refuses."""


class EngineOverloadedError(Exception):
    """The waiting queue is full. ``retry_after`` estimates, in seconds, when there will be room."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(
            f"{waiting} requests are waiting, which is the limit (max_waiting); try again in {retry_after:.0f} s"
        )
        self.waiting = waiting
        self.retry_after = retry_after


class EngineDeadError(Exception):
    """The engine's loop stopped, by an exception (which is the cause) or by shutdown; start a new engine."""
