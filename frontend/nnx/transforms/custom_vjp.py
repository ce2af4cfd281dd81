"""``custom_vjp``: functions of objects with derivative rules of their own."""

from __future__ import annotations

import collections
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distaff.frontend.nnx.boundary import Inside, Outside, take
from distaff.frontend.nnx.graphdef import Build, graph_mode
from distaff.frontend.nnx.kinds import Kind, kind_of
from distaff.frontend.nnx.object_trees import is_object
from distaff.frontend.nnx.prefix_mapping import PrefixMapping
from distaff.frontend.nnx.state import State, nest, to_flat_state
from distaff.frontend.nnx.structure import Structure, paths_of
from distaff.frontend.nnx.transforms.autodiff import DiffState
from distaff.frontend.nnx.transforms.compilation import check_not_bound, updates_mode
from distaff.frontend.nnx.transforms.crossing import Entry, Exit
from distaff.frontend.nnx.traversal import iter_graph, recursive_map
from distaff.frontend.nnx.variables import Variable

_MISSING: Any = object()


class _Call:
    """One call: the function, its forward and its backward rule as functions of arrays."""

    exit: Exit
    _residuals: tuple[Outside, Any]
    _given: list[int | None]

    def __init__(self, rule: CustomVjp, args: Sequence[Any]) -> None:
        self._rule = rule
        self._args = args
        dynamic = [arg for i, arg in enumerate(args) if i not in rule.statics]
        _check_apart(dynamic, [args[i] for i in rule.statics])
        numbers = [i for i in range(len(args)) if i not in rule.statics]
        by = [PrefixMapping([(rule.filters[i], True), (..., False)]) if i in rule.filters else True for i in numbers]
        self.entry = Entry("custom_vjp", dynamic, rule.graph, rule.updates, by, "nondiff_argnums")
        self._types = [jax.typeof(leaf) for leaf in self.entry.leaves]

    def _full(self, trees: Sequence[Any]) -> list[Any]:
        remaining = iter(trees)
        return [arg if i in self._rule.statics else next(remaining) for i, arg in enumerate(self._args)]

    def primal(self, leaves: Sequence[Any]) -> list[Any]:
        """The function."""
        inside = self.entry.enter(leaves)
        made, self.exit = self.entry.leave(inside, self._rule.fun(*self._full(inside.trees)))
        return made

    def forward(self, leaves: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """The forward rule: what came out, and the arrays of the residuals."""
        inside = self.entry.enter(leaves)
        out, residuals = self._rule.fwd(*self._full(inside.trees))
        taken = take([residuals], True)
        arrays, treedef = jax.tree.flatten(taken.trees)
        self._residuals = taken, treedef
        made, self.exit = self.entry.leave(inside, out)
        self._given = _numbers(self.exit, inside)
        return made, arrays

    def backward(self, arrays: Sequence[Any], cotangents: Sequence[Any]) -> tuple[list[Any]]:
        """The backward rule: a cotangent for each array of the arguments, None for zero."""
        taken, treedef = self._residuals
        (residuals,) = taken.signature.enter(treedef.unflatten(arrays)).trees
        updates, out = self.exit.treedef.unflatten(cotangents)
        if self.exit.plan.layout is not None:
            build = Build()
            build.objects = collections.defaultdict(lambda: None)  # cotangents of objects given are among the updates
            out = self.exit.plan.rebuild(build, out)
        pairs = zip(self._given, updates, strict=True)
        changed = {i: value for i, value in pairs if i is not None}
        statics = [self._args[i] for i in self._rule.statics]
        if self._rule.updates:
            tangents = self._rule.bwd(*statics, residuals, (self._update_states(changed), out))
            return (self._from_states(tangents),)
        named = {"updates_g": self._update_objects(changed)} if self._rule.takes_updates else {}
        return (self._from_objects(self._rule.bwd(*statics, residuals, out, **named)),)

    # With graph updates: states stand for nodes.

    def _update_states(self, changed: Mapping[int, Any]) -> tuple[Any, ...]:
        """For each argument the cotangents of its variables after the call, zeros where they did not change."""
        zeros = [jnp.zeros(t.shape, t.dtype) if _is_inexact(t) else None for t in self._types]
        inside = self.entry.enter(zeros)
        for i, value in changed.items():
            cell: Any = inside.cells[i]
            cell.write(value)
        position = iter(range(len(inside.objects)))

        def of(x: Any) -> Any:
            if not is_object(x):
                return None
            start, end = inside.signature.leaves.spans[index := next(position)]
            cells = zip(paths_of(inside.signature.specs[index]), inside.cells[start:end], strict=True)
            found = ((path, cell) for path, cell in cells if isinstance(cell, Variable))
            return State(nest(found)) if kind_of(x) is Kind.NODE else x

        return tuple(jax.tree.map(of, tree, is_leaf=is_object) for tree in inside.trees)

    def _from_states(self, tangents: Any) -> list[Any]:
        self._check_count(tangents)
        leaves: list[Any] = []
        signature = self.entry.signature
        index = iter(range(len(signature.specs)))
        inside = self.entry.enter(self._types)
        for tree, tangent in zip(inside.trees, tangents, strict=True):
            treedef: Any
            objects, treedef = jax.tree.flatten(tree, is_leaf=is_object)
            for x, given in zip(objects, treedef.flatten_up_to(tangent), strict=True):
                if not is_object(x):
                    leaves.append(given)
                    continue
                i = next(index)
                by_path = dict(to_flat_state(given)) if isinstance(given, State) else {(): given}
                start, end = signature.leaves.spans[i]
                for path, value in zip(paths_of(signature.specs[i]), self.entry.cell_values[start:end], strict=True):
                    found = by_path.get(path)
                    if found is not None and not value:
                        raise ValueError(
                            "nnx.custom_vjp: the backward rule returned a cotangent of "
                            f"{'.'.join(map(str, path))}, which "
                            "nondiff_argnums says has none."
                        )
                    leaves.append(found.get_raw_value() if isinstance(found, Variable) else found)
        return self._only_inexact(leaves)

    # Without: objects of the arguments' types.

    def _update_objects(self, changed: Mapping[int, Any]) -> tuple[Any, ...]:
        """The arguments with the cotangents of variables that were assigned, and None for the others."""
        inside = self.entry.enter([None] * len(self._types))
        assigned = set()
        for i, value in changed.items():
            cell: Any = inside.cells[i]
            cell.write(value)
            assigned.add(id(cell))

        def of(path: Any, x: Any) -> Any:
            return None if isinstance(x, Variable) and id(x) not in assigned else x

        return tuple(recursive_map(of, inside.trees, graph=True))

    def _from_objects(self, tangents: Any) -> list[Any]:
        self._check_count(tangents)
        return self._only_inexact(jax.tree.leaves(take(tangents, True).trees, is_leaf=lambda x: x is None))

    def _check_count(self, tangents: Any) -> None:
        wanted = len(self._args) - len(self._rule.statics)
        if not isinstance(tangents, tuple | list) or len(tangents) != wanted:
            raise TypeError(
                f"nnx.custom_vjp: the backward rule must return a tuple of {wanted} cotangents, one for each "
                "argument; it "
                "returned "
                f"{type(tangents).__name__}{f' of {len(tangents)}' if isinstance(tangents, tuple | list) else ''}."
            )

    def _only_inexact(self, leaves: list[Any]) -> list[Any]:
        if len(leaves) != len(self._types):
            raise TypeError(
                f"nnx.custom_vjp: the backward rule returned cotangents of {len(leaves)} arrays, but the "
                "arguments have "
                f"{len(self._types)}."
            )
        return [leaf if _is_inexact(t) else None for leaf, t in zip(leaves, self._types, strict=True)]


def _check_apart(dynamic: Sequence[Any], statics: Sequence[Any]) -> None:
    """Refuse variables that are in arguments with a derivative and in others."""
    variables = [x for _, x in iter_graph(list(dynamic), graph=True) if isinstance(x, Variable)]
    held = {id(x) for _, x in iter_graph(list(statics), graph=True) if isinstance(x, Variable)}
    for x in variables:
        if id(x) in held:
            raise ValueError(
                f"Duplicate {type(x).__name__}: it is in an argument of nnx.custom_vjp that has a derivative, and in "
                "one of nondiff_argnums. Pass a copy (nnx.clone)."
            )


def _numbers(exit: Exit, inside: Inside) -> list[int | None]:
    """For each of the updates, which of the arguments' cells it is of; None for what is new."""
    if exit.cells is not None:
        return list(exit.cells)
    before = {id(cell): i for i, cell in enumerate(inside.cells) if isinstance(cell, Variable)}
    return [before.get(id(cell)) for cell in Structure(inside.objects, True).cells]


def _is_inexact(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))


