"""Objects into trees of arrays and back: the one way in which all transforms pass objects through JAX.

``take`` replaces the objects in a function's arguments by tuples of arrays; the rest is a hashable ``Signature``. In
the transform, ``Signature.enter`` makes objects of its own of them, the function runs, and ``Inside.leave`` finds what
became of the objects. Outside, ``Plan.finish`` assigns that to those that were given and makes those returned.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Iterable, Sequence, Set
from typing import Any, NamedTuple

import jax

from distaff.frontend.nnx.graphdef import Build, Spec, as_output, from_output
from distaff.frontend.nnx.object_trees import WHOLE, Layout, Taken, count_objects, put_tree, take_tree
from distaff.frontend.nnx.origin import describe_origin
from distaff.frontend.nnx.prefix_mapping import PrefixMapping, check_aliases, object_prefixes
from distaff.frontend.nnx.pytrees import Pytree
from distaff.frontend.nnx.stored_values import changes_in_place
from distaff.frontend.nnx.structure import ItemCell, Structure, Walk, structure_of
from distaff.frontend.nnx.variables import Variable, assign_all


class Leaves(NamedTuple):
    """How the joint leaves of several objects are put into tuples.

    Attributes:
        spans: of each object, which of the leaves are its own.
        groups: for each object, if a ``PrefixMapping`` was given for it, the leaves that each filter takes.
    """

    spans: tuple[tuple[int, int], ...]
    groups: tuple[tuple[tuple[int, ...], ...] | None, ...]

    def pack(self, values: Sequence[Any]) -> list[Any]:
        """For each object, its leaves as a tuple; in groups where a ``PrefixMapping`` was given."""
        packed: list[Any] = []
        for (start, end), groups in zip(self.spans, self.groups, strict=True):
            own = tuple(values[start:end])
            packed.append(own if groups is None else tuple([tuple([own[i] for i in group]) for group in groups]))
        return packed

    def unpack(self, packed: Iterable[Any]) -> list[Any]:
        """The inverse of ``pack``."""
        flat: list[Any] = []
        for own, groups in zip(packed, self.groups, strict=True):
            if groups is None:
                flat += own
            else:
                placed = {i: x for group, xs in zip(groups, own, strict=True) for i, x in zip(group, xs, strict=True)}
                flat += [placed[i] for i in range(len(placed))]
        return flat


class Signature:
    """The static half of some trees: where objects stand in them and what these are.

    Two are the same object if they are equal, so that JAX need not compare them.

    Attributes:
        layouts: of each tree.
        specs: of all objects, with a joint numbering.
        leaves: how their leaves are put into tuples.
        owners: for each object, the number of its tree.
        graph: whether shared references are allowed.
    """

    def __init__(
        self, layouts: tuple[Layout | None, ...], specs: tuple[Spec, ...], leaves: Leaves, prefixes: Any, graph: bool
    ) -> None:
        self.layouts = layouts
        self.specs = specs
        self.leaves = leaves
        self.prefixes = prefixes
        self.owners = tuple(i for i, layout in enumerate(layouts) for _ in range(count_objects(layout)))
        self.graph = graph

    def split_trees(self, trees: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Trees in which tuples stand for objects, as (leaves of each tree, tuples)."""
        leaves, pure = [], []
        for layout, tree in zip(self.layouts, trees, strict=True):
            if layout is None:
                leaves.append(tree)
            elif layout is WHOLE:
                leaves.append(None)
                pure.append(tree)
            else:
                own = layout.treedef.flatten_up_to(tree)
                leaves.append(own)
                pure += (own[i] for i in layout.positions)
        return leaves, pure

    def join_trees(self, leaves: Sequence[Any], values: Iterable[Any]) -> list[Any]:
        """The trees with ``values`` where objects stood."""
        remaining = iter(values)
        return [
            put_tree(own, layout, [next(remaining) for _ in range(count_objects(layout))])
            for own, layout in zip(leaves, self.layouts, strict=True)
        ]

    def updates_tree(self, packed: Iterable[Any]) -> list[Any]:
        """The trees with tuples where objects stood and None for all else."""
        nothing = [None if x is None or x is WHOLE else [None] * x.treedef.num_leaves for x in self.layouts]
        return self.join_trees(nothing, packed)

    def enter(self, trees: Sequence[Any]) -> Inside:
        """Make objects of the tuples in ``trees``, new ones that belong to the running JAX transform."""
        return Inside(self, trees)


_signatures: weakref.WeakValueDictionary[Any, Signature] = weakref.WeakValueDictionary()


