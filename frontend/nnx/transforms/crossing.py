"""What the transforms that map, loop and differentiate share: a call's arguments as one flat list of arrays, and back.

``Entry`` holds the arguments, and for each array what the transform's specification says of it. Inside the transform
``enter`` makes objects of arrays; ``leave`` makes a flat list of what they became and of the result, with an ``Exit``
that says the same of those arrays. Outside, ``finish`` assigns them.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import jax

from distaff.frontend.nnx.boundary import Inside, Outside, Plan, take
from distaff.frontend.nnx.filters import PathParts
from distaff.frontend.nnx.graphdef import Build
from distaff.frontend.nnx.object_trees import is_object
from distaff.frontend.nnx.origin import Origin, describe_origin
from distaff.frontend.nnx.prefix_mapping import check_aliases
from distaff.frontend.nnx.structure import Structure, paths_of
from distaff.frontend.nnx.transforms.prefixes import by_object, cell_values, leaf_values, spread
from distaff.frontend.nnx.variables import Variable

_NONE: Any = object()


@dataclasses.dataclass(frozen=True)
class Label:
    """Which array of an object something is, for errors."""

    path: PathParts
    cls: type
    origin: Origin = ()

    def __str__(self) -> str:
        where = f" {'.'.join(map(str, self.path))!r}" if self.path else ""
        made = f" (made{describe_origin(self.origin)})" if self.origin else ""
        return f"the {self.cls.__name__}{where}{made}"


def _labels(structure: Structure) -> list[Label]:
    paths = [path for spec in structure.specs for path in paths_of(spec)]
    return [
        Label(path, type(cell), cell._origin) if isinstance(cell, Variable) else Label(path, type(cell._raw_value))
        for path, cell in zip(paths, structure.cells, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class Exit:
    """The static half of what came out.

    Attributes:
        plan: what became of the objects.
        treedef: of the pair of updates and result.
        values: what the specifications say of each array.
        labels: which each is; None for those of the result that are no object's.
        num_updates: how many of the arrays are updates; the others are the result's.
        cells: for each of the updates, which of the arguments' cells it is for; None if the structure changed.
    """

    plan: Plan
    treedef: Any
    values: list[Any]
    labels: list[Label | None]
    num_updates: int
    cells: list[int] | None

    def finish(self, outside: Outside, leaves: Sequence[Any]) -> Any:
        """Assign the updates to the objects given; the result, with objects."""
        updates, out = self.treedef.unflatten(leaves)
        return self.plan.finish(outside, updates, out)


def _per_array(values: Sequence[Any], arrays: Sequence[Any]) -> list[Any]:
    """Each value as often as the tree of arrays beside it has leaves."""
    return [value for value, array in zip(values, arrays, strict=True) for _ in jax.tree.leaves(array)]


class Entry:
    """The arguments of a call.

    Args:
        transform: its name, for errors.
        trees: the arguments.
        graph, updates: the modes, resolved.
        specifications: of each argument, as ``in_axes``.
        name: of the specifications, for errors.

    Attributes:
        outside: the arguments taken apart.
        leaves, treedef: all their arrays.
        values: what the specifications say of each array.
        cell_values: the same of each variable and array of the objects.
        labels: which these are.

    Raises:
        ValueError: a specification has another structure than its argument, or says different things of a variable that
            stands at two places.
    """

    def __init__(
        self,
        transform: str,
        trees: Sequence[Any],
        graph: bool,
        updates: bool,
        specifications: Sequence[Any] | None = None,
        name: str = "in_axes",
    ) -> None:
        self.transform = transform
        self.updates = updates
        if specifications is None:
            specifications = [None] * len(trees)
        pairs = spread(tuple(map(by_object, specifications)), tuple(trees), name)
        self._object_values = [value for value, leaf in pairs if is_object(leaf)]
        self.outside = take(trees, graph)
        self.signature = self.outside.signature
        structure = self.outside.structure
        check_aliases(structure, self._object_values)
        self.cell_values = cell_values(structure, self._object_values)
        self.labels = _labels(structure)
        self.treedef: Any
        self.leaves, self.treedef = jax.tree.flatten(self.outside.trees)
        self._pairs = [(value, is_object(leaf)) for value, leaf in pairs]
        self._set_leaf_values()

    def _set_leaf_values(self) -> None:
        structure = self.outside.structure
        sizes, arrays = [end - start for start, end in structure.spans], structure.values()
        self.values = leaf_values(self._pairs, self.cell_values, arrays, sizes)
        self.leaf_labels = leaf_values([(None, of_object) for _, of_object in self._pairs], self.labels, arrays, sizes)

    def set_cell_values(self, changes: Mapping[int, Any]) -> None:
        """Have the specification say other things of some cells."""
        self.cell_values = [changes.get(i, value) for i, value in enumerate(self.cell_values)]
        self._set_leaf_values()

    def of_cells(self, objects: Sequence[Any]) -> list[tuple[Any, Any, Label]]:
        """The variables and arrays that the arguments' objects have now, what is said of each, and labels."""
        now = Structure(objects, True)
        return list(zip(now.cells, cell_values(now, self._object_values), _labels(now), strict=True))

    def assign(self, leaves: Sequence[Any], cells: Iterable[int]) -> list[Any]:
        """Assign arrays of the arguments' structure to some cells of the objects; the arguments with the arrays.

        Without updates, nodes are new objects with the same variables, and arrays are assigned to those.
        """
        own, packed = self.signature.split_trees(self.treedef.unflatten(leaves))
        values = self.signature.leaves.unpack(packed)
        of_objects = self.outside.structure.cells
        for i in cells:
            cell: Any = of_objects[i]
            if self.updates or isinstance(cell, Variable):
                cell.write(values[i])
        if self.updates or all(isinstance(cell, Variable) for cell in of_objects):
            return self.signature.join_trees(own, self.outside.objects)
        held = (x if isinstance(x, Variable) else value for x, value in zip(of_objects, values, strict=True))
        build = Build(held)
        return self.signature.join_trees(own, [build.make(spec) for spec in self.signature.specs])

    def of_trees(self, numbers: Set[int]) -> tuple[list[bool], frozenset[int]]:
        """Which of the arrays are in some of the arguments, and which of the cells."""
        leaves = [i in numbers for i, tree in enumerate(self.outside.trees) for _ in jax.tree.leaves(tree)]
        spans = zip(self.signature.leaves.spans, self.signature.owners, strict=True)
        return leaves, frozenset(i for (start, end), owner in spans if owner in numbers for i in range(start, end))

    def without_arrays(self) -> Entry:
        """The static half alone, to be kept."""
        static = copy.copy(self)
        del static.outside, static.leaves
        return static

    def enter(self, leaves: Sequence[Any]) -> Inside:
        """Objects of the arrays, inside the transform."""
        return self.signature.enter(self.treedef.unflatten(leaves))

    def leave(
        self,
        inside: Inside,
        out: Any,
        specification: Any = _NONE,
        name: str = "out_axes",
        also: frozenset[int] = frozenset(),
        prepare: Callable[[Any, Any], None] | None = None,
    ) -> tuple[list[Any], Exit]:
        """What became of the objects, and the result, as arrays.

        Args:
            out: the result.
            specification: of the result, as ``out_axes``; left out, nothing is said of the arrays that come out.
            name: of it, for errors.
            also: cells whose values are to be among the updates even if they did not change.
            prepare: called with each variable or array of objects, and what the specification says of it, before.
        """
        pairs = spread(None if specification is _NONE else by_object(specification), out, name)
        given = inside.objects if self.updates else []
        returned = [leaf for _, leaf in pairs if is_object(leaf)]
        structure = Structure([*given, *returned], True)
        if specification is _NONE:
            values: list[Any] = [None] * (len(given) + len(returned))
        else:
            values = [*self._object_values[: len(given)], *(value for value, leaf in pairs if is_object(leaf))]
            check_aliases(structure, values)
        of_cells, labels = cell_values(structure, values), _labels(structure)
        if prepare is not None:
            if not self.updates:
                for cell, value in zip(inside.cells, self.cell_values, strict=True):
                    prepare(cell, value)
            for cell, value in zip(structure.cells, of_cells, strict=True):
                prepare(cell, value)
        updates, pure, static = inside.leave(out, structure_updates=self.updates, also=also)
        plan: Plan = static.value
        leaves, treedef = jax.tree.flatten((updates, pure))
        first = structure.spans[len(given)][0] if returned else len(structure.cells)
        cells = None if plan.known is not None else list(plan.changed)
        of_updates = of_cells[:first] if cells is None else [self.cell_values[i] for i in cells]
        of_labels = labels[:first] if cells is None else [self.labels[i] for i in cells]
        arrays, sizes = structure.values()[first:], [end - start for start, end in structure.spans[len(given) :]]
        all_values = _per_array(of_updates, updates)
        all_labels: list[Any] = _per_array(of_labels, updates)
        number = len(all_values)
        all_values += leaf_values([(v, is_object(leaf)) for v, leaf in pairs], of_cells[first:], arrays, sizes)
        all_labels += leaf_values([(None, is_object(leaf)) for _, leaf in pairs], labels[first:], arrays, sizes)
        return leaves, Exit(plan, treedef, all_values, all_labels, number, cells)

    def finish(self, exit: Exit, leaves: Sequence[Any]) -> Any:
        """Assign the updates to the objects given; the result, with objects."""
        return exit.finish(self.outside, leaves)