class CustomVjp:
    """A function with a derivative rule; what ``nnx.custom_vjp`` returns."""

    def __init__(self, fun: Callable[..., Any], nondiff_argnums: Sequence[int | DiffState], graph: bool, updates: bool):
        functools.update_wrapper(self, fun)
        self.fun = fun
        self.statics = tuple(sorted(n for n in nondiff_argnums if isinstance(n, int)))
        self.filters = {n.argnum: n.filter for n in nondiff_argnums if isinstance(n, DiffState)}
        self.graph = graph
        self.updates = updates
        self.fwd: Any = None
        self.bwd: Any = None
        self.takes_updates = False
        if self.filters and not updates:
            raise ValueError(
                "`nondiff_argnums` cannot contain `DiffState` objects when graph=False or graph_updates=False: in the "
                "backward rule of nnx.custom_vjp, return None as the cotangent of what has none."
            )

    def defvjp(self, fwd: Callable[..., Any], bwd: Callable[..., Any], symbolic_zeros: bool = False) -> None:
        """Define the rule.

        Args:
            fwd: takes what the function takes and returns ``(result, residuals)``; residuals may hold objects.
            bwd: ``(*nondiff_args, residuals, g)`` to a tuple of cotangents, one for each argument. With graph updates
                ``g`` is ``(updates_g, result_g)`` and objects are states in ``updates_g`` and in the cotangents;
                without,
                it is ``result_g``, the cotangents have the types of the arguments, and a keyword ``updates_g`` gets the
                cotangents of variables that were assigned.
            symbolic_zeros: not supported.
        """
        if symbolic_zeros:
            raise NotImplementedError("nnx.custom_vjp does not support symbolic_zeros=True; zeros are arrays.")
        self.fwd, self.bwd = fwd, bwd
        self.takes_updates = "updates_g" in inspect.signature(bwd).parameters

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        if self.fwd is None:
            raise AttributeError(
                f"No derivative rule defined for {getattr(self.fun, '__name__', self.fun)}: call its defvjp(fwd, "
                "bwd) first."
            )
        call = _Call(self, args)
        pure = jax.custom_vjp(call.primal)
        pure.defvjp(call.forward, call.backward)
        made = pure(call.entry.leaves)
        return call.entry.finish(call.exit, made)


def custom_vjp(
    fun: Any = _MISSING,
    *,
    nondiff_argnums: tuple[int | DiffState, ...] = (),
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """``jax.custom_vjp`` for functions of objects; see ``CustomVjp.defvjp`` for the rule.

    Args:
        fun: the function; left out, a decorator is returned.
        nondiff_argnums: arguments that are constants, which the backward rule gets first; or ``DiffState`` (with graph
            updates): the variables of an argument that have cotangents.
        graph: as for ``nnx.jit``.
        graph_updates: as for ``nnx.jit``.
    """
    if fun is _MISSING:
        options = {key: value for key, value in locals().items() if key != "fun"}
        return functools.partial(custom_vjp, **options)
    check_not_bound(fun, "custom_vjp")
    follow = graph_mode(graph)
    return CustomVjp(fun, nondiff_argnums, follow, updates_mode(follow, graph_updates))
