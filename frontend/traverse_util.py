"""Nested dicts as flat ones, keyed by path, and back; and traversals, which select parts of nested data.

A traversal iterates over what it selects and makes changed copies: ``t_identity.each()["a"]`` selects the item ``a`` of
each item of a container. Public names are those of ``flax.traverse_util``.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

import jax

from distaff.frontend import struct
from distaff.frontend.core.frozen_dict import FrozenDict, freeze


@struct.dataclass
class _EmptyNode:
    """Stands for an empty dict in a flattened one."""


empty_node = _EmptyNode()


def flatten_dict(
    xs: Mapping[Any, Any],
    keep_empty_nodes: bool = False,
    is_leaf: Callable[[tuple[Any, ...], Any], bool] | None = None,
    sep: str | None = None,
) -> dict[Any, Any]:
    """Flatten a nested dict: ``{"a": {"b": 1}}`` becomes ``{("a", "b"): 1}``, or with ``sep="/"`` ``{"a/b": 1}``.

    Args:
        xs: a dict or ``FrozenDict``, nested.
        keep_empty_nodes: keep empty dicts inside, as ``empty_node``; otherwise they are dropped.
        is_leaf: called with path and value; True keeps a dict whole.
        sep: joins the parts of a path, which must then be strings.
    """
    if not isinstance(xs, FrozenDict | dict):
        raise TypeError(f"flatten_dict takes a dict or FrozenDict, got {type(xs)}")
    pairs = flat_items(xs, (FrozenDict, dict), keep_empty_nodes, is_leaf)
    return {path if sep is None else sep.join(path): value for path, value in pairs}


def flat_items(
    xs: Any,
    kinds: Any,  # as for `isinstance`
    keep_empty_nodes: bool,
    is_leaf: Callable[[tuple[Any, ...], Any], bool] | None,
    path: tuple[Any, ...] = (),
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Paths and values of nested mappings of these ``kinds``; the rest as for ``flatten_dict``."""
    if not isinstance(xs, kinds) or (is_leaf and is_leaf(path, xs)):
        yield path, xs
    elif xs:
        for key, value in xs.items():
            yield from flat_items(value, kinds, keep_empty_nodes, is_leaf, (*path, key))
    elif keep_empty_nodes and path:
        yield path, empty_node


def unflatten_dict(xs: Mapping[Any, Any], sep: str | None = None) -> dict[Any, Any]:
    """The inverse of ``flatten_dict``: ``{("a", "b"): 1}`` becomes ``{"a": {"b": 1}}``."""
    if not isinstance(xs, Mapping):
        raise TypeError(f"unflatten_dict takes a dict, got {type(xs)}")
    nested: dict[Any, Any] = {}
    for path, value in xs.items():
        *parents, last = path if sep is None else path.split(sep)
        cursor = nested
        for key in parents:
            cursor = cursor.setdefault(key, {})
        cursor[last] = {} if value is empty_node else value
    return nested


def path_aware_map(f: Callable[[tuple[Any, ...], Any], Any], nested_dict: Mapping[Any, Any]) -> dict[Any, Any]:
    """Map ``f(path, leaf)`` over the leaves of a nested dict."""
    flat = flatten_dict(nested_dict, keep_empty_nodes=True)
    return unflatten_dict({path: x if x is empty_node else f(path, x) for path, x in flat.items()})


Update = Callable[[Any], Any]


