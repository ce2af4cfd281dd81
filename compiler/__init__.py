"""The compiler: from a plain JAX callable to an artifact that the runtime serves.

`compile_model` is the whole way; `derive_serve_step` stops at a function that can be run and inspected.
"""

from distaff.compiler.analysis.dims import register_dim_map
from distaff.compiler.artifact import ArtifactError, Manifest
from distaff.compiler.compile import compile_model
from distaff.compiler.errors import (
    CompileError,
    LengthLeakError,
    MixesTokensError,
    ModelRefusedError,
    ModelSignatureError,
    NotCausalError,
    UnsupportedOperationError,
    ValidationError,
    VerificationError,
)
from distaff.compiler.pipeline import derive, derive_serve_step

__all__ = [
    "ArtifactError",
    "CompileError",
    "LengthLeakError",
    "Manifest",
    "MixesTokensError",
    "ModelRefusedError",
    "ModelSignatureError",
    "NotCausalError",
    "UnsupportedOperationError",
    "ValidationError",
    "VerificationError",
    "compile_model",
    "derive",
    "derive_serve_step",
    "register_dim_map",
]
