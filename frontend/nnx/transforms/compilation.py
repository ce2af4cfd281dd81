"""``jit``, ``jit_partial``, ``cached_partial`` and ``shard_map`` of functions of objects."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from distaff.frontend.nnx import config
from distaff.frontend.nnx.boundary import Outside, Signature, take
from distaff.frontend.nnx.graph_functions import clone
from distaff.frontend.nnx.graphdef import graph_mode
from distaff.frontend.nnx.object_trees import is_object
from distaff.frontend.nnx.prefix_mapping import PrefixMapping
from distaff.frontend.nnx.pytrees import Pytree
from distaff.frontend.nnx.structure import structure_of
from distaff.frontend.nnx.transforms.prefixes import by_object, check_prefix

_MISSING: Any = object()


class StateSharding(PrefixMapping):
    """Shardings of an object's variables, by filter; for ``in_shardings`` and ``out_shardings``."""

    @property
    def shardings(self) -> tuple[Any, ...]:
        """The shardings, in the order of the filters."""
        return self.values


def updates_mode(graph: bool, graph_updates: bool | None) -> bool:
    """Whether changes of structure are passed on: never in tree mode."""
    return graph and (config.set_graph_updates.current_value() if graph_updates is None else graph_updates)


def check_not_bound(fun: Any, transform: str) -> None:
    """Raise ValueError for a method of an object, whose variables would be constants of the function."""
    if inspect.ismethod(fun) and isinstance(fun.__self__, Pytree):
        name = f"{type(fun.__self__).__name__}.{fun.__name__}"
        raise ValueError(
            f"nnx.{transform} does not take bound methods, such as {name}: the object must be an argument. Write nnx"
            f".{transform}({name})(object, ...), or put @nnx.{transform} on the method's definition."
        )


class Parameters(NamedTuple):
    """Which arguments something concerns, by position and by name."""

    positions: frozenset[int]
    names: frozenset[str]

    @classmethod
    def resolve(cls, fun: Any, argnums: int | Iterable[int] | None, argnames: str | Iterable[str] | None) -> Parameters:
        """As ``jax.jit`` does: if only positions or only names are given, the others are found by them."""
        numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums or ())
        names = (argnames,) if isinstance(argnames, str) else tuple(argnames or ())
        try:
            parameters = list(inspect.signature(fun).parameters.values())
        except (TypeError, ValueError):
            parameters = []
        positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        numbers = tuple(n + len(positional) if n < 0 else n for n in numbers)
        if argnums is None:
            numbers = tuple(positional.index(name) for name in names if name in positional)
        elif argnames is None:
            names = tuple(positional[n] for n in numbers if n < len(positional))
        return cls(frozenset(numbers), frozenset(names))

    def among(self, count: int, names: list[str]) -> frozenset[int]:
        """Which of ``count`` positional arguments followed by keyword arguments of these names."""
        if not self.positions and not self.names:
            return self.positions
        by_name = (count + i for i, name in enumerate(names) if name in self.names)
        return frozenset((*(n for n in self.positions if n < count), *by_name))


def pure_prefix(prefix: Any, nothing: Any = None) -> Any:
    """A specification for ``take``'s trees: where one is given by filters, a tuple with the values for each filter.

    Args:
        prefix: the specification, with a ``PrefixMapping`` for some objects.
        nothing: what to have instead of None in such a tuple.
    """

    def is_mapping(x: Any) -> bool:
        return isinstance(x, PrefixMapping)

    def of(x: Any) -> Any:
        return tuple(nothing if value is None else value for value in x.values) if is_mapping(x) else x

    return jax.tree.map(of, prefix, is_leaf=is_mapping)


