"""``State``: the variables and arrays of an object, by path; and the functions on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Generic, TypeVar

import jax

from distaff.frontend.nnx.filters import Filter, Key, PathIn, PathParts, Predicate, filters_to_predicates
from distaff.frontend.nnx.variables import Variable

K = TypeVar("K")
V = TypeVar("V")
Nested = dict[Any, Any]


def key_order(key: Key) -> tuple[str, Key]:
    """What keys of several types are sorted by: int before str."""
    return type(key).__name__, key


def sorted_keys(mapping: Mapping[Any, Any]) -> list[Any]:
    """The keys of a mapping in the order of ``key_order``."""
    try:
        return sorted(mapping)
    except TypeError:
        return sorted(mapping, key=key_order)


def raw_dict(state: Any) -> Nested:
    """The nested dict behind a ``State``, or the mapping as one."""
    if isinstance(state, State):
        return state._mapping
    return state if type(state) is dict else dict(state)


def iter_flat(mapping: Any, path: PathParts = ()) -> Iterator[tuple[PathParts, Any]]:
    """Paths and leaves of nested mappings, sorted."""
    mapping = raw_dict(mapping)
    for key in sorted_keys(mapping):
        value = mapping[key]
        if isinstance(value, Mapping):
            yield from iter_flat(value, (*path, key))
        else:
            yield (*path, key), value


def nest(items: Iterable[tuple[PathParts, Any]]) -> Nested:
    """Nested dicts of paths and leaves."""
    root: Nested = {}
    for path, value in items:
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return root


class State(MutableMapping[Any, Any]):
    """A mapping from names (or indices) to variables, arrays, or further mappings; its entries are attributes too.

    A pytree node: its leaves are the values in the order of their sorted keys.
    """

    _mapping: Nested

    def __init__(self, mapping: Mapping[Any, Any] | Iterator[tuple[Any, Any]], /, *, _copy: bool = True) -> None:
        object.__setattr__(self, "_mapping", dict(mapping) if _copy else mapping)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _register_state(cls)

    @property
    def raw_mapping(self) -> Nested:
        """The nested dicts that the state is a view of."""
        return self._mapping

    def __getitem__(self, key: Any) -> Any:
        value = self._mapping[key]
        return type(self)(value, _copy=False) if isinstance(value, dict) else value

    def __getattr__(self, key: str) -> Any:
        if "_mapping" not in vars(self) or key not in self._mapping:
            raise AttributeError(f"{type(self).__name__} has no entry {key!r}.")
        return self[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._mapping[key] = value._mapping if isinstance(value, State) else value

    __setattr__ = __setitem__

    def __delitem__(self, key: Any) -> None:
        del self._mapping[key]

    def __contains__(self, key: object) -> bool:
        return key in self._mapping

    def __iter__(self) -> Iterator[Any]:
        return iter(self._mapping)

    def __len__(self) -> int:
        return len(self._mapping)

    def __repr__(self) -> str:
        from distaff.frontend.nnx.representation import represent

        return represent(self)

    def __or__(self, other: Mapping[Any, Any]) -> State:
        return self.merge(self, other)

    def __sub__(self, other: Mapping[Any, Any]) -> State:
        """As ``statelib.diff``."""
        return diff(self, other)

    # The module's functions as methods.

    def map(self, f: Callable[[PathParts, Any], Any]) -> State:
        """As ``nnx.map_state``."""
        return map_state(f, self)

    def flat_state(self) -> FlatState[Any]:
        """As ``nnx.to_flat_state``."""
        return to_flat_state(self)

    @classmethod
    def from_flat_path(cls, flat_state: Mapping[PathParts, Any] | Iterable[tuple[PathParts, Any]], /) -> State:
        """As ``nnx.from_flat_state``."""
        return from_flat_state(flat_state, cls=cls)

    def to_pure_dict(self, extract_fn: Callable[[Any], Any] | None = None) -> Nested:
        """As ``nnx.to_pure_dict``."""
        return to_pure_dict(self, extract_fn)

    def replace_by_pure_dict(self, pure_dict: Nested, replace_fn: Callable[[Any, Any], Any] | None = None) -> None:
        """As ``nnx.replace_by_pure_dict``."""
        replace_by_pure_dict(self, pure_dict, replace_fn)

    def split(self, first: Filter, /, *filters: Filter) -> Any:
        """As ``nnx.split_state``."""
        return split_state(self, first, *filters)

    def filter(self, first: Filter, /, *filters: Filter) -> Any:
        """As ``nnx.filter_state``."""
        return filter_state(self, first, *filters)

    @classmethod
    def merge(cls, state: Mapping[Any, Any], /, *states: Mapping[Any, Any]) -> State:
        """As ``nnx.merge_state``."""
        return merge_state(state, *states, cls=cls)


def _register_state(cls: type[State]) -> None:
    def flatten(state: State) -> tuple[list[Any], tuple[Any, ...]]:
        keys = tuple(sorted_keys(state._mapping))
        return [state[key] for key in keys], keys

    def flatten_with_keys(state: State) -> tuple[list[Any], tuple[Any, ...]]:
        children, keys = flatten(state)
        return [(jax.tree_util.DictKey(key), child) for key, child in zip(keys, children, strict=True)], keys

    def unflatten(keys: tuple[Any, ...], children: Iterable[Any]) -> State:
        # JAX fills trees with objects of its own at times: only states are nested.
        values = (c._mapping if isinstance(c, State) else c for c in children)
        return cls(dict(zip(keys, values, strict=True)), _copy=False)

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)


_register_state(State)


class FlatState(Sequence[Any], Generic[V]):
    """Pairs of a path and a value, as a sequence; a pytree node whose leaves are the values.

    Args:
        items: the pairs.
        sort: put them in the order of their paths.
    """

    __slots__ = ("_keys", "_values")

    def __init__(self, items: Iterable[tuple[PathParts, V]], /, *, sort: bool) -> None:
        pairs = list(items)
        if sort:
            pairs.sort(key=lambda pair: tuple(map(key_order, pair[0])))
        self._keys: tuple[PathParts, ...] = tuple(path for path, _ in pairs)
        self._values: list[V] = [value for _, value in pairs]

    @classmethod
    def from_sorted_keys_values(cls, keys: tuple[PathParts, ...], values: list[V], /) -> FlatState[V]:
        """Of sorted paths and their values."""
        made = object.__new__(cls)
        made._keys, made._values = keys, values
        return made

    @property
    def paths(self) -> tuple[PathParts, ...]:
        """The paths."""
        return self._keys

    @property
    def leaves(self) -> list[V]:
        """The values."""
        return self._values

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return FlatState.from_sorted_keys_values(self._keys[index], self._values[index])
        return self._keys[index], self._values[index]

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[tuple[PathParts, V]]:
        return zip(self._keys, self._values, strict=True)

    def __repr__(self) -> str:
        from distaff.frontend.nnx.representation import represent

        return represent(self)

    def to_nested_state(self) -> Any:
        """As a ``State``; the value itself if it is one alone, without a path."""
        if self._keys == ((),):
            return self._values[0]
        return State(nest(self), _copy=False)

    def split(self, first: Filter, /, *filters: Filter) -> Any:
        """One flat state for each filter: the values that it matches and none before it does.

        Raises:
            ValueError: some values match no filter.
        """
        groups = split_flat(self, (first, *filters))
        return groups[0] if not filters else tuple(groups)

    def filter(self, first: Filter, /, *filters: Filter) -> Any:
        """As ``split``, without the values that match no filter."""
        groups = _grouped(self, filters_to_predicates((first, *filters)))[:-1]
        return groups[0] if not filters else tuple(groups)

    @staticmethod
    def merge(flat_state: Iterable[tuple[PathParts, Any]], /, *flat_states: Iterable[tuple[PathParts, Any]]) -> Any:
        """All pairs in one, sorted by path; of equal paths, the last holds."""
        merged = {path: value for state in (flat_state, *flat_states) for path, value in state}
        return FlatState(merged.items(), sort=True)


jax.tree_util.register_pytree_with_keys(
    FlatState,
    lambda flat: ([(jax.tree_util.SequenceKey(i), v) for i, v in enumerate(flat._values)], flat._keys),
    lambda keys, values: FlatState.from_sorted_keys_values(keys, list(values)),
    lambda flat: (flat._values, flat._keys),
)


def _grouped(pairs: Iterable[tuple[PathParts, Any]], predicates: Sequence[Predicate]) -> list[FlatState[Any]]:
    """The pairs by the first predicate that matches; those that none matches are the last group."""
    groups: list[list[tuple[PathParts, Any]]] = [[] for _ in range(len(predicates) + 1)]
    for path, value in pairs:
        for i, predicate in enumerate(predicates):
            if predicate(path, value):
                groups[i].append((path, value))
                break
        else:
            groups[-1].append((path, value))
    return [FlatState(group, sort=False) for group in groups]


def split_flat(pairs: Iterable[tuple[PathParts, Any]], filters: tuple[Filter, ...]) -> list[FlatState[Any]]:
    """The pairs by the first filter that matches, one group for each filter.

    Raises:
        ValueError: some match no filter.
    """
    *groups, rest = _grouped(pairs, filters_to_predicates(filters))
    if len(rest):
        raise ValueError(
            f"Non-exhaustive filters, got a non-empty remainder: {rest}.\nUse `...` to match all remaining elements."
        )
    return groups


def filter_flat(pairs: Iterable[tuple[PathParts, Any]], filters: tuple[Filter, ...]) -> list[FlatState[Any]]:
    """As ``split_flat``, without what matches no filter."""
    return _grouped(pairs, filters_to_predicates(filters))[:-1]


def map_state(f: Callable[[PathParts, Any], Any], state: State) -> State:
    """The state of ``f(path, value)`` for each value."""
    return type(state)(nest((path, f(path, value)) for path, value in iter_flat(state)), _copy=False)


def to_flat_state(state: Mapping[Any, Any]) -> FlatState[Any]:
    """Paths and values, sorted."""
    return FlatState(iter_flat(state), sort=False)


def from_flat_state(
    flat_state: Mapping[PathParts, Any] | Iterable[tuple[PathParts, Any]], *, cls: type[State] = State
) -> State:
    """The state of these paths and values."""
    return cls(nest(flat_state.items() if isinstance(flat_state, Mapping) else flat_state), _copy=False)


def to_pure_dict(state: Mapping[Any, Any], extract_fn: Callable[[Any], Any] | None = None) -> Nested:
    """Nested dicts of the values themselves, without variables around them.

    Args:
        state: the state.
        extract_fn: what makes a leaf of the result of one of the state (default: the value of a variable).
    """
    take = extract_fn or (lambda x: x.get_raw_value() if isinstance(x, Variable) else x)
    return nest((path, take(value)) for path, value in iter_flat(state))


def restore_int_paths(pure_dict: Nested) -> Nested:
    """Nested dicts with keys such as ``"0"`` made int again, which some checkpoints store as str."""

    def restored(key: Any) -> Any:
        return int(key) if isinstance(key, str) and key.isdigit() else key

    return {restored(k): restore_int_paths(v) if isinstance(v, dict) else v for k, v in pure_dict.items()}


def replace_by_pure_dict(state: State, pure_dict: Nested, replace_fn: Callable[[Any, Any], Any] | None = None) -> None:
    """Assign the values of nested dicts to the variables of a state.

    Args:
        state: is changed.
        pure_dict: the values; may lack some.
        replace_fn: ``(old, value) -> new`` for each leaf (default: the variable with the new value).

    Raises:
        ValueError: a value has a path that the state lacks; nothing is changed then.
    """

    def default(old: Any, value: Any) -> Any:
        return old.replace(value) if isinstance(old, Variable) else value

    replace = replace_fn or default
    current = dict(iter_flat(state))
    given = list(iter_flat(pure_dict))
    unknown = [path for path, _ in given if path not in current]
    if unknown:
        raise ValueError(f"Key in pure_dict not available in state: {unknown[0]}. It has {sorted(map(str, current))}.")
    for path, value in given:
        node = state._mapping
        for key in path[:-1]:
            node = raw_dict(node[key])
        node[path[-1]] = replace(current[path], value)


def split_state(state: Mapping[Any, Any], first: Filter, /, *filters: Filter) -> Any:
    """One state for each filter: the values that it matches and none before it does.

    Raises:
        ValueError: some values match no filter.
    """
    groups = tuple(group.to_nested_state() for group in split_flat(iter_flat(state), (first, *filters)))
    return groups if filters else groups[0]


def filter_state(state: Mapping[Any, Any], first: Filter, /, *filters: Filter) -> Any:
    """As ``split_state``, without the values that match no filter."""
    groups = tuple(group.to_nested_state() for group in filter_flat(iter_flat(state), (first, *filters)))
    return groups if filters else groups[0]


def diff(state: State, other: Mapping[Any, Any]) -> State:
    """What a state has at paths that ``other`` lacks."""
    taken = {path for path, _ in iter_flat(other)}
    return type(state)(nest((path, value) for path, value in iter_flat(state) if path not in taken), _copy=False)


def create_path_filters(state: State) -> dict[PathIn, Any]:
    """Filters by path, one for each of the values in a state, such as axes; the values must be hashable."""
    paths: dict[Any, list[PathParts]] = {}
    for path, value in iter_flat(state):
        paths.setdefault(value.get_value() if isinstance(value, Variable) else value, []).append(path)
    return {PathIn(*found): value for value, found in paths.items()}


def merge_nested(states: Iterable[Any]) -> Nested:
    """Nested mappings in one; where two have a leaf at the same path, the last holds."""
    merged: Nested = {}
    for state in states:
        for key, value in raw_dict(state).items():
            if isinstance(value, Mapping):
                before = merged.get(key)
                merged[key] = merge_nested((before, value) if isinstance(before, Mapping) else (value,))
            else:
                merged[key] = value
    return merged


def merge_state(state: Mapping[Any, Any], /, *states: Mapping[Any, Any], cls: type[State] = State) -> State:
    """All states in one; where two have a leaf at the same path, the last holds."""
    return cls(merge_nested((state, *states)), _copy=False)
