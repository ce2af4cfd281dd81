"""The compiler: from a plain JAX callable to an artifact that the runtime serves.

`compile_model` is the whole way; `derive_serve_step` stops at a function that can be run and inspected. Names are
imported when they are first used: the runtime reads manifests through this package and needs none of the passes.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distaff.compiler.analysis.dims import register_dim_map as register_dim_map
    from distaff.compiler.artifact import ArtifactError as ArtifactError
    from distaff.compiler.artifact import Manifest as Manifest
    from distaff.compiler.compile import compile_model as compile_model
    from distaff.compiler.errors import CompileError as CompileError
    from distaff.compiler.errors import LengthLeakError as LengthLeakError
    from distaff.compiler.errors import MixesTokensError as MixesTokensError
    from distaff.compiler.errors import ModelRefusedError as ModelRefusedError
    from distaff.compiler.errors import ModelSignatureError as ModelSignatureError
    from distaff.compiler.errors import NotCausalError as NotCausalError
    from distaff.compiler.errors import UnsupportedOperationError as UnsupportedOperationError
    from distaff.compiler.errors import ValidationError as ValidationError
    from distaff.compiler.errors import VerificationError as VerificationError
    from distaff.compiler.pipeline import derive as derive
    from distaff.compiler.pipeline import derive_serve_step as derive_serve_step

_ERRORS = """CompileError LengthLeakError MixesTokensError ModelRefusedError ModelSignatureError NotCausalError
UnsupportedOperationError ValidationError VerificationError""".split()
_HOMES = {
    **{name: "errors" for name in _ERRORS},
    "ArtifactError": "artifact",
    "Manifest": "artifact",
    "compile_model": "compile",
    "derive": "pipeline",
    "derive_serve_step": "pipeline",
    "register_dim_map": "analysis.dims",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
