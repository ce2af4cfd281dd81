"""Functions of a scope as pure functions of variables and random keys: ``bind``, ``apply`` and ``init``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from distaff.frontend import errors, jax_compat
from distaff.frontend.core.filters import CollectionFilter, in_filter
from distaff.frontend.core.frozen_dict import unfreeze
from distaff.frontend.core.rng import LazyRng, PRNGKey, is_valid_rng, is_valid_rngs
from distaff.frontend.core.scope import Scope


def bind(
    variables: Mapping[str, Any],
    rngs: Mapping[str, PRNGKey | LazyRng] | None = None,
    mutable: CollectionFilter = False,
    flags: Mapping[str, Any] | None = None,
) -> Scope:
    """A root scope over copies of the mutable and references to the other variables.

    Raises:
        ApplyScopeInvalidVariablesTypeError: ``variables`` is not a dict of collections.
        InvalidRngError: ``rngs`` is not a mapping of stream names to keys.
    """
    if not _is_valid_variables(variables):
        raise errors.ApplyScopeInvalidVariablesTypeError()
    if rngs is not None and not is_valid_rngs(rngs):
        raise errors.InvalidRngError(f"rngs must map stream names to keys made by jax.random.key, got {rngs!r}.")
    own = {col: unfreeze(value) if in_filter(mutable, col) else value for col, value in variables.items()}
    return Scope(own, rngs=rngs, mutable=mutable, flags=flags)


def apply(
    fn: Callable[..., Any], mutable: CollectionFilter = False, flags: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Turn ``fn(scope, *args)`` into ``(variables, *args, rngs=None) -> output``, or ``(output, updated variables)``.

    The second form is that of any ``mutable`` other than False; the updated variables are the mutable collections.
    """

    @functools.wraps(fn)
    def call(
        variables: Mapping[str, Any],
        *args: Any,
        rngs: PRNGKey | Mapping[str, PRNGKey | LazyRng] | None = None,
        **kwargs: Any,
    ) -> Any:
        if rngs is not None and not is_valid_rng(rngs) and not is_valid_rngs(rngs):
            raise ValueError(
                "The ``rngs`` argument passed to an apply function should be a ``jax.PRNGKey`` or a dict of them by "
                f"stream name; got {rngs!r}."
            )
        if rngs is not None and not isinstance(rngs, Mapping):
            rngs = {"params": rngs}
        root = bind(variables, rngs=rngs, mutable=mutable, flags=flags)
        params = variables.get("params")
        if isinstance(params, Mapping) and "params" in params:
            raise errors.ApplyScopeInvalidVariablesStructureError(variables)
        with root.temporary():
            output = fn(root, *args, **kwargs)
        return output if mutable is False else (output, root.mutable_variables())

    return call


def init(
    fn: Callable[..., Any], mutable: CollectionFilter = True, flags: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Turn ``fn(scope, *args)`` into ``(rngs, *args) -> (output, variables)``, starting from no variables.

    ``rngs`` is a key, used for the stream ``params``, or a mapping of stream names to keys; ValueError if neither.
    """
    run = apply(fn, mutable=mutable, flags={**(flags or {}), "initializing": True})

    @functools.wraps(fn)
    def call(rngs: PRNGKey | Mapping[str, PRNGKey | LazyRng], *args: Any, **kwargs: Any) -> Any:
        if not is_valid_rng(rngs) and not is_valid_rngs(rngs):
            raise ValueError(
                "First argument passed to an init function should be a ``jax.PRNGKey`` or a dict of them by stream "
                f"name; got {rngs!r}."
            )
        return run({}, *args, rngs=rngs, **kwargs)

    return call


def lazy_init(
    fn: Callable[..., Any], mutable: CollectionFilter = True, flags: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """As ``init``, but the result takes ``jax.ShapeDtypeStruct`` for inputs of which only the shape matters.

    It returns the variables alone, and computes nothing else. ``LazyInitError``: a variable depends on such an input.
    """
    return lazy_variables(lambda *args, **kwargs: init(fn, mutable, flags)(*args, **kwargs)[1])


def lazy_variables(make: Callable[..., Any]) -> Callable[..., Any]:
    """``make(*args, **kwargs)``, computing only what does not depend on ``jax.ShapeDtypeStruct`` arguments.

    Raises:
        LazyInitError: its result does.
    """

    @functools.wraps(make)
    def call(*args: Any, **kwargs: Any) -> Any:
        made = jax_compat.evaluate_known(lambda args, kwargs: make(*args, **kwargs), args, kwargs)
        for leaf in jax.tree.leaves(made):
            if isinstance(leaf, jax_compat.Unknown):
                raise errors.LazyInitError(leaf.aval)
        return made

    return call


def _is_valid_variables(variables: Any) -> bool:
    return isinstance(variables, Mapping) and all(
        isinstance(col, str) and isinstance(values, Mapping) and all(isinstance(name, str) for name in values)
        for col, values in variables.items()
    )
