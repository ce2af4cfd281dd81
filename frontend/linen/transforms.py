"""JAX transforms of modules: ``nn.vmap``, ``nn.scan``, ``nn.jit``, ``nn.remat``, ``nn.vjp`` and so on.

Those defined here take a module class, or a function with a module as first argument, and return one of the same kind.
Those of ``function_transforms`` take functions, a module and arguments, and run at once.

What each parameter of a transform means for variables and random keys is documented in ``distaff.frontend.core.lift``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from distaff.frontend.core import lift, meta
from distaff.frontend.core.filters import CollectionFilter
from distaff.frontend.core.lift.axes import InOutAxis, InOutScanAxis
from distaff.frontend.linen.context import context
from distaff.frontend.linen.fingerprint import _HashableProxy as _HashableProxy
from distaff.frontend.linen.function_transforms import cond as cond
from distaff.frontend.linen.function_transforms import custom_vjp as custom_vjp
from distaff.frontend.linen.function_transforms import grad as grad
from distaff.frontend.linen.function_transforms import jvp as jvp
from distaff.frontend.linen.function_transforms import switch as switch
from distaff.frontend.linen.function_transforms import value_and_grad as value_and_grad
from distaff.frontend.linen.function_transforms import vjp as vjp
from distaff.frontend.linen.function_transforms import while_loop as while_loop
from distaff.frontend.linen.lifting import lift_transform
from distaff.frontend.linen.module import Module

Target = TypeVar("Target", bound="type[Module] | Callable[..., Any]")
Methods = Sequence[str] | Mapping[str, Mapping[str, Any]] | None


def vmap(
    target: Target,
    variable_axes: Mapping[Any, InOutAxis] | None = None,
    split_rngs: Mapping[Any, bool] | None = None,
    in_axes: Any = 0,
    out_axes: Any = 0,
    axis_size: int | None = None,
    axis_name: str | None = None,
    spmd_axis_name: str | None = None,
    metadata_params: Mapping[Any, Any] | None = None,
    methods: Methods = None,
) -> Target:
    """``jax.vmap`` of a module: over its inputs, and over variables if each row is to have its own.

    >>> Ensemble = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})  # own parameters
    >>> Shared = nn.vmap(nn.Dense, variable_axes={"params": None}, split_rngs={"params": False})

    Args:
        target: a module class or a function of a module.
        variable_axes: for each collection the axis along which rows have their own variables; None: they share them.
            A collection that is not listed is not seen inside.
        split_rngs: for each random stream whether rows draw different keys; one not listed is not seen inside.
        in_axes, out_axes, axis_size, axis_name, spmd_axis_name: as for ``jax.vmap``.
        metadata_params: what names the new axis in metadata boxes, as ``{nn.PARTITION_NAME: "ensemble"}``.
        methods: of a class, the methods to transform, or options by method; by default ``__call__``.

    Raises:
        ValueError: the size of the axis is not known, or inputs disagree on it.
        TransformTargetError: ``target`` is neither a module class nor a function.
    """
    return lift_transform(  # type: ignore[no-any-return]
        lift.vmap,
        target,
        methods=methods,
        variable_axes=variable_axes or {},
        split_rngs=split_rngs or {},
        in_axes=in_axes,
        out_axes=out_axes,
        axis_size=axis_size,
        axis_name=axis_name,
        spmd_axis_name=spmd_axis_name,
        metadata_params=metadata_params,
    )


def scan(
    target: Target,
    variable_axes: Mapping[Any, InOutScanAxis] | None = None,
    variable_broadcast: CollectionFilter = False,
    variable_carry: CollectionFilter = False,
    split_rngs: Mapping[Any, bool] | None = None,
    in_axes: Any = 0,
    out_axes: Any = 0,
    length: int | None = None,
    reverse: bool = False,
    unroll: int = 1,
    data_transform: Callable[..., Any] | None = None,
    metadata_params: Mapping[Any, Any] | None = None,
    methods: Methods = None,
    _split_transpose: bool = False,
    check_constancy_invariants: bool = True,
) -> Target:
    """``jax.lax.scan`` of a module ``(carry, *xs) -> (carry, ys)``: over a sequence, or over a stack of layers.

    >>> RNN = nn.scan(Cell, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
    >>> Layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=12)
    >>> x, _ = Layers()(x, None)

    Args:
        target: a module class, or a function ``(module, carry, *xs)``.
        variable_axes: the collections of which each iteration has its own row, and along which axis.
        variable_broadcast: the collections that all iterations share.
        variable_carry: the collections that each iteration gets from the one before.
        split_rngs: for each random stream whether iterations draw different keys.
        in_axes, out_axes: the axes of ``xs`` and ``ys``; ``nn.broadcast`` for what all iterations share.
        length, reverse, unroll: as for ``jax.lax.scan``.
        data_transform: maps the groups of variables and of keys at the start of each iteration.
        metadata_params: what names the new axis in metadata boxes, as ``{nn.PARTITION_NAME: "layers"}``.
        methods: of a class, the methods to transform, or options by method; by default ``__call__``.
        check_constancy_invariants: trace once more to check what iterations share, and to let them make it.

    Raises:
        ValueError: the length is not known, inputs disagree on it, or what iterations share differs between them.
        TransformTargetError: ``target`` is neither a module class nor a function.
    """
    return lift_transform(  # type: ignore[no-any-return]
        lift.scan,
        target,
        methods=methods,
        variable_axes=variable_axes,
        variable_broadcast=variable_broadcast,
        variable_carry=variable_carry,
        split_rngs=split_rngs,
        in_axes=in_axes,
        out_axes=out_axes,
        length=length,
        reverse=reverse,
        unroll=unroll,
        _split_transpose=_split_transpose,
        data_transform=data_transform,
        metadata_params=metadata_params,
        check_constancy_invariants=check_constancy_invariants,
    )


def jit(
    target: Target,
    variables: CollectionFilter = True,
    rngs: CollectionFilter = True,
    static_argnums: int | Iterable[int] = (),
    static_argnames: str | Iterable[str] = (),
    donate_argnums: int | Iterable[int] = (),
    device: Any = None,
    backend: str | None = None,
    methods: Methods = None,
) -> Target:
    """``jax.jit`` of a module, compiled once for all modules of equal configuration and state.

    Args:
        target: a module class or a function of a module.
        variables, rngs: the collections and random streams that are seen inside.
        static_argnums, donate_argnums: arguments, counted with the module as 0.
        static_argnames, device, backend: as for ``jax.jit``.
        methods: of a class, the methods to transform, or options by method; by default ``__call__``.

    Raises:
        ValueError: a field of the module cannot be hashed.
        TransformTargetError: ``target`` is neither a module class nor a function.
    """
    return lift_transform(  # type: ignore[no-any-return]
        lift.jit,
        target,
        methods=methods,
        cached=True,
        variables=variables,
        rngs=rngs,
        static_argnums=static_argnums,
        static_argnames=static_argnames,
        donate_argnums=donate_argnums,
        device=device,
        backend=backend,
    )


def fold_rngs(target: Target, variables: CollectionFilter = True, rngs: CollectionFilter = True) -> Target:
    """The module with the random keys that it would draw under ``nn.jit``, uncompiled."""
    return lift_transform(lift.fold_rngs, target, cached=True, variables=variables, rngs=rngs)  # type: ignore[no-any-return]


def checkpoint(
    target: Target,
    variables: CollectionFilter = True,
    rngs: CollectionFilter = True,
    concrete: bool = False,
    prevent_cse: bool = True,
    static_argnums: int | tuple[int, ...] = (),
    policy: Callable[..., bool] | None = None,
    methods: Methods = None,
) -> Target:
    """``jax.checkpoint`` of a module, also named ``nn.remat``: its insides are computed again for gradients.

    >>> Block = nn.remat(Block, static_argnums=(2,))  # def __call__(self, x, train)

    Args:
        target: a module class or a function of a module.
        variables, rngs: the collections and random streams that are seen inside.
        concrete: must be False.
        static_argnums: arguments, counted with the module as 0, that stay Python values.
        prevent_cse, policy: as for ``jax.checkpoint``.
        methods: of a class, the methods to transform, or options by method; by default ``__call__``.
    """
    return lift_transform(  # type: ignore[no-any-return]
        lift.checkpoint,
        target,
        methods=methods,
        variables=variables,
        rngs=rngs,
        concrete=concrete,
        prevent_cse=prevent_cse,
        static_argnums=jax.tree.map(lambda number: number - 1, static_argnums),
        policy=policy,
    )


remat = checkpoint


def remat_scan(
    target: Target,
    lengths: Sequence[int] = (),
    policy: Callable[..., bool] | None = None,
    variable_broadcast: CollectionFilter = False,
    variable_carry: CollectionFilter = False,
    variable_axes: Mapping[Any, InOutScanAxis] | None = None,
    split_rngs: Mapping[Any, bool] | None = None,
) -> Target:
    """Repeat a module ``carry -> carry`` in nested scans, each recomputed for gradients.

    >>> nn.remat_scan(Block, lengths=(10, 10))()(x)  # 100 blocks in the memory of 20

    Args:
        lengths: the iterations of each loop, from the outermost.
        policy: as for ``jax.checkpoint``.
        variable_broadcast, variable_carry, variable_axes, split_rngs: as for ``nn.scan``; by default every collection
            has an axis 0 for each loop, and every stream is split.
    """
    return lift_transform(  # type: ignore[no-any-return]
        lift.remat_scan,
        target,
        lengths=lengths,
        policy=policy,
        variable_broadcast=variable_broadcast,
        variable_carry=variable_carry,
        variable_axes=variable_axes,
        split_rngs=split_rngs,
    )


def map_variables(
    target: Target,
    mapped_collections: CollectionFilter = True,
    trans_in_fn: Callable[[Any], Any] = lift.id_fn,
    trans_out_fn: Callable[[Any], Any] = lift.id_fn,
    init: bool = False,
    mutable: bool = False,
    rngs: CollectionFilter = True,
    variables: CollectionFilter = True,
    methods: Methods = None,
) -> Target:
    """A module that sees another view of some of its variables, such as masked or transposed weights.

    >>> Tied = nn.map_variables(nn.Dense, "params", transpose, transpose, init=True)

    Args:
        mapped_collections: the collections to map.
        trans_in_fn: stored variables to seen ones; of dicts ``{collection: {...}}``.
        trans_out_fn: the inverse, for variables that the module makes (``init``) or changes (``mutable``).
        init: run the module once to make the variables, before it runs on the view of them.
        mutable: let the module change the mapped collections.
        rngs, variables: the random streams and the other collections that are seen inside.
        methods: of a class, the methods to transform, or options by method; by default ``__call__``.
    """
    return lift_transform(  # type: ignore[no-any-return]
        lift.map_variables,
        target,
        methods=methods,
        mapped_collections=mapped_collections,
        map_in_fn=trans_in_fn,
        map_out_fn=trans_out_fn,
        init=init,
        mutable=mutable,
        rngs=rngs,
        variables=variables,
    )


def add_metadata_axis(
    target: Target,
    variable_axes: Mapping[Any, int | None] | None = None,
    metadata_params: Mapping[Any, Any] | None = None,
) -> Target:
    """Add an axis to the metadata boxes of a module's variables, as ``nn.vmap`` and ``nn.scan`` do, and nothing else.

    Args:
        variable_axes: for each collection the index of the new axis; None for no new axis.
        metadata_params: what names it, as ``{nn.PARTITION_NAME: "layers"}``.
    """
    params = dict(metadata_params or {})
    for collection, axis in (variable_axes or {}).items():
        if axis is None:
            continue
        target = map_variables(
            target,
            collection,
            trans_in_fn=functools.partial(meta.remove_axis, index=axis, params=params),
            trans_out_fn=functools.partial(meta.add_axis, index=axis, params=params),
            mutable=True,
        )
    return target


def named_call(class_fn: Callable[..., Any], force: bool = True) -> Callable[..., Any]:
    """A method that runs under ``jax.named_scope`` with the module's and its own name, for profilers.

    With ``force=False`` only while naming is enabled; see ``nn.enable_named_call``.
    """
    suffix = "" if class_fn.__name__ == "__call__" else f".{class_fn.__name__}"

    @functools.wraps(class_fn)
    def call(module: Module, *args: Any, **kwargs: Any) -> Any:
        if module._state.in_setup or not (force or context.named_calls):
            return class_fn(module, *args, **kwargs)
        with jax.named_scope((module.name or type(module).__name__) + suffix):
            return class_fn(module, *args, **kwargs)

    return call
