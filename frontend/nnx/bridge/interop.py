"""Modules of plain NNX and of Linen as submodules of a ``bridge.Module``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distaff.frontend import linen
from distaff.frontend.nnx.bridge.module import adopt, running_parent
from distaff.frontend.nnx.bridge.wrappers import ToNNX, set_initializing
from distaff.frontend.nnx.graph_functions import state, update
from distaff.frontend.nnx.module import Module
from distaff.frontend.nnx.rngs import Rngs, RngState
from distaff.frontend.nnx.transforms.abstract import eval_shape


def nnx_in_bridge_mdl(factory: Callable[[Rngs], Module], name: str | None = None) -> Any:
    """A module of NNX as submodule of the ``bridge.Module`` that runs.

    >>> class Model(bridge.Module):
    ...     @bridge.compact
    ...     def __call__(self, x):
    ...         return bridge.nnx_in_bridge_mdl(lambda rngs: nnx.Linear(3, 4, rngs=rngs))(x)

    Args:
        factory: makes the module. In ``apply`` only its random streams are computed; variables are those given.
        name: of the submodule in a compact method; in ``setup`` it is that of the attribute.

    Raises:
        ValueError: no ``bridge.Module`` runs.
    """
    context, scope = running_parent("A submodule of NNX")
    if scope.initializing:
        module: Any = factory(scope.rngs)
    else:
        rngs = scope.rngs if len(scope.rngs) else Rngs(0)
        module = eval_shape(factory, rngs, graph=True)
        if state(module, RngState):
            update(module, state(factory(rngs), RngState))
    if context.in_compact:
        return adopt(context.module, name or context.next_name(type(module)), module)
    return module


def linen_in_bridge_mdl(linen_module: linen.Module, name: str | None = None) -> Any:
    """A module of Linen as submodule of the ``bridge.Module`` that runs, in a ``ToNNX``; as ``nnx_in_bridge_mdl``."""
    context, scope = running_parent("A submodule of Linen")
    module = ToNNX(linen_module, scope.rngs)
    set_initializing(module, scope.initializing)
    if context.in_compact:
        return adopt(context.module, name or context.next_name(type(linen_module)), module)
    return module
