"""What the compiler says when it will not serve a model: one class an error.

Every refusal carries the operation, the user's line, the reason and what to change.
"""

from __future__ import annotations

from distaff.compiler.ir.location import UNKNOWN, Location


class CompileError(Exception):
    """Base of all errors of the compiler."""


class ModelRefusedError(CompileError):
    """The model cannot be served token by token, or it could not be proved that it can.

    Attributes: ``operation`` (primitive), ``location`` (user's line), ``reason``, ``fix`` (what to change).
    """

    title = "cannot serve this model"

    def __init__(self, operation: str, location: Location, reason: str, fix: str) -> None:
        self.operation, self.location, self.reason, self.fix = operation, location or UNKNOWN, reason, fix
        frames = "".join(f"\n    called from {frame}" for frame in self.location.frames[1:3])
        super().__init__(f"{self.title}: {operation} at {self.location}{frames}\n  why: {reason}\n  fix: {fix}")


class MixesTokensError(ModelRefusedError):
    """An operation other than attention lets tokens see each other."""

    title = "tokens are mixed outside attention"


class NotCausalError(ModelRefusedError):
    """A query can see a later key, or it could not be proved that it cannot."""

    title = "attention is not causal"


class LengthLeakError(ModelRefusedError):
    """The program depends on the sequence length other than through shapes."""

    title = "the sequence length leaks into the program"


class UnsupportedOperationError(ModelRefusedError):
    """A primitive without a rule, or one that serving cannot express."""

    title = "operation without a serving rule"


class ModelSignatureError(CompileError):
    """The callable does not map ``(params, tokens int[1, S])`` to ``logits[1, S, vocab]`` or ``[1, vocab]``."""


class ValidationError(CompileError):
    """The derived program differs from the plain model by more than the tolerance."""


class VerificationError(CompileError):
    """A pass produced an ill-formed graph: a defect of the compiler, not of the model."""
