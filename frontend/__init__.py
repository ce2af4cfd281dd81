"""What people write models with: Linen modules, model families, checkpoint loading."""

import importlib
from typing import Any

from distaff.frontend.configurations import config as config
from distaff.frontend.version import __version__ as __version__

# ``import distaff.frontend as flax``: these are reached as its attributes, and imported when they are.
_ON_DEMAND = """
    core cursor errors ids io jax_utils linen nnx serialization struct training traverse_util typing version
""".split()


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
