"""Walking over object graphs: their values, children and duplicates, and copies with values replaced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from distaff.frontend.nnx.filters import Filter, PathParts, to_predicate
from distaff.frontend.nnx.graphdef import graph_mode, make_container
from distaff.frontend.nnx.kinds import Kind, kind_of
from distaff.frontend.nnx.pytrees import Pytree, empty_node, is_data_attribute, mark_data, sorted_attributes
from distaff.frontend.nnx.structure import container_items, duplicate_message, opaque_message, paths_to
from distaff.frontend.nnx.variables import Variable


def keyed_children(x: Any, graph: bool, path: PathParts = ()) -> list[tuple[Any, Any]]:
    """Keys and children; in tree mode, only what JAX sees. ``path`` is for errors."""
    if isinstance(x, Pytree):
        if not graph and not x._pytree__is_pytree:
            raise ValueError(opaque_message(x, [path]))
        named = ((key, name, x.__dict__[name]) for key, name in sorted_attributes(x))
        return [(key, value) for key, name, value in named if graph or is_data_attribute(x, name, value)]
    return container_items(x)[0] if kind_of(x) is Kind.CONTAINER else []


def iter_graph(node: Any, /, *, graph: bool | None = None) -> Iterator[tuple[PathParts, Any]]:
    """Paths and values of all that an object holds, children first, the object last; each node and variable once.

    In graph mode static attributes are among them.

    Raises:
        ValueError: in tree mode, a node contains itself or a variable stands at two places.
    """
    graph = graph_mode(graph)
    seen: set[int] = set()

    def walk(x: Any, path: PathParts, above: tuple[int, ...]) -> Iterator[tuple[PathParts, Any]]:
        if isinstance(x, Pytree | Variable):
            if graph and id(x) in seen:
                return
            if not graph and (id(x) in above or (isinstance(x, Variable) and id(x) in seen)):
                raise ValueError(duplicate_message(x, paths_to(x, [node])))
            seen.add(id(x))
        for key, child in keyed_children(x, graph, path):
            yield from walk(child, (*path, key), (*above, id(x)) if not graph else above)
        yield path, x

    yield from walk(node, (), ())


def iter_children(node: Any, /, *, graph: bool | None = None) -> Iterator[tuple[Any, Any]]:
    """Keys and values of the direct children that are nodes, variables or containers of them."""
    for key, child in keyed_children(node, graph_mode(graph)):
        if isinstance(child, Pytree | Variable):
            yield key, child


def recursive_map(f: Any, node: Any, /, *, graph: bool | None = None) -> Any:
    """A copy of an object in which each value ``x`` is replaced by ``f(path, x)``, children first; each node once.

    Containers and nodes reach ``f`` with their children already replaced.
    """
    graph = graph_mode(graph)
    done: dict[int, Any] = {}
    entered: set[int] = set()

    def walk(x: Any, path: PathParts) -> Any:
        if graph and id(x) in done:
            return done[id(x)][1]
        kind = kind_of(x)
        if not graph and (id(x) in entered or (kind is Kind.VARIABLE and id(x) in done)):
            raise ValueError(duplicate_message(x, paths_to(x, [node])))
        if kind is Kind.NODE:
            entered.add(id(x))
            fresh = empty_node(type(x), x.__dict__)
            done[id(x)] = x, fresh
            children = keyed_children(x, graph, path)
            data = [str(key) for key, child in children if is_data_attribute(x, str(key), child)]
            fresh.__dict__.update({str(key): walk(child, (*path, key)) for key, child in children})
            mark_data(fresh, data)
            result = f(path, fresh)
        elif kind is Kind.CONTAINER:
            items, treedef = container_items(x)
            made = [walk(child, (*path, key)) for key, child in items]
            result = f(path, make_container(type(x), [key for key, _ in items], made, treedef))
        else:
            result = f(path, x)
        if kind in (Kind.NODE, Kind.VARIABLE):
            done[id(x)] = x, result
            entered.discard(id(x))
        return result

    return walk(node, ())


def find_duplicates(node: Any, /, *, only: Filter = ...) -> list[list[PathParts]]:
    """The paths of each node and variable that stands at more than one place, and that the filter ``only`` matches."""
    matches = to_predicate(only)
    paths: dict[int, list[PathParts]] = {}

    def walk(x: Any, path: PathParts) -> None:
        if isinstance(x, Pytree | Variable):
            known = id(x) in paths
            if matches(path, x):
                paths.setdefault(id(x), []).append(path)
            if known or (id(x) in visited):
                return
            visited.add(id(x))
        for key, child in keyed_children(x, True):
            walk(child, (*path, key))

    visited: set[int] = set()
    walk(node, ())
    return [found for found in paths.values() if len(found) > 1]


def set_metadata(node: Any, /, *, only: Filter = Variable, **metadata: Any) -> None:
    """Set metadata of all variables in an object that the filter ``only`` matches."""
    matches = to_predicate(only)
    for path, value in list(iter_graph(node, graph=True)):
        if isinstance(value, Variable) and matches(path, value):
            value.set_metadata(**metadata)