class Traversal(abc.ABC):
    """Selects parts of nested data; ``update`` and ``set`` return changed copies and never change their input.

    Deprecated in Flax, which warns whenever one is made; so does this.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Warn."""
        warnings.warn(
            "Traversals are deprecated; use jax.tree_util, path_aware_map or optax.masked.",
            DeprecationWarning,
            stacklevel=2,
        )
        return super().__new__(cls)

    @abc.abstractmethod
    def update(self, fn: Update, inputs: Any) -> Any:
        """A copy of ``inputs`` with ``fn`` applied to each selected value."""

    @abc.abstractmethod
    def iterate(self, inputs: Any) -> Iterator[Any]:
        """The selected values."""

    def set(self, values: list[Any], inputs: Any) -> Any:
        """A copy of ``inputs`` with ``values`` in place of the selected ones.

        Raises:
            ValueError: there are more or fewer values than places.
        """
        remaining = list(values)

        def next_value(_: Any) -> Any:
            if not remaining:
                raise ValueError("Not enough values were given for the selected places.")
            return remaining.pop(0)

        result = self.update(next_value, inputs)
        if remaining:
            raise ValueError(f"{len(remaining)} more values were given than places are selected.")
        return result

    def compose(self, other: Traversal) -> Traversal:
        """What ``other`` selects in what this selects."""
        return TraverseCompose(self, other)

    def merge(self, *traversals: Traversal) -> Traversal:
        """What any of ``traversals`` selects in what this selects, one after the other."""
        return self.compose(TraverseMerge(*traversals))

    def each(self) -> Traversal:
        """The items of the selected containers."""
        return self.compose(TraverseEach())

    def tree(self) -> Traversal:
        """The leaves of the selected pytrees."""
        return self.compose(TraverseTree())

    def filter(self, fn: Callable[[Any], bool]) -> Traversal:
        """The selected values for which ``fn`` is true."""
        return self.compose(TraverseFilter(fn))

    def __getattr__(self, attr: str) -> Traversal:
        if attr.startswith("__"):  # asked for by copy, pickle and inspect, not by users
            raise AttributeError(attr)
        return self.compose(TraverseAttr(attr))

    def __getitem__(self, key: Any) -> Traversal:
        return self.compose(TraverseItem(key))


class TraverseId(Traversal):
    """The whole."""

    def update(self, fn: Update, inputs: Any) -> Any:
        """``fn`` of the whole."""
        return fn(inputs)

    def iterate(self, inputs: Any) -> Iterator[Any]:
        """The whole."""
        yield inputs


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    t_identity = TraverseId()


class TraverseMerge(Traversal):
    """What any of several traversals selects."""

    def __init__(self, *traversals: Traversal) -> None:
        self._traversals = traversals

    def update(self, fn: Update, inputs: Any) -> Any:
        """Update by each traversal in turn."""
        for traversal in self._traversals:
            inputs = traversal.update(fn, inputs)
        return inputs

    def iterate(self, inputs: Any) -> Iterator[Any]:
        """The selected values of each traversal in turn."""
        for traversal in self._traversals:
            yield from traversal.iterate(inputs)


class TraverseCompose(Traversal):
    """What the second traversal selects in what the first selects."""

    def __init__(self, x: Traversal, y: Traversal) -> None:
        self._x, self._y = x, y

    def update(self, fn: Update, inputs: Any) -> Any:
        """Update inside what the first selects."""
        return self._x.update(lambda x: self._y.update(fn, x), inputs)

    def iterate(self, inputs: Any) -> Iterator[Any]:
        """The selected values, in order."""
        for x in self._x.iterate(inputs):
            yield from self._y.iterate(x)


class TraverseFilter(Traversal):
    """The whole, if a predicate holds."""

    def __init__(self, fn: Callable[[Any], bool]) -> None:
        self._fn = fn

    def update(self, fn: Update, inputs: Any) -> Any:
        """``fn`` of the whole, or the whole."""
        return fn(inputs) if self._fn(inputs) else inputs

    def iterate(self, inputs: Any) -> Iterator[Any]:
        """The whole, or nothing."""
        if self._fn(inputs):
            yield inputs


