"""What initialisers would do, found without running them: the shapes that they make, and whether they use their key.

``Scope.param`` checks every given parameter against its initialiser at every trace. Tracing the initialiser for that
(``jax.eval_shape``) costs more than the rest of a layer, so it is done only for initialisers that are not known, and
the answer is kept for as long as the initialiser lives.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np

Shapes: TypeAlias = tuple[tuple[Any, ...], ...]
F = TypeVar("F", bound=Callable[..., Any])

_known: weakref.WeakKeyDictionary[Callable[..., Any], dict[Any, Shapes]] = weakref.WeakKeyDictionary()
# Of JAX's initialisers, the functions and the closures. Each makes the shape that is its second argument.
_JAX_MODULES = frozenset({jax.nn.initializers.zeros.__module__, jax.nn.initializers.normal().__module__})


def makes_requested_shape(init_fn: F) -> F:
    """Mark an initialiser ``(key, shape, ...)`` as one that returns an array of exactly that shape."""
    init_fn.makes_requested_shape = True  # type: ignore[attr-defined]
    return init_fn


def ignores_key(init_fn: Callable[..., Any]) -> bool:
    """Whether the value of an initialiser is known not to depend on its key, so that none needs to be made."""
    return init_fn is jax.nn.initializers.zeros or init_fn is jax.nn.initializers.ones


def initializer_shapes(init_fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Shapes:
    """The shapes of the leaves of ``init_fn(key, *args, **kwargs)``."""
    trusted = getattr(init_fn, "__module__", None) in _JAX_MODULES or hasattr(init_fn, "makes_requested_shape")
    shape = args[0] if args else kwargs.get("shape")
    if trusted and isinstance(shape, tuple | list):
        return (tuple(shape),)
    try:
        shapes = _known.setdefault(init_fn, {})
        request = (tuple(shape) if isinstance(shape, list) else shape, args[1:], tuple(kwargs.items()))
        if request not in shapes:
            shapes[request] = _traced_shapes(init_fn, args, kwargs)
        return shapes[request]
    except TypeError:  # the function allows no weak reference, or an argument has no hash
        return _traced_shapes(init_fn, args, kwargs)


def _traced_shapes(init_fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Shapes:
    made = jax.eval_shape(lambda: init_fn(jax.random.key(0), *args, **kwargs))
    return tuple(np.shape(leaf) for leaf in jax.tree.leaves(made))