class Outside(NamedTuple):
    """What ``take`` gives: the trees with tuples of arrays for objects, and how to come back.

    Attributes:
        signature: the static half; hashable.
        trees: for each tree given, it with the tuples.
        structure: where the objects' values are.
        objects: the objects.
    """

    signature: Signature
    trees: list[Any]
    structure: Structure
    objects: list[Any]

    def of_copies(self) -> Outside:
        """The same with new objects, so that those given stay as they are."""
        inside = self.signature.enter(self.trees)
        return Outside(self.signature, self.trees, Structure(inside.objects, self.signature.graph), inside.objects)


def take(
    trees: Sequence[Any], graph: bool = True, prefixes: Sequence[Any] | None = None, skip: frozenset[int] = frozenset()
) -> Outside:
    """Replace the objects in some trees by tuples of their arrays.

    Args:
        trees: such as a function's arguments; they share one numbering of objects.
        graph: whether shared references between and within them are allowed.
        prefixes: for each tree, the specification of a transform, or None. Where a ``PrefixMapping`` is given for an
            object, its leaves come in one tuple for each filter.
        skip: the numbers of trees to leave as they are.

    Raises:
        ValueError: in tree mode, a variable stands at two places; a variable that stands at two places has another
            prefix at each.
    """
    taken = [Taken(tree, None, []) if i in skip else take_tree(tree) for i, tree in enumerate(trees)]
    objects = [x for tree in taken for x in tree.objects]
    structure = structure_of(objects, graph)
    layouts = tuple([tree.layout for tree in taken])
    of_objects = None if prefixes is None else tuple(object_prefixes(taken, prefixes))
    key = layouts, of_objects
    signature = structure.kept.get(key)
    if signature is None:
        signature = structure.kept[key] = _signature(layouts, structure, of_objects)
    packed = iter(signature.leaves.pack(structure.values()))
    made = [
        tree.leaves if tree.layout is None else put_tree(tree.leaves, tree.layout, [next(packed) for _ in tree.objects])
        for tree in taken
    ]
    return Outside(signature, made, structure, objects)


def _signature(layouts: tuple[Layout | None, ...], structure: Structure, prefixes: Any) -> Signature:
    if prefixes is not None:
        check_aliases(structure, prefixes)
    leaves = _leaves(structure.specs, structure.cells, structure.spans, prefixes)
    key = layouts, structure.specs, leaves.groups, prefixes, structure.graph
    return _signatures.setdefault(key, Signature(layouts, structure.specs, leaves, prefixes, structure.graph))


def _leaves(specs: Sequence[Spec], cells: Sequence[Any], spans: Sequence[tuple[int, int]], prefixes: Any) -> Leaves:
    groups = tuple(
        prefix.groups(spec, cells[start:end]) if isinstance(prefix, PrefixMapping) else None
        for spec, (start, end), prefix in zip(specs, spans, prefixes or [None] * len(specs), strict=True)
    )
    return Leaves(tuple(spans), groups)


