"""The native CPU kernels: C++ behind `jax.ffi`, built with the package where there is a compiler.

`available` says whether they can be used, and `register` makes XLA know them; both are cheap to call again.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import jax


@functools.cache
def _library() -> ModuleType | None:
    try:
        return importlib.import_module("distaff.kernels._native")
    except ImportError:
        return None


def available() -> bool:
    """Whether the extension module was built with this installation."""
    return _library() is not None


def features() -> tuple[str, ...]:
    """The instruction sets that the kernels use on this processor, the plainest first; empty without the module."""
    library = _library()
    return () if library is None else tuple(library.features())


def timings() -> dict[str, tuple[int, float]]:
    """Calls and seconds of each kernel in this process so far; empty without the module."""
    library = _library()
    return {} if library is None else dict(library.timings())


@functools.cache
def register() -> frozenset[str]:
    """Registers every kernel with XLA and returns their target names; none without the module."""
    library = _library()
    if library is None:
        return frozenset()
    for name, capsule in library.handlers().items():
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    return frozenset(library.handlers())