class JitWrapped:
    """A compiled function of objects; what ``nnx.jit`` returns."""

    def __init__(
        self,
        fun: Callable[..., Any],
        *,
        in_shardings: Any,
        out_shardings: Any,
        static: Parameters,
        donated: Parameters,
        graph: bool,
        structure_updates: bool,
        **jit_options: Any,
    ) -> None:
        functools.update_wrapper(self, fun)
        self._fun = fun
        self._first: tuple[Any, ...] = ()
        self._static = static
        self._donated = donated
        self._graph = graph
        self._structure_updates = structure_updates
        self._in_shardings = by_object(in_shardings)
        self._out_shardings = by_object(out_shardings)
        self._sharded = in_shardings is not None or out_shardings is not None
        if self._sharded:
            pure_in, pure_out = pure_prefix(self._in_shardings), pure_prefix(self._out_shardings)
            jit_options |= {"in_shardings": pure_in, "out_shardings": (pure_in, pure_out, None)}

        def traced(signature: Signature, /, *args: Any, **kwargs: Any) -> Any:
            return self._traced(signature, *args, **kwargs)

        traced.__name__ = getattr(fun, "__name__", type(fun).__name__)
        self._jitted: Any = jax.jit(
            traced,
            static_argnums=(0, *(n + 1 for n in sorted(static.positions))),
            static_argnames=tuple(sorted(static.names)),
            donate_argnums=tuple(n + 1 for n in sorted(donated.positions)),
            donate_argnames=tuple(sorted(donated.names)),
            **jit_options,
        )

    def _traced(self, signature: Signature, *args: Any, **kwargs: Any) -> Any:
        names, count = sorted(kwargs), len(args)
        inside = signature.enter([*args, *(kwargs[name] for name in names)])
        out = self._fun(*inside.trees[:count], **dict(zip(names, inside.trees[count:], strict=True)))
        updates, out, static = inside.leave(
            out,
            structure_updates=self._structure_updates,
            whole=self._sharded,
            complete=self._donated.among(count, names),
            out_prefix=self._out_shardings,
        )
        if self._sharded:  # laid out as the arguments are, of which static ones have no sharding
            fixed = self._static.among(count, names)
            updates = tuple(tree for i, tree in enumerate(updates) if i not in fixed)
        return updates, out, static

    def with_first(self, args: tuple[Any, ...]) -> JitWrapped:
        """This function with its first arguments given."""
        made = copy.copy(self)
        made._first = args
        take(args, self._graph)  # refuses what it would at a call
        return made

    def _take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Outside, list[Any], dict[str, Any]]:
        names, count = sorted(kwargs), len(args)
        fixed = self._static.among(count, names)
        trees = [*args, *(kwargs[name] for name in names)]
        prefixes = None if self._in_shardings is None else self._prefixes(len(trees), fixed)
        outside = take(trees, self._graph, prefixes, fixed)
        return outside, outside.trees[:count], dict(zip(names, outside.trees[count:], strict=True))

    def _prefixes(self, count: int, fixed: frozenset[int]) -> list[Any]:
        """The sharding of each argument."""
        if not isinstance(self._in_shardings, tuple | list):
            return [self._in_shardings] * count
        given = iter(self._in_shardings)
        return [None if i in fixed else next(given) for i in range(count)]

    def _finish(self, outside: Outside, returned: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        updates, out, static = returned
        if self._sharded:
            dynamic, fixed = iter(updates), self._static.among(len(args), sorted(kwargs))
            updates = [None if i in fixed else next(dynamic) for i in range(len(args) + len(kwargs))]
        return static.value.finish(outside, updates, out)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the compiled function; then variables are assigned and changes of structure made."""
        args = (*self._first, *args)
        outside, pure_args, pure_kwargs = self._take(args, kwargs)
        returned = self._jitted(outside.signature, *pure_args, **pure_kwargs)
        return self._finish(outside, returned, args, kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
        """The result with ``jax.ShapeDtypeStruct`` for arrays; the arguments stay as they are."""
        args = (*self._first, *args)
        outside, pure_args, pure_kwargs = self._take(args, kwargs)
        returned = self._jitted.eval_shape(outside.signature, *pure_args, **pure_kwargs)
        return self._finish(outside.of_copies(), returned, args, kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> Traced:
        """As ``jax.jit(f).trace``."""
        outside, pure_args, pure_kwargs = self._take((*self._first, *args), kwargs)
        return Traced(self._jitted.trace(outside.signature, *pure_args, **pure_kwargs), self)

    def lower(self, *args: Any, **kwargs: Any) -> Lowered:
        """As ``jax.jit(f).lower``."""
        return self.trace(*args, **kwargs).lower()

    def clear_cache(self) -> None:
        """Forget what was compiled."""
        self._jitted.clear_cache()


class _Stage:
    """A stage of compilation: all of JAX's own is there too."""

    def __init__(self, stage: Any, wrapped: JitWrapped) -> None:
        self._stage = stage
        self._wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)


class Traced(_Stage):
    """A traced function of objects."""

    def lower(self, **kwargs: Any) -> Lowered:
        """As ``jax.stages.Traced.lower``."""
        return Lowered(self._stage.lower(**kwargs), self._wrapped)


class Lowered(_Stage):
    """A lowered function of objects."""

    def compile(self, *args: Any, **kwargs: Any) -> Compiled:
        """As ``jax.stages.Lowered.compile``."""
        return Compiled(self._stage.compile(*args, **kwargs), self._wrapped)


