"""Which JAX transform is running: variables must not be assigned values that it will not let out."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax

from distaff.frontend import errors, jax_compat


def current_trace() -> Hashable:
    """What identifies the innermost running JAX transform."""
    return jax_compat.current_trace()


def check_trace_level(base_level: Hashable) -> None:
    """Raise JaxTransformError unless the innermost running transform is that of ``base_level``."""
    if current_trace() != base_level:
        raise errors.JaxTransformError()


def check_no_leak(value: Any, home: Hashable, what: str, path: str) -> None:
    """Raise JaxTransformError if ``value`` belongs to a transform entered since ``home`` was the current trace.

    Args:
        value: what is to be stored, a tree.
        home: ``current_trace()`` where the variables were made.
        what, path: the variable and the module, for the message.
    """
    if any(map(_is_tracer, jax.tree.leaves(value))) and current_trace() != home:
        leaked = [leaf for leaf in jax.tree.leaves(value) if jax_compat.made_by_current_trace(leaf)]
        if leaked:
            raise errors.JaxTransformError(what, path)


def _is_tracer(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)
