"""Streams of random keys: a key and a count of draws, each a variable, so that transforms carry them like any other.

A stream gives ``fold_in(key, count)`` and counts on. ``Rngs`` holds streams by name; one that it lacks falls back on
``default``. Keys are those that Flax gives for the same seeds, in the same order of draws.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Concatenate, NoReturn, ParamSpec, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jax.nn import initializers

from distaff.frontend.nnx import filters
from distaff.frontend.nnx.filters import Filter
from distaff.frontend.nnx.pytrees import Pytree
from distaff.frontend.nnx.variables import Variable

P = ParamSpec("P")
Shape: TypeAlias = tuple[int, ...]
# A seed, or a key of ``jax.random.key``; in a raw uint32 key the last dimension is that of its words.
RngValue: TypeAlias = int | jax.Array
# What to divide streams into: one shape for all, or shapes by filter, where None leaves a stream alone.
Shapes: TypeAlias = int | Shape | Mapping[Filter, int | Shape | None]


class RngState(Variable[jax.Array]):
    """What a stream consists of. ``tag`` is the name of the stream, by which filters find it."""

    tag: str


class RngCount(RngState):
    """How many keys were drawn, uint32, one for each key."""


class RngKey(RngState):
    """The key (or the array of keys) that draws start from."""


class KeylessInitializer(Protocol):
    """An initialiser that draws its own key."""

    def __call__(self, shape: Shape, dtype: Any = None, out_sharding: Any = None) -> jax.Array:
        """An array of ``shape``."""
        ...


def _sampler(sample: Callable[Concatenate[Any, P], Any]) -> Callable[Concatenate[_Draws, P], jax.Array]:
    """A function of ``jax.random`` as a method that draws the key."""

    @functools.wraps(sample)
    def method(self: _Draws, /, *args: P.args, **kwargs: P.kwargs) -> jax.Array:
        return sample(self(), *args, **kwargs)  # type: ignore[no-any-return]

    return method


def _initializer(make: Callable[P, Any]) -> Callable[Concatenate[_Draws, P], KeylessInitializer]:
    """A maker of initialisers as a method; what it makes draws a key at each call."""

    @functools.wraps(make)
    def method(self: _Draws, /, *args: P.args, **kwargs: P.kwargs) -> KeylessInitializer:
        initialize = make(*args, **kwargs)

        def keyless(shape: Shape, dtype: Any = None, out_sharding: Any = None) -> jax.Array:
            return initialize(self(), shape, dtype, out_sharding)  # type: ignore[no-any-return]

        return keyless

    return method


class _Draws:
    """The distributions and initialisers that both a stream and ``Rngs`` (from its default stream) draw from."""

    def __call__(self) -> jax.Array:
        raise NotImplementedError

    ball = _sampler(jax.random.ball)
    bernoulli = _sampler(jax.random.bernoulli)
    beta = _sampler(jax.random.beta)
    binomial = _sampler(jax.random.binomial)
    bits = _sampler(jax.random.bits)
    categorical = _sampler(jax.random.categorical)
    cauchy = _sampler(jax.random.cauchy)
    chisquare = _sampler(jax.random.chisquare)
    choice = _sampler(jax.random.choice)
    dirichlet = _sampler(jax.random.dirichlet)
    double_sided_maxwell = _sampler(jax.random.double_sided_maxwell)
    exponential = _sampler(jax.random.exponential)
    f = _sampler(jax.random.f)
    gamma = _sampler(jax.random.gamma)
    generalized_normal = _sampler(jax.random.generalized_normal)
    geometric = _sampler(jax.random.geometric)
    gumbel = _sampler(jax.random.gumbel)
    laplace = _sampler(jax.random.laplace)
    loggamma = _sampler(jax.random.loggamma)
    logistic = _sampler(jax.random.logistic)
    lognormal = _sampler(jax.random.lognormal)
    maxwell = _sampler(jax.random.maxwell)
    multinomial = _sampler(jax.random.multinomial)
    multivariate_normal = _sampler(jax.random.multivariate_normal)
    normal = _sampler(jax.random.normal)
    orthogonal = _sampler(jax.random.orthogonal)
    pareto = _sampler(jax.random.pareto)
    permutation = _sampler(jax.random.permutation)
    poisson = _sampler(jax.random.poisson)
    rademacher = _sampler(jax.random.rademacher)
    randint = _sampler(jax.random.randint)
    rayleigh = _sampler(jax.random.rayleigh)
    t = _sampler(jax.random.t)
    triangular = _sampler(jax.random.triangular)
    truncated_normal = _sampler(jax.random.truncated_normal)
    uniform = _sampler(jax.random.uniform)
    wald = _sampler(jax.random.wald)
    weibull_min = _sampler(jax.random.weibull_min)

    delta_orthogonal = _initializer(initializers.delta_orthogonal)
    glorot_normal = _initializer(initializers.glorot_normal)
    glorot_uniform = _initializer(initializers.glorot_uniform)
    he_normal = _initializer(initializers.he_normal)
    he_uniform = _initializer(initializers.he_uniform)
    kaiming_normal = _initializer(initializers.kaiming_normal)
    kaiming_uniform = _initializer(initializers.kaiming_uniform)
    lecun_normal = _initializer(initializers.lecun_normal)
    lecun_uniform = _initializer(initializers.lecun_uniform)
    variance_scaling = _initializer(initializers.variance_scaling)
    xavier_normal = _initializer(initializers.xavier_normal)
    xavier_uniform = _initializer(initializers.xavier_uniform)


def _as_key(value: Any) -> jax.Array:
    """The typed key of a seed, of a key or of raw uint32 words.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(value, Variable):
        value = value[...]
    if isinstance(value, int) or (hasattr(value, "dtype") and value.shape == () and _is_integer(value.dtype)):
        return jax.random.key(value)
    if isinstance(value, jax.Array):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return value
        if value.dtype == jnp.uint32:
            return jax.random.wrap_key_data(value)  # type: ignore[no-any-return]
    raise ValueError(f"Invalid rng value: {value}; a stream starts from an int, or from a jax.random.key.")