class Compiled(_Stage):
    """A compiled function of objects, called as the original, with objects of the same structure."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        wrapped = self._wrapped
        args = (*wrapped._first, *args)
        outside, pure_args, pure_kwargs = wrapped._take(args, kwargs)
        fixed = wrapped._static.among(len(args), sorted(kwargs))
        dynamic = [x for i, x in enumerate(pure_args) if i not in fixed]
        named = {name: x for name, x in pure_kwargs.items() if name not in wrapped._static.names}
        return wrapped._finish(outside, self._stage(*dynamic, **named), args, kwargs)


def jit(
    fun: Any = _MISSING,
    *,
    in_shardings: Any = None,
    out_shardings: Any = None,
    static_argnums: int | Iterable[int] | None = None,
    static_argnames: str | Iterable[str] | None = None,
    donate_argnums: int | Iterable[int] | None = None,
    donate_argnames: str | Iterable[str] | None = None,
    keep_unused: bool = False,
    device: jax.Device | None = None,
    backend: str | None = None,
    inline: bool = False,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """``jax.jit`` for functions of objects: what the function does to them happens to the objects it was given.

    The objects' structure is looked at again at each call and the function traced again if it changed. Values and, with
    ``graph_updates``, attributes that the function assigns are assigned to the objects when it has returned.

    Args:
        fun: the function; left out, a decorator is returned.
        in_shardings: as of ``jax.jit``; a sharding given for an object is that of all its arrays, and ``StateSharding``
            gives one for each filter.
        out_shardings: likewise, for the result.
        static_argnums: as of ``jax.jit``, like all that is not named here.
        static_argnames: as of ``jax.jit``.
        donate_argnums: as of ``jax.jit``; an object's variables hold the results' arrays afterwards.
        donate_argnames: as of ``jax.jit``.
        keep_unused: as of ``jax.jit``.
        device: as of ``jax.jit``.
        backend: as of ``jax.jit``.
        inline: as of ``jax.jit``.
        graph: follow shared references and cycles (default: ``nnx.set_graph_mode``); otherwise a variable may stand at
            one place only.
        graph_updates: pass changes of structure on, and let the function return objects that it was given (default:
            ``nnx.set_graph_updates``; never in tree mode).

    Raises:
        ValueError: ``fun`` is a method of an object; at a call, variables stand at several places where they may not.
    """
    if fun is _MISSING:
        options = {key: value for key, value in locals().items() if key != "fun"}
        return functools.partial(jit, **options)
    check_not_bound(fun, "jit")
    follow = graph_mode(graph)
    updates = updates_mode(follow, graph_updates)
    for name, given in (("in_shardings", in_shardings), ("out_shardings", out_shardings)):
        check_prefix(given, name, "jit", updates)
    placed = {name: value for name, value in {"device": device, "backend": backend}.items() if value is not None}
    return JitWrapped(
        fun,
        in_shardings=in_shardings,
        out_shardings=out_shardings,
        static=Parameters.resolve(fun, static_argnums, static_argnames),
        donated=Parameters.resolve(fun, donate_argnums, donate_argnames),
        graph=follow,
        structure_updates=updates,
        keep_unused=keep_unused,
        inline=inline,
        **placed,
    )


def jit_partial(fun: Callable[..., Any], *partial_args: Any, **options: Any) -> JitWrapped:
    """``nnx.jit(fun, **options)`` with its first arguments given.

    Nothing is gained over ``nnx.jit`` in speed, which looks at objects only once as well.
    """
    return jit(fun, **options).with_first(partial_args)  # type: ignore[no-any-return]


def cached_partial(
    f: Callable[..., Any], *cached_args: Any, graph: bool | None = None, graph_updates: bool | None = None
) -> Callable[..., Any]:
    """A transformed function with its first arguments given; they must keep their structure from call to call.

    The function gets copies of these objects, the same at each call, which share the variables. Nothing is gained over
    ``nnx.jit`` in speed, which looks at objects only once as well.

    Raises:
        ValueError: at a call: the function changed the structure of the arguments.
    """
    follow = graph_mode(graph)
    copies = tuple(clone(x, variables=False, graph=follow) if is_object(x) else x for x in cached_args)
    objects = [x for x in copies if is_object(x)]
    before = structure_of(objects, follow).specs

    @functools.wraps(f)
    def call(*args: Any, **kwargs: Any) -> Any:
        out = f(*copies, *args, **kwargs)
        if structure_of(objects, follow).specs != before:
            raise ValueError(
                "The structure of an argument of cached_partial changed during the call. Undo changes (nnx.pop removes "
                "what was sown) before the function returns, or call the function without cached_partial."
            )
        return out

    return call
