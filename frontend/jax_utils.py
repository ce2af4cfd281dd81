"""Helpers around JAX for training loops: replication and prefetching, scans over any axes, padded batches.

The names are those of ``flax.jax_utils``. What comes per device (``replicate``, ``prefetch_to_device``,
``pad_shard_unpad``) has a leading axis of the number of local devices, as ``jax.pmap`` wants it.
"""

from __future__ import annotations

import collections
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distaff.frontend.known_outputs import known_outputs

Body: TypeAlias = Callable[[Any, Any], tuple[Any, Any]]

_AXIS = "_device_put_sharded"


def _over_devices(devices: Sequence[jax.Device] | None, axis_name: str) -> NamedSharding:
    """A sharding that gives each device one entry of the leading axis."""
    mesh = Mesh(np.array(jax.local_devices() if devices is None else devices), (axis_name,))
    return NamedSharding(mesh, PartitionSpec(axis_name))


def replicate(tree: Any, devices: Sequence[jax.Device] | None = None, axis_name: str = _AXIS) -> Any:
    """Stack one copy of each array for each device, and put each copy on its device.

    Args:
        tree: a tree of arrays.
        devices: by default the local ones.
        axis_name: what the mesh of the result calls its axis.
    """
    sharding = _over_devices(devices, axis_name)
    count = sharding.num_devices

    def copies(x: Any) -> jax.Array:
        stack = jnp.stack if isinstance(x, jax.Array) else np.stack
        stacked: jax.Array = jax.device_put(stack([x] * count), sharding)
        return stacked

    return jax.tree.map(copies, tree)


def unreplicate(tree: Any) -> Any:
    """The first copy of each replicated array; scalars stay as they are."""

    def first(x: Any) -> Any:
        if getattr(x, "ndim", None) == 0:
            return x
        if not isinstance(x, jax.Array) or len(x.devices()) == 1:
            return x[0]
        shard = x.addressable_shards[0].data
        return shard if x.is_fully_replicated else shard.squeeze(0)

    return jax.tree.map(first, tree)


def pmean(xs: Any, axis_name: str) -> Any:
    """``jax.lax.pmean``; deprecated in its favour."""
    warnings.warn("use jax.lax.pmean", DeprecationWarning, stacklevel=2)
    return jax.lax.pmean(xs, axis_name)


def partial_eval_by_shape(fn: Callable[..., Any], input_spec: Iterable[Any], *args: Any, **kwargs: Any) -> Any:
    """Evaluate ``fn(*inputs, *args, **kwargs)`` as far as that is possible without the values of ``inputs``.

    Args:
        fn: the function.
        input_spec: for each input its shape, or a pair of shape and dtype (by default float32).
        *args: further arguments, with values.
        **kwargs: keyword arguments, with values.

    Returns:
        What ``fn`` returns, with a ``jax.ShapeDtypeStruct`` for each array that depends on the inputs.
    """
    return known_outputs(lambda *inputs: fn(*inputs, *args, **kwargs), [_spec(spec) for spec in input_spec])


def _spec(spec: Any) -> jax.ShapeDtypeStruct:
    spec = tuple(spec)
    if len(spec) == 2 and isinstance(spec[0], Iterable):
        return jax.ShapeDtypeStruct(tuple(spec[0]), spec[1])
    return jax.ShapeDtypeStruct(spec, jnp.float32)


def prefetch_to_device(
    iterator: Iterator[Any], size: int, devices: Sequence[jax.Device] | None = None, axis_name: str = _AXIS
) -> Iterator[Any]:
    """Keep the next ``size`` batches of ``iterator`` on the devices, so that copies overlap with computation.

    Args:
        iterator: of trees of arrays, whose leading axis has one entry a device.
        size: how many batches are kept ready; 2 is enough to overlap.
        devices: by default the local ones.
        axis_name: what the mesh of the batches calls its axis.

    Yields:
        The batches, each entry of the leading axis on its device.
    """
    sharding = _over_devices(devices, axis_name)
    ready: collections.deque[Any] = collections.deque()

    def fetch(count: int) -> None:
        for batch in itertools.islice(iterator, count):
            ready.append(jax.device_put(batch, sharding))

    fetch(size)
    while ready:
        yield ready.popleft()
        fetch(1)