class Inside:
    """The objects of a transform's function, while it is traced.

    Attributes:
        trees: the trees with objects again.
        objects: the objects in them.
        cells: their variables and arrays, in the order of the signature's leaves.
        values: what these came with.
    """

    def __init__(self, signature: Signature, trees: Sequence[Any]) -> None:
        self.signature = signature
        leaves, packed = signature.split_trees(trees)
        self.values = signature.leaves.unpack(packed)
        build, remaining = Build(), iter(self.values)
        self.objects = [build.make_with(spec, remaining) for spec in signature.specs]
        self.trees = signature.join_trees(leaves, self.objects)
        walk = Walk()
        walk.visit_all(self.objects)
        self.cells = walk.cells
        self._numbered = walk.objects
        self._metadata = [cell._var_metadata for cell in walk.cells if isinstance(cell, Variable)]

    def leave(
        self,
        out: Any,
        *,
        structure_updates: bool,
        whole: bool = False,
        complete: frozenset[int] = frozenset(),
        also: frozenset[int] = frozenset(),
        out_prefix: Any = None,
    ) -> tuple[Any, Any, Static]:
        """What became of the objects, and the function's result without objects.

        Args:
            out: the result.
            structure_updates: whether changes of structure are passed on, and objects may be returned that were given.
            whole: give the updates as a list of trees like those given, with None for what is no object; otherwise as a
                list of arrays, of those that changed.
            complete: of which trees all leaves are among the updates, changed or not (as of donated ones).
            also: of which cells the values are among the updates, changed or not.
            out_prefix: the specification of the transform for the result.

        Returns:
            ``(updates, out, static)``: the first two are trees of arrays, the last is to be passed out as it is.

        Raises:
            ValueError: an object of another trace is returned; without ``structure_updates``, a variable that was
                given, or (in tree mode) one twice.
        """
        walk = Walk()
        spans = walk.visit_all(self.objects)
        specs = tuple(walk.specs)
        same = (
            specs == self.signature.specs
            and all(map(operator.is_, walk.objects, self._numbered))
            and self._items_are_same(walk.cells, whole or bool(complete))
        )
        known: dict[int, int] | None = None
        if structure_updates and not same:
            numbers = {id(x): i for i, x in enumerate(self._numbered)}
            known = {i: numbers[id(x)] for i, x in enumerate(walk.objects) if id(x) in numbers}
            leaves = _leaves(specs, walk.cells, spans, self.signature.prefixes)
            cells, changed = walk.cells, list(range(len(walk.cells)))
        else:
            leaves, cells = self.signature.leaves, self.cells
            changed = list(range(len(cells))) if whole else self._changed(structure_updates, complete, also)
        self._check_out(out, structure_updates)
        if not structure_updates:
            walk = Walk()
        taken, pure_out, out_specs, out_leaves = _take_out(out, walk, out_prefix)
        refs = {id(value) for value in self.values if changes_in_place(value)}
        values = [_returned(cells[i], structure_updates, refs) for i in changed]
        updates = self.signature.updates_tree(leaves.pack(values)) if whole else values
        metadata = () if structure_updates else self._changed_metadata()
        variables_only = all(
            isinstance(cells[i], Variable) and not changes_in_place(cells[i]._raw_value) for i in changed
        )
        plan = Plan(
            taken.layout, out_specs, out_leaves, tuple(changed), variables_only, leaves, whole, metadata, specs, known
        )
        return updates, pure_out, Static(plan)

    def _items_are_same(self, cells: Sequence[Any], all_returned: bool) -> bool:
        """Whether no array in a container was replaced, and none has to be."""
        return all(
            not isinstance(cell, ItemCell) or (cell._raw_value is before and not all_returned)
            for cell, before in zip(cells, self.values, strict=True)
        )

    def assigned(self) -> list[int]:
        """Which of the cells hold another value than they came with."""
        pairs = zip(self.cells, self.values, strict=True)
        return [i for i, (cell, before) in enumerate(pairs) if cell._raw_value is not before]

    def _changed(self, arrays_too: bool, complete: frozenset[int], also: frozenset[int]) -> list[int]:
        spans, owners = self.signature.leaves.spans, self.signature.owners
        kept = {
            i for (start, end), owner in zip(spans, owners, strict=True) if owner in complete for i in range(start, end)
        }
        return [
            i
            for i, (cell, before) in enumerate(zip(self.cells, self.values, strict=True))
            if i in kept or i in also or (cell._raw_value is not before and (arrays_too or isinstance(cell, Variable)))
        ]

    def _changed_metadata(self) -> tuple[tuple[int, Any], ...]:
        variables = [(i, cell) for i, cell in enumerate(self.cells) if isinstance(cell, Variable)]
        return tuple(
            (i, cell._var_metadata)
            for (i, cell), before in zip(variables, self._metadata, strict=True)
            if cell._var_metadata is not before
        )

    def _check_out(self, out: Any, structure_updates: bool) -> None:
        """Refuse objects in the result that are of another trace, or of which there would be two outside."""
        given = {id(cell) for cell in self.cells if isinstance(cell, Variable)}
        returned: set[int] = set()
        for x in take_tree(out).objects:
            walk = Walk()
            walk.visit(x)
            for y in walk.objects:
                if isinstance(y, Variable) and not structure_updates and id(y) in given | returned:
                    raise ValueError(
                        f"Duplicate {type(y).__name__}: it is returned, and was given or is returned twice, but "
                        "without graph updates a transform does not support Variable aliasing. Return a copy "
                        "(nnx.clone), or pass graph=True and graph_updates=True to the transform."
                    )
                if (isinstance(y, Variable) or (structure_updates and isinstance(y, Pytree))) and not y._can_update:
                    raise ValueError(_captured_message(y, structure_updates))
            if not self.signature.graph:
                returned.update(map(id, walk.objects))


def _captured_message(x: Any, structure_updates: bool) -> str:
    found = (
        f"Cannot extract graph node from different trace level, a {type(x).__name__}"
        if structure_updates
        else f"Cannot return captured Variable, a {type(x).__name__}"
    )
    made = describe_origin(x._origin) if isinstance(x, Variable) else ""
    return (
        f"{found} that was made{made} outside of the function that returns it. Pass it to the function as an argument, "
        "or return a copy (nnx.clone)."
    )


