"""What the transforms that map, loop and differentiate share: a call's arguments as one flat list of arrays, and back.

``Entry`` is the static half of the arguments and says of each array what the transform's specification says of it.
Inside the transform ``enter`` makes objects of the arrays; ``leave`` makes a flat list of what they became and of the
result, with an ``Exit`` that says the same of those arrays. Outside, ``finish`` assigns and returns them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from distaff.frontend.nnx.extract import Inside, Outside, Plan, Signature, check_aliases, is_object, take
from distaff.frontend.nnx.filters import PathParts
from distaff.frontend.nnx.origin import Origin, describe_origin
from distaff.frontend.nnx.structure import Structure, paths_of
from distaff.frontend.nnx.transforms.prefixes import by_object, cell_values, check_no_mapping, leaf_values, spread
from distaff.frontend.nnx.variables import Variable


@dataclasses.dataclass(frozen=True)
class Label:
    """Which array something is, for errors."""

    path: PathParts
    cls: type
    origin: Origin = ()

    def __str__(self) -> str:
        where = ".".join(map(str, self.path)) or "the object itself"
        made = f", made{describe_origin(self.origin)}" if self.origin else ""
        return f"the {self.cls.__name__} {where!r}{made}"


def _label(path: PathParts, cell: Any) -> Label:
    if isinstance(cell, Variable):
        return Label(path, type(cell), cell._origin)
    return Label(path, type(cell._raw_value))


def _labels(structure: Structure) -> list[Label]:
    paths = [path for spec in structure.specs for path in paths_of(spec)]
    return [_label(path, cell) for path, cell in zip(paths, structure.cells, strict=True)]


@dataclasses.dataclass(frozen=True)
class Exit:
    """The static half of what came out.

    Attributes:
        plan: what became of the objects.
        treedef: of the pair of updates and result.
        values: what the specifications say of each array.
        labels: which each is; None for those of the result that are no object's.
        is_result: for each, whether it is the result's.
    """

    plan: Plan
    treedef: Any
    values: list[Any]
    labels: list[Label | None]
    is_result: list[bool]

    def finish(self, outside: Outside, leaves: Sequence[Any]) -> Any:
        """Assign the updates to the objects given; the result, with objects."""
        updates, out = self.treedef.unflatten(leaves)
        return self.plan.finish(outside, updates, out)


class Entry:
    """The static half of a call's arguments.

    Args:
        transform: its name, for errors.
        trees: the arguments.
        graph, updates: the modes, resolved.
        specifications: of each argument, as ``in_axes``.
        name: of the specifications, for errors.

    Attributes:
        treedef: of the arguments with tuples for objects.
        values: what the specifications say of each array.
        cell_values: the same of each variable and array of the objects.
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
        self._specifications = tuple([None] * len(trees) if specifications is None else map(by_object, specifications))
        if len(self._specifications) != len(trees):
            raise ValueError(
                f"{name} of nnx.{transform} has {len(self._specifications)} entries, but there are {len(trees)} "
                "arguments."
            )
        if not updates:
            check_no_mapping(specifications, name, transform)
        self._pairs = spread(self._specifications, tuple(trees), name)
        self._object_values = [value for value, leaf in self._pairs if is_object(leaf)]
        self.outside = take(trees, graph)
        structure = self.outside.structure
        if any(value != self._object_values[0] for value in self._object_values):
            check_aliases(structure, self._object_values)
        self.cell_values = cell_values(structure, self._object_values)
        self.leaves, self.treedef = jax.tree.flatten(self.outside.trees)
        sizes = iter([end - start for start, end in structure.spans])
        self.values = leaf_values(
            self._pairs, zip(self.cell_values, structure.values(), strict=True), sizes
        )
        self.labels = _labels(structure)

    @property
    def signature(self) -> Signature:
        """The signature of the arguments."""
        return self.outside.signature

    def enter(self, leaves: Sequence[Any]) -> Inside:
        """Objects of the arrays, inside the transform."""
        return self.signature.enter(self.treedef.unflatten(leaves))

    def leave(
        self,
        inside: Inside,
        out: Any,
        specification: Any = None,
        name: str = "out_axes",
        complete: Callable[[int], bool] = lambda tree: False,
    ) -> tuple[list[Any], Exit]:
        """What became of the objects, and the result, as arrays.

        Args:
            out: the result.
            specification: of the result, as ``out_axes``.
            name: of it, for errors.
            complete: whether all arrays of an argument, by its number, are to be among the updates, changed or not.
        """
        updates, pure, plan = inside.leave(out, self.updates, complete)
        leaves, treedef = jax.tree.flatten((updates, pure))
        if not self.updates:
            check_no_mapping(specification, name, self.transform)
        pairs = spread(by_object(specification), out, name)
        given = inside.objects if self.updates else []
        returned = [leaf for _, leaf in pairs if is_object(leaf)]
        structure = Structure([*given, *returned], True)
        values = [*self._object_values[: len(given)], *(value for value, leaf in pairs if is_object(leaf))]
        check_aliases(structure, values)
        of_cells, labels = cell_values(structure, values), _labels(structure)
        first = structure.spans[len(given)][0] if returned else len(structure.cells)
        if plan.structure is None:
            of_updates = [(self.cell_values[i], self.labels[i]) for i in plan.changed]
        else:
            of_updates = list(zip(of_cells[:first], labels[:first], strict=True))
        sizes = [end - start for start, end in structure.spans[len(given) :]]
        arrays = structure.values()[first:]
        all_values: list[Any] = []
        all_labels: list[Label | None] = []
        for (value, label), array in zip(of_updates, updates, strict=True):
            number = len(jax.tree.leaves(array))
            all_values += [value] * number
            all_labels += [label] * number
        number = len(all_values)
        all_values += leaf_values(pairs, zip(of_cells[first:], arrays, strict=True), iter(sizes))
        all_labels += leaf_values(
            [(None, leaf) for _, leaf in pairs], zip(labels[first:], arrays, strict=True), iter(sizes)
        )
        is_result = [i >= number for i in range(len(leaves))]
        return leaves, Exit(plan, treedef, all_values, all_labels, is_result)

    def finish(self, exit: Exit, leaves: Sequence[Any]) -> Any:
        """Assign the updates to the objects given; the result, with objects."""
        return exit.finish(self.outside, leaves)