def scan_in_dim(
    body_fn: Body,
    init: Any,
    xs: Any,
    axis: int | tuple[int, ...] = (0,),
    unroll: int | tuple[int, ...] = (1,),
    keepdims: bool = False,
) -> tuple[Any, Any]:
    """``jax.lax.scan`` over one or several axes anywhere in ``xs``, the last one innermost.

    Args:
        body_fn: from carry and slice to carry and output.
        init: the first carry.
        xs: a tree of arrays that have all of these axes.
        axis: the axes; outputs get them back at these places.
        unroll: iterations to unroll for each axis; if there are fewer than axes, they are of the last axes.
        keepdims: slices (and outputs) of ``body_fn`` have the scanned axes, of size one.

    Returns:
        The last carry and the stacked outputs.
    """
    axes = axis if isinstance(axis, tuple) else (axis,)
    unrolls = unroll if isinstance(unroll, tuple) else (unroll,)
    unrolls = (1,) * (len(axes) - len(unrolls)) + unrolls
    front = tuple(range(len(axes)))

    def to_front(x: Any) -> jax.Array:
        return jnp.moveaxis(x, axes, front)

    def from_front(x: Any) -> jax.Array:
        return jnp.moveaxis(x, front, axes)

    def body(carry: Any, x: Any) -> tuple[Any, Any]:
        if not keepdims:
            return body_fn(carry, x)
        carry, y = body_fn(carry, jax.tree.map(lambda a: from_front(jnp.expand_dims(a, front)), x))
        return carry, jax.tree.map(lambda a: to_front(a).reshape(to_front(a).shape[len(axes) :]), y)

    scan: Body = body
    for size in reversed(unrolls):
        scan = _scanned(scan, size)
    carry, ys = scan(init, jax.tree.map(to_front, xs))
    return carry, jax.tree.map(from_front, ys)


def _scanned(body: Body, unroll: int) -> Body:
    return lambda carry, xs: jax.lax.scan(body, carry, xs, unroll=unroll)


def pad_shard_unpad(
    wrapped: Callable[..., Any],
    static_argnums: Sequence[int] = (0,),
    static_argnames: Sequence[str] = (),
    static_return: bool = False,
) -> Callable[..., Any]:
    """Let a function of batches that are split over devices (``jax.pmap``) take batches of any size.

    Each batch ``[B, …]`` is filled up with zeros and reshaped to ``[devices, B', …]``; results ``[devices, B', …]``
    come back as numpy arrays ``[B, …]``. The batch size must be the same in all arguments.

    Args:
        wrapped: the function.
        static_argnums: positions of arguments to pass on as they are; by default the first, for parameters.
        static_argnames: keyword arguments to pass on as they are.
        static_return: return the result as it is, such as a metric.

    Returns:
        The function, with a further keyword ``min_device_batch``: the smallest ``B'``, so that a last, smaller batch
        does not cause another compilation.

    Raises:
        ValueError: (of the returned function) batch sizes differ.
    """

    def padded(*args: Any, min_device_batch: int | None = None, **kwargs: Any) -> Any:
        devices = jax.local_device_count()
        batched = [a for i, a in enumerate(args) if i not in static_argnums]
        batched += [a for name, a in kwargs.items() if name not in static_argnames]
        sizes = {leaf.shape[0] for leaf in jax.tree.leaves(batched)}
        if len(sizes) != 1:
            raise ValueError(f"All batches must have the same size; found {sorted(sizes)}.")
        size = sizes.pop()
        per_device = max(-(-size // devices), min_device_batch or 0)

        def pad(x: Any) -> Any:
            if missing := devices * per_device - size:
                x = np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)])
            return x.reshape(devices, per_device, *x.shape[1:])

        def unpad(x: Any) -> np.ndarray:
            on_host = np.asarray(jax.device_get(x))
            return on_host.reshape(-1, *on_host.shape[2:])[:size]

        result = wrapped(
            *(a if i in static_argnums else jax.tree.map(pad, a) for i, a in enumerate(args)),
            **{name: a if name in static_argnames else jax.tree.map(pad, a) for name, a in kwargs.items()},
        )
        return result if static_return else jax.tree.map(unpad, result)

    return padded