def _returned(cell: Any, arrays_too: bool, refs: Set[int]) -> Any:
    """A value as a transform may return it; None if it is not assigned, as mutable arrays changed in place.

    Args:
        cell: what holds it.
        arrays_too: whether others than variables are assigned.
        refs: the ids of the mutable arrays that were given; others are new.
    """
    value = cell._raw_value
    if id(value) in refs or not (arrays_too or isinstance(cell, Variable)):
        return None
    return as_output(value)


def _take_out(out: Any, walk: Walk, prefix: Any) -> tuple[Taken, Any, tuple[Spec, ...], Leaves]:
    """The result with tuples for objects, which are numbered on from ``walk``."""
    taken = take_tree(out)
    known = len(walk.cells), len(walk.specs)
    spans = walk.visit_all(taken.objects)
    specs = tuple(walk.specs[known[1] :])
    prefixes = None if prefix is None else object_prefixes([taken], [prefix])
    cells = walk.cells[known[0] :]
    leaves = _leaves(specs, cells, [(start - known[0], end - known[0]) for start, end in spans], prefixes)
    packed = leaves.pack([as_output(cell._raw_value) for cell in cells])
    return taken, put_tree(taken.leaves, taken.layout, packed), specs, leaves


class Plan(NamedTuple):
    """The static half of what a transform's function did to its objects.

    Attributes:
        layout: where objects stand in the result.
        out_specs: of these.
        out_leaves: how their leaves are put into tuples.
        changed: which leaves the updates are for.
        variables_only: whether these are all variables.
        leaves: how these are put into tuples, if ``whole``.
        whole: whether the updates are trees, or a list.
        metadata: which variables have other metadata, and what.
        specs: of the objects given, as they are now.
        known: if their structure changed: which of the new numbers were which of the old ones.
    """

    layout: Layout | None
    out_specs: tuple[Spec, ...]
    out_leaves: Leaves
    changed: tuple[int, ...]
    variables_only: bool
    leaves: Leaves
    whole: bool
    metadata: tuple[tuple[int, Any], ...]
    specs: tuple[Spec, ...]
    known: dict[int, int] | None

    def finish(self, outside: Outside, updates: Any, out: Any) -> Any:
        """Assign the updates to the objects given, and put objects into the result."""
        if self.whole:
            _, packed = outside.signature.split_trees(updates)
            updates = self.leaves.unpack(packed)
        if self.known is None:
            self._assign(outside.structure, updates)
            if self.layout is None:
                return out
        build = Build()
        numbered = _numbered(outside)
        if self.known is None:
            build.objects = dict(enumerate(numbered))
        else:
            build = Build(existing={new: numbered[old] for new, old in self.known.items()})
            remaining = iter(updates)
            for spec in self.specs:
                build.make_with(spec, remaining)
        return self.rebuild(build, out)

    def _assign(self, structure: Structure, updates: Sequence[Any]) -> None:
        targets = structure.kept.get(self.changed)
        if targets is None:
            targets = structure.kept[self.changed] = [structure.cells[i] for i in self.changed]
        if self.variables_only and not any(map(operator.is_, updates, itertools.repeat(None))):
            assign_all(targets, updates)
        else:
            for cell, value in zip(targets, updates, strict=True):
                if value is not None:
                    cell.write(from_output(value))
        for i, metadata in self.metadata:
            variable: Any = structure.cells[i]
            variable.set_metadata(metadata)

    def rebuild(self, build: Build, out: Any) -> Any:
        """Put objects into the result."""
        if self.layout is None:
            return out
        leaves = [out] if self.layout is WHOLE else self.layout.treedef.flatten_up_to(out)
        positions = (0,) if self.layout is WHOLE else self.layout.positions
        remaining = iter(self.out_leaves.unpack(leaves[i] for i in positions))
        return put_tree(leaves, self.layout, [build.make_with(spec, remaining) for spec in self.out_specs])


def _numbered(outside: Outside) -> list[Any]:
    """The nodes and variables of the objects given, in the order of their numbers."""
    walk = Walk(outside.signature.graph)
    walk.visit_all(outside.objects)
    return walk.objects


class Static:
    """A pytree without leaves that carries a value out of a trace; equal to itself alone."""

    def __init__(self, value: Any) -> None:
        self.value = value


jax.tree_util.register_static(Static)