def _is_integer(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.integer))


class RngStream(_Draws, Pytree):
    """A stream of keys.

    Attributes:
        tag: its name.
        key: an ``RngKey``: one key, or an array of keys for a transform to map over.
        count: an ``RngCount`` of the shape of ``key``.
    """

    def __init__(self, key: RngValue | Variable[jax.Array], *, tag: str) -> None:
        """Start at a seed or a key."""
        value = _as_key(key)
        self.tag = tag
        self.key = RngKey(value, tag=tag)
        self.count = RngCount(jnp.zeros(value.shape, jnp.uint32), tag=tag)

    def __call__(self) -> jax.Array:
        """The next key.

        Raises:
            ValueError: the stream holds an array of keys; map over it with ``vmap`` or ``scan`` first.
        """
        self.count._check_can_update()  # before anything is computed of what another trace has left
        drawn = jax.random.fold_in(self._one_key(), self.count[...])
        self.count[...] += 1
        return drawn

    def skip(self) -> None:
        """Count on as if a key had been drawn, without the cost of that: for initialisers that do not use it.

        Raises:
            ValueError: as when a key is drawn.
        """
        self._one_key()
        self.count[...] += 1

    def _one_key(self) -> jax.Array:
        key: jax.Array = self.key[...]
        if key.shape:
            raise ValueError(
                f"The stream {self.tag!r} holds keys of shape {key.shape}, so it can't give one. Draw inside the vmap "
                "or scan that the keys were split for (with axis 0 for the stream), or draw before splitting."
            )
        return key

    def _from(self, key: jax.Array) -> RngStream:
        return type(self)(key, tag=self.tag)

    def split(self, k: int | Shape) -> RngStream:
        """A new stream of ``k`` different keys; ``k`` is a number or a shape."""
        return self._from(jax.random.split(self(), k))

    def broadcast(self, k: int | Shape) -> RngStream:
        """A new stream of ``k`` equal keys; ``k`` is a number or a shape."""
        return self._from(jnp.broadcast_to(self(), k))

    def fork(self, *, split: int | Shape | None = None) -> RngStream:
        """A new stream that starts at the next key of this one."""
        if split is not None:
            _deprecate_fork_split()
            return self.split(split)
        return self._from(self())


def _deprecate_fork_split() -> None:
    warnings.warn("fork(split=k) is deprecated; use split(k).", DeprecationWarning, stacklevel=3)


