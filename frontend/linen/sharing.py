"""``share_scope``: two modules at one place in the tree."""

from __future__ import annotations

from distaff.frontend import errors
from distaff.frontend.core.scope import Scope
from distaff.frontend.linen.module_base import ModuleBase


def share_scope(module: ModuleBase, other: ModuleBase, /) -> None:
    """Let two modules share variables' place in the tree, for wrappers that must not add a level; call it in ``setup``.

    ``module`` takes the place of ``other``; if ``other`` is below ``module``, it is the other way round.
    """
    if module.scope is None or other.scope is None:
        raise errors.CallShareScopeOnUnboundModuleError()
    ancestor: Scope | None = other.scope
    while ancestor is not None and ancestor is not module.scope:
        ancestor = ancestor.parent
    moved, place = (module, other.scope) if ancestor is None else (other, module.scope)
    old = moved.scope
    object.__setattr__(moved, "scope", place)
    for child in moved._state.children.values():
        if isinstance(child, ModuleBase) and child.scope and child.scope.parent == old:
            place.reserve(child.scope.path[-1])
            child.scope.parent = place
