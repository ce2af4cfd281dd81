"""Lifted ``remat``: intermediate values are computed again for gradients instead of kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from distaff.frontend.core.filters import CollectionFilter
from distaff.frontend.core.lift.pack import Groups, pack


def checkpoint(
    fn: Callable[..., Any],
    variables: CollectionFilter = True,
    rngs: CollectionFilter = True,
    concrete: bool = False,
    prevent_cse: bool = True,
    static_argnums: int | tuple[int, ...] = (),
    policy: Callable[..., bool] | None = None,
) -> Callable[..., Any]:
    """Lifted ``jax.checkpoint`` of ``fn(scope, *args)``, also named ``remat``.

    Args:
        variables, rngs: the collections and random streams that are seen inside.
        concrete: must be False; use ``static_argnums``.
        static_argnums: arguments (counted without the scope) that stay Python values.
        prevent_cse, policy: as for ``jax.checkpoint``.
    """
    if concrete:
        raise NotImplementedError("remat takes no concrete=True any more; name Python values with static_argnums.")
    # The variables and the keys come before the arguments.
    static = jax.tree.map(lambda number: number + 2, static_argnums)

    def run(
        scope_fn: Callable[..., Any],
        repack_fn: Callable[..., Any],
        variables: Groups,
        rngs: Groups,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        def pure(variables: Groups, rngs: Groups, *args: Any, **kwargs: Any) -> Any:
            scope = scope_fn(variables, rngs)
            output = fn(scope, *args, **kwargs)
            return output, repack_fn(scope)

        rematted = jax.checkpoint(pure, static_argnums=static, prevent_cse=prevent_cse, policy=policy)
        return rematted(variables, rngs, *args, **kwargs)

    return pack(run, (variables,), (variables,), (rngs,), name="remat", enable_kwargs=True)


remat = checkpoint
