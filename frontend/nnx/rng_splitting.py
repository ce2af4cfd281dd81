"""The streams inside any object: divided for a transform and put back, forked, reseeded.

With graph updates the streams change in place, and the backups that are returned put them back. Without, a copy of the
object with new streams is returned, and of the old one only the counts move.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from distaff.frontend.nnx import config, filters
from distaff.frontend.nnx.filters import Filter
from distaff.frontend.nnx.graphdef import graph_mode
from distaff.frontend.nnx.rngs import Rngs, RngStream, RngValue, Shape, Shapes, shape_by_filter
from distaff.frontend.nnx.traversal import iter_graph, recursive_map

Path: TypeAlias = tuple[Any, ...]
# A stream, its key and, if that was changed too, its count.
StreamBackup: TypeAlias = tuple[RngStream, jax.Array, jax.Array] | tuple[RngStream, jax.Array]
# What becomes of a stream at a path; None: it stays as it is.
_Rule: TypeAlias = Callable[[Path, RngStream], RngStream | None]
ReseedPolicy: TypeAlias = Literal["scalars_only", "match_shape"] | Callable[[Path, jax.Array, Shape], jax.Array]


class _Missing:
    """The type of the argument that was left out: the call makes a decorator."""


_MISSING: Any = _Missing()


@dataclasses.dataclass(frozen=True)
class SplitBackups(Iterable[StreamBackup]):
    """The streams as they were; as a context, it puts them back at the end."""

    backups: list[StreamBackup]

    def __iter__(self) -> Iterator[StreamBackup]:
        return iter(self.backups)

    def __enter__(self) -> SplitBackups:
        return self

    def __exit__(self, *exception: Any) -> None:
        restore_rngs(self)


def restore_rngs(backups: Iterable[StreamBackup], /) -> None:
    """Put the keys, and the counts where they are saved, back into their streams."""
    for stream, key, *count in backups:
        stream.key.set_value(key)
        if count:
            stream.count.set_value(count[0])


def _streams(node: Any, graph: bool | None = None) -> list[tuple[Path, RngStream]]:
    return [(path, value) for path, value in iter_graph(node, graph=graph) if isinstance(value, RngStream)]


def backup_keys(node: Any, /, *, graph: bool | None = None) -> list[StreamBackup]:
    """The keys of all streams in ``node``, for ``restore_rngs``."""
    return [(stream, stream.key[...]) for _, stream in _streams(node, graph)]


def _replace_in_place(node: Any, rule: _Rule) -> SplitBackups:
    backups: list[StreamBackup] = []
    for path, stream in _streams(node, graph=True):
        new = rule(path, stream)
        if new is not None:
            backups.append((stream, stream.key[...], stream.count[...]))
            stream.key.set_value(new.key[...])
            stream.count.set_value(new.count[...])
    return SplitBackups(backups)


def _replaced(node: Any, rule: _Rule, graph: bool) -> Any:
    def new_stream(path: Path, value: Any) -> Any:
        new = rule(path, value) if isinstance(value, RngStream) else None
        return value if new is None else new

    return recursive_map(new_stream, node, graph=graph)


def _in_place(graph: bool | None, graph_updates: bool | None) -> bool:
    updates = config.set_graph_updates.current_value() if graph_updates is None else graph_updates
    return graph_mode(graph) and updates


def _apply(node: Any, rule: _Rule, graph: bool | None, graph_updates: bool | None) -> Any:
    """Apply ``rule`` to the streams in ``node``, or to those in the arguments of a function that is to be decorated."""
    graph, in_place = graph_mode(graph), _in_place(graph, graph_updates)
    if not isinstance(node, _Missing):
        return _replace_in_place(node, rule) if in_place else _replaced(node, rule, graph)

    def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def with_new_streams(*args: Any, **kwargs: Any) -> Any:
            if not in_place:
                args, kwargs = _replaced((args, kwargs), rule, graph)
                return fn(*args, **kwargs)
            with _replace_in_place((args, kwargs), rule):
                return fn(*args, **kwargs)

        return with_new_streams

    return decorate


def split_rngs(
    node: Any = _MISSING,
    /,
    *,
    splits: int | Shape,
    only: Filter = ...,
    squeeze: bool = False,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """Divide the streams in ``node`` into arrays of keys, for ``vmap`` or ``scan`` to map over.

    >>> @nnx.split_rngs(splits=4)
    ... @nnx.vmap
    ... def create_layers(rngs):
    ...     return nnx.Linear(8, 8, rngs=rngs)

    Args:
        node: what holds the streams. Left out, the result decorates a function and divides those in its arguments for
            the time of each call.
        splits: how many keys, as a number or a shape.
        only: which streams.
        squeeze: with ``splits=1``: one new key, without a dimension for it.
        graph, graph_updates: with both (as by default) the streams of ``node`` itself are divided.

    Returns:
        ``SplitBackups``, or without graph updates a copy of ``node`` with divided streams.
    """
    if squeeze and splits != 1:
        raise ValueError(f"squeeze=True is only supported for splits=1, got splits={splits}.")
    matches = filters.to_predicate(only)

    def rule(path: Path, stream: RngStream) -> RngStream | None:
        if not matches(path, stream):
            return None
        new = stream.split(splits)
        return RngStream(new.key[...][0], tag=new.tag) if squeeze else new

    return _apply(node, rule, graph, graph_updates)


def fork_rngs(
    node: Any = _MISSING,
    /,
    *,
    split: Shapes | None = None,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """Give the streams in ``node`` new keys, so that what is drawn from them leaves the old ones as they were.

    Args:
        node, graph, graph_updates: as for ``split_rngs``.
        split: divide the streams instead: a number or shape of keys, or a mapping of filters to those. Streams that no
            filter matches stay as they are.
    """
    shape_of = shape_by_filter(split)

    def rule(path: Path, stream: RngStream) -> RngStream | None:
        matched, shape = shape_of(path, stream)
        if shape is not None:
            return stream.split(shape)
        return stream.fork() if matched else None

    return _apply(node, rule, graph, graph_updates)


def with_rngs(
    node: Any = _MISSING,
    /,
    *,
    split: Shapes | None = None,
    fork: Filter | Sequence[Filter] | None = None,
    broadcast: Shapes | None = None,
    only: Filter = True,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """A copy of ``node`` with other streams.

    Args:
        node: what holds the streams. Left out, the result decorates a function, which then gets copies of its
            arguments.
        split: which streams to divide into arrays of keys: a number or shape for all, or a mapping of filters to those.
        fork: which get a new key.
        broadcast: as ``split``, for arrays of one key.
        only: leave all streams but these.
        graph, graph_updates: one of them must be False, as nothing changes in place.

    Raises:
        NotImplementedError: in graph mode with updates.
        ValueError: two of ``split``, ``broadcast`` and ``fork`` match a stream, and both by more than ``...``.
    """
    if _in_place(graph, graph_updates):
        raise NotImplementedError(
            "with_rngs returns a copy, so it isn't for graph mode with updates. Pass graph_updates=False (or "
            "graph=False), or change the streams in place with split_rngs or fork_rngs."
        )
    matches = filters.to_predicate(only)
    rules = _with_rngs_rules(split, broadcast, fork)

    def rule(path: Path, stream: RngStream) -> RngStream | None:
        if not matches(path, stream):
            return None
        first = {}  # of each kind, the first rule that matches
        for kind, filter, change in rules:
            if kind not in first and filters.to_predicate(filter)(path, stream):
                first[kind] = filter, change
        specific = [kind for kind, (filter, _) in first.items() if filter is not Ellipsis and filter is not True]
        if len(specific) > 1:
            raise ValueError(f"The stream at path {path} matches multiple rules of with_rngs: {', '.join(specific)}.")
        for kind in (*specific, *first):  # those for all are for what no other matches
            return first[kind][1](stream)
        return None

    return _apply(node, rule, graph, graph_updates)


def _with_rngs_rules(
    split: Shapes | None, broadcast: Shapes | None, fork: Filter | Sequence[Filter] | None
) -> list[tuple[str, Filter, Callable[[RngStream], RngStream]]]:
    """Kinds of rules, what they are for, and what they do."""
    rules: list[tuple[str, Filter, Callable[[RngStream], RngStream]]] = []
    for kind, shapes, method in (("split", split, RngStream.split), ("broadcast", broadcast, RngStream.broadcast)):
        by_filter = shapes if isinstance(shapes, Mapping) else {} if shapes is None else {...: shapes}
        for filter, shape in by_filter.items():
            if shape is not None:
                rules.append((kind, filter, functools.partial(method, k=shape)))
    forks = () if fork is None else fork if isinstance(fork, Sequence) and not isinstance(fork, str) else (fork,)
    return rules + [("fork", filter, RngStream.fork) for filter in forks]


def _reseed_scalar(path: Path, key: jax.Array, shape: Shape) -> jax.Array:
    if shape:
        raise ValueError(
            f"Cannot reseed the stream at {path}: it holds keys of shape {shape}. Pass policy='match_shape' to split "
            "the new key into as many, or a function (path, key, shape) -> keys."
        )
    return key


def _reseed_split(path: Path, key: jax.Array, shape: Shape) -> jax.Array:
    return jax.random.split(key, shape) if shape else key


_RESEED_POLICIES: dict[str, Callable[[Path, jax.Array, Shape], jax.Array]] = {
    "scalars_only": _reseed_scalar,
    "match_shape": _reseed_split,
}


def reseed(
    node: Any,
    /,
    *,
    graph: bool | None = None,
    policy: ReseedPolicy = "scalars_only",
    **stream_keys: RngValue,
) -> None:
    """Start the streams in ``node`` that have these names again, each at a key drawn from the new seed.

    Args:
        node: what holds the streams; they change in place.
        policy: what a stream that holds an array of keys gets: an error ("scalars_only"), the new key split to its
            shape ("match_shape"), or what a function ``(path, key, shape)`` returns.
        stream_keys: seeds or keys by name; a name that no stream has does nothing.
    """
    new_key = policy if callable(policy) else _RESEED_POLICIES.get(policy)
    if new_key is None:
        raise ValueError(f"policy must be 'scalars_only', 'match_shape' or a function, got {policy!r}.")
    seeds = Rngs(**stream_keys)
    changes = []
    for path, stream in _streams(node, graph):
        if stream.tag in seeds:
            key = new_key(path, seeds[stream.tag](), stream.key.shape)
            changes.append((stream, key, jnp.zeros(key.shape, jnp.uint32)))
    restore_rngs(changes)