class TraverseAttr(Traversal):
    """An attribute of an object, a field of a dataclass or of a named tuple."""

    def __init__(self, attr: str) -> None:
        self._attr = attr

    def update(self, fn: Update, inputs: Any) -> Any:
        """A copy of the object with the attribute updated."""
        value = fn(getattr(inputs, self._attr))
        if isinstance(inputs, tuple) and hasattr(inputs, "_replace"):
            return inputs._replace(**{self._attr: value})
        if dataclasses.is_dataclass(inputs) and not isinstance(inputs, type):
            return dataclasses.replace(inputs, **{self._attr: value})
        changed = copy.copy(inputs)
        setattr(changed, self._attr, value)
        return changed

    def iterate(self, inputs: Any) -> Iterator[Any]:
        """The attribute."""
        yield getattr(inputs, self._attr)


class TraverseItem(Traversal):
    """An item of a container, or the items of a slice."""

    def __init__(self, key: Any) -> None:
        self._key = key

    def update(self, fn: Update, inputs: Any) -> Any:
        """A copy of the container with the item (in tuples: each item of the slice) updated."""
        if not isinstance(inputs, tuple):
            changed = copy.copy(inputs)
            changed[self._key] = fn(changed[self._key])
            return changed
        key = self._key if isinstance(self._key, slice) else slice(self._key, self._key + 1)
        chosen = set(range(*key.indices(len(inputs))))
        items = [fn(item) if i in chosen else item for i, item in enumerate(inputs)]
        return type(inputs)(*items) if hasattr(inputs, "_fields") else type(inputs)(items)

    def iterate(self, inputs: Any) -> Iterator[Any]:
        """The item, or the items of the slice."""
        if isinstance(self._key, slice):
            yield from inputs[self._key]
        else:
            yield inputs[self._key]


class TraverseEach(Traversal):
    """All items of a dict, list or tuple."""

    def update(self, fn: Update, inputs: Any) -> Any:
        """A container of the same type with each item updated."""
        if type(inputs) is dict:
            return {key: fn(value) for key, value in inputs.items()}
        if type(inputs) not in (list, tuple):
            raise ValueError(f"Only the items of a dict, list or tuple can be traversed, got {type(inputs)}.")
        return type(inputs)(fn(x) for x in inputs)

    def iterate(self, inputs: Any) -> Iterator[Any]:
        """The items; of a dict, the values."""
        yield from inputs.values() if isinstance(inputs, dict) else inputs


class TraverseTree(Traversal):
    """All leaves of a pytree."""

    def update(self, fn: Update, inputs: Any) -> Any:
        """The tree with each leaf updated."""
        return jax.tree.map(fn, inputs)

    def iterate(self, inputs: Any) -> Iterator[Any]:
        """The leaves."""
        yield from jax.tree.leaves(inputs)


class ModelParamTraversal(Traversal):
    """The parameters that a filter of name and value chooses, in the order of their names.

    Args:
        filter_fn: called with the parameter's path, such as ``"/layers_0/kernel"``, and its value.
    """

    def __init__(self, filter_fn: Callable[[str, Any], bool]) -> None:
        self._filter_fn = filter_fn

    def _chosen(self, inputs: Any) -> Iterable[tuple[tuple[str, ...], Any, bool]]:
        if not isinstance(inputs, dict | FrozenDict):
            raise ValueError(f"Only nested dicts of parameters can be traversed, got {type(inputs)}.")
        for path, value in sorted(flatten_dict(inputs, keep_empty_nodes=True).items(), key=lambda item: item[0]):
            yield path, value, value is not empty_node and self._filter_fn("/" + "/".join(path), value)

    def update(self, fn: Update, inputs: Any) -> Any:
        """The parameters with the chosen ones updated; frozen if ``inputs`` is."""
        updated = unflatten_dict({path: fn(value) if yes else value for path, value, yes in self._chosen(inputs)})
        return freeze(updated) if isinstance(inputs, FrozenDict) else updated

    def iterate(self, inputs: Any) -> Iterator[Any]:
        """The chosen parameters."""
        return (value for _, value, yes in self._chosen(inputs) if yes)