class Rngs(_Draws, Pytree):
    """Streams of keys by name.

    >>> rngs = nnx.Rngs(0, params=1)
    >>> rngs.params()  # of the stream "params"
    >>> rngs.dropout()  # there is none: of "default"
    >>> rngs()  # of "default"
    >>> rngs.params.normal((2, 3))  # draws and samples
    """

    def __init__(
        self,
        default: RngValue | RngStream | Variable[jax.Array] | Mapping[str, Any] | None = None,
        **rngs: RngValue | RngStream | Variable[jax.Array],
    ) -> None:
        """Start a stream for each name.

        Args:
            default: the seed or key of the stream ``default``, or a mapping of names to those of streams.
            rngs: the seed, key or other stream (its key is copied) of each stream.
        """
        if isinstance(default, Mapping):
            rngs = {**default, **rngs}
        elif default is not None:
            rngs["default"] = default
        for name, value in rngs.items():
            key = value.key if isinstance(value, RngStream) else value
            setattr(self, name, RngStream(key, tag=name))

    def _stream(self, name: str, error: type[Exception]) -> RngStream:
        streams = vars(self)
        stream = streams.get(name, streams.get("default"))
        if not isinstance(stream, RngStream):
            self._refuse(name, error)
        return stream

    def _refuse(self, name: str, error: type[Exception]) -> NoReturn:
        raise error(
            f"No RngStream named {name!r} found in Rngs, and no 'default' to fall back on; "
            f"it has {sorted(self)}. Pass one: nnx.Rngs({name}=0) or nnx.Rngs(0)."
        )

    def __getattr__(self, name: str) -> RngStream:
        if name.startswith("__") or name.startswith("_pytree__"):
            raise AttributeError(name)
        return self._stream(name, AttributeError)

    def __getitem__(self, name: str) -> RngStream:
        return self._stream(name, KeyError)

    def __call__(self) -> jax.Array:
        """The next key of ``default``."""
        return self._stream("default", AttributeError)()

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.items())

    def __len__(self) -> int:
        return sum(1 for _ in self.items())

    def __contains__(self, name: object) -> bool:
        return isinstance(vars(self).get(name), RngStream)  # type: ignore[call-overload]

    def items(self) -> Iterator[tuple[str, RngStream]]:
        """The names and streams."""
        return ((name, value) for name, value in vars(self).items() if isinstance(value, RngStream))

    def _each(
        self, shapes: Shapes | None, shaped: Callable[[RngStream, int | Shape], RngStream], other: Callable[..., Any]
    ) -> Rngs:
        """New streams: ``shaped`` where ``shapes`` has a shape for them, and elsewhere ``other``."""
        shape_of = shape_by_filter(shapes)
        new: dict[str, Any] = {}
        for name, stream in self.items():
            _, shape = shape_of((name,), stream)
            new[name] = other(stream) if shape is None else shaped(stream, shape)
        return type(self)(**new)

    def split(self, k: Shapes) -> Rngs:
        """New streams of different keys.

        Args:
            k: how many, as a number or a shape; or a mapping of filters to those, where the first filter that matches
                counts. A stream that none matches, or one with None, starts again at its own key.
        """
        return self._each(k, RngStream.split, lambda stream: stream)

    def broadcast(self, k: Shapes | None) -> Rngs:
        """As ``split``, with the same new key in all places."""
        return self._each(k, RngStream.broadcast, lambda stream: stream)

    def fork(self, /, *, split: Shapes | None = None) -> Rngs:
        """New streams, each starting at the next key of the one here."""
        if split is not None:
            _deprecate_fork_split()
        return self._each(split, RngStream.split, RngStream.fork)


def shape_by_filter(
    shapes: Shapes | None,
) -> Callable[[tuple[Any, ...], RngStream], tuple[bool, int | Shape | None]]:
    """What ``shapes`` says of a stream at a path: whether it says anything, and the shape or None."""
    if not isinstance(shapes, Mapping):
        return lambda path, stream: (True, shapes)
    rules = [(filters.to_predicate(key), shape) for key, shape in shapes.items()]

    def shape_of(path: tuple[Any, ...], stream: RngStream) -> tuple[bool, int | Shape | None]:
        return next(((True, shape) for matches, shape in rules if matches(path, stream)), (False, None))

    return shape_of
