"""Derivatives of functions of objects: ``grad``, ``value_and_grad``, ``vjp``, ``jvp``, and ``remat``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distaff.frontend.nnx.boundary import take
from distaff.frontend.nnx.filters import Filter
from distaff.frontend.nnx.graphdef import NodeRef, graph_mode
from distaff.frontend.nnx.kinds import Kind, kind_of
from distaff.frontend.nnx.object_trees import is_object
from distaff.frontend.nnx.prefix_mapping import PrefixMapping
from distaff.frontend.nnx.state import State, nest
from distaff.frontend.nnx.structure import paths_of
from distaff.frontend.nnx.transforms.compilation import check_not_bound, updates_mode
from distaff.frontend.nnx.transforms.crossing import Entry, Exit
from distaff.frontend.nnx.transforms.prefixes import check_prefix
from distaff.frontend.nnx.variable_kinds import Param
from distaff.frontend.nnx.variables import Variable

_MISSING: Any = object()


@dataclasses.dataclass(frozen=True)
class DiffState:
    """As an entry of ``argnums``: the argument, and which of its variables to differentiate by."""

    argnum: int
    filter: Filter


Argnum = int | DiffState


def _by_filter(filter: Filter) -> PrefixMapping:
    """The specification that what the filter matches is differentiated by."""
    return PrefixMapping([(filter, True), (..., False)])


class _Differentiated:
    """Which of the arguments, and what of them, a function is differentiated by.

    Raises:
        TypeError: there are not as many arguments.
    """

    def __init__(self, transform: str, argnums: Argnum | Sequence[Argnum], count: int, updates: bool) -> None:
        given = (argnums,) if isinstance(argnums, int | DiffState) else tuple(argnums)
        self.single = isinstance(argnums, int | DiffState)
        self.filters: dict[int, Filter] = {}
        for entry in given:
            number = entry.argnum if isinstance(entry, DiffState) else entry
            if not -count <= number < count:
                raise TypeError(
                    f"nnx.{transform}: differentiating with respect to argnums={number} requires at least "
                    f"{number + 1 if number >= 0 else -number} positional arguments, but got only {count}."
                )
            self.filters[number % count] = entry.filter if isinstance(entry, DiffState) else Param
        self.numbers = tuple(self.filters)
        self._updates = updates

    def specification(self, number: int, arg: Any) -> Any:
        """What of an argument is differentiated by: of nodes, with graph updates, what the filter matches; else all."""
        if number not in self.filters:
            return False
        mapping = _by_filter(self.filters[number])
        explicit = self.filters[number] is not Param

        def of(x: Any) -> Any:
            is_node = kind_of(x) is Kind.NODE or (explicit and is_object(x))
            return mapping if is_node and self._updates else True

        return jax.tree.map(of, arg, is_leaf=is_object)


def _check_differentiable(transform: str, entry: Entry, allow_int: bool) -> None:
    for leaf, by, label in zip(entry.leaves, entry.values, entry.leaf_labels, strict=True):
        if by and not allow_int and not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(
                f"nnx.{transform} requires real- or complex-valued inputs (input dtype that is a sub-dtype of "
                "np.inexact), "
                f"but {label or 'an argument'} is {jnp.result_type(leaf)}. Differentiate by other variables "
                "(nnx.DiffState), or pass allow_int=True."
            )


def _gradients(entry: Entry, grads: Sequence[Any], by: _Differentiated, updates: bool) -> Any:
    """The gradients as trees like the arguments they are by: with graph updates, states for nodes."""
    remaining = iter(grads)
    leaves = [next(remaining) if value else leaf for leaf, value in zip(entry.leaves, entry.values, strict=True)]
    inside = entry.enter(leaves)
    if not updates:
        found = [inside.trees[i] for i in by.numbers]
        return found[0] if by.single else tuple(found)
    structure, of_objects = entry.outside.structure, iter(range(len(inside.objects)))

    def of(x: Any) -> Any:
        if not is_object(x):
            return x
        index = next(of_objects)
        if isinstance(structure.specs[index], NodeRef):
            return State({})  # the gradient stands where it was first
        if kind_of(x) is not Kind.NODE:
            return x
        start, end = structure.spans[index]
        triples = zip(
            paths_of(structure.specs[index]), inside.cells[start:end], entry.cell_values[start:end], strict=True
        )
        return State(nest((p, c if isinstance(c, Variable) else c._raw_value) for p, c, v in triples if v))

    trees = [jax.tree.map(of, tree, is_leaf=is_object) for tree in inside.trees]
    return trees[by.numbers[0]] if by.single else tuple(trees[i] for i in by.numbers)


def _refuse_reduce_axes(reduce_axes: Sequence[Hashable]) -> None:
    if reduce_axes:
        raise NotImplementedError("reduce_axes is not supported by JAX any more; use jax.lax.psum on the gradients.")


def value_and_grad(
    f: Any = _MISSING,
    *,
    argnums: Argnum | Sequence[Argnum] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    reduce_axes: Sequence[Hashable] = (),
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """As ``nnx.grad``, with the value: ``(value, gradient)`` or ``((value, aux), gradient)``."""
    options = {key: value for key, value in locals().items() if key != "f"}
    if f is _MISSING:
        return functools.partial(value_and_grad, **options)
    return _value_and_grad("value_and_grad", f, **options)


def grad(
    f: Any = _MISSING,
    *,
    argnums: Argnum | Sequence[Argnum] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    reduce_axes: Sequence[Hashable] = (),
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """``jax.grad`` for functions of objects; what they assign to variables is assigned.

    >>> grads = nnx.grad(lambda model: loss(model(x), y))(model)  # by all nnx.Param, a State

    Args:
        f: a function with a scalar result; left out, a decorator is returned.
        argnums: the arguments to differentiate by. Of modules, with graph updates, that is by their ``nnx.Param``, or
            by
            what a ``DiffState`` says, and the gradient is a ``State``. Otherwise it is by all arrays of the argument,
            and
            the gradient has the argument's type.
        has_aux: ``f`` returns ``(result, auxiliary data)``.
        holomorphic: as for ``jax.grad``.
        allow_int: as for ``jax.grad``.
        reduce_axes: must be empty.
        graph: as for ``nnx.jit``.
        graph_updates: as for ``nnx.jit``.

    Returns:
        A function with the arguments of ``f`` that returns the gradient, or ``(gradient, aux)``.

    Raises:
        ValueError: at a call: a variable is to be differentiated by at one place, and not at another.
        TypeError: at a call: the result is no scalar, or something that is differentiated by has an integer dtype.
    """
    options = {key: value for key, value in locals().items() if key != "f"}
    if f is _MISSING:
        return functools.partial(grad, **options)
    with_value = _value_and_grad("grad", f, **options)

    @functools.wraps(f)
    def gradient(*args: Any, **kwargs: Any) -> Any:
        value, grads = with_value(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return gradient


def _value_and_grad(
    transform: str,
    f: Callable[..., Any],
    *,
    argnums: Any,
    has_aux: bool,
    holomorphic: bool,
    allow_int: bool,
    reduce_axes: Any,
    graph: bool | None,
    graph_updates: bool | None,
) -> Callable[..., Any]:
    check_not_bound(f, transform)
    _refuse_reduce_axes(reduce_axes)
    follow = graph_mode(graph)
    updates = updates_mode(follow, graph_updates)
    check_prefix(argnums, "argnums", transform, updates)
    if not updates and any(isinstance(entry, DiffState) for entry in jax.tree.leaves(argnums)):
        raise ValueError(
            "`argnums` cannot contain `DiffState` objects when graph=False or graph_updates=False: then "
            f"nnx.{transform} differentiates by all arrays of the argument. Split the object and differentiate by one "
            "part, or pass graph=True and graph_updates=True."
        )

    @functools.wraps(f)
    def differentiated(*args: Any, **kwargs: Any) -> Any:
        by = _Differentiated(transform, argnums, len(args), updates)
        specifications = [*(by.specification(i, arg) for i, arg in enumerate(args)), False]
        entry = Entry(transform, (*args, kwargs), follow, updates, specifications, "argnums")
        _check_differentiable(transform, entry, allow_int)
        exits: list[Exit] = []

        def pure(diff: Sequence[Any]) -> Any:
            given = iter(diff)
            leaves = [next(given) if value else leaf for leaf, value in zip(entry.leaves, entry.values, strict=True)]
            inside = entry.enter(leaves)
            *trees, named = inside.trees
            out = f(*trees, **named)
            value, aux = _with_aux(transform, out) if has_aux else (out, None)
            made, exit = entry.leave(inside, aux)
            exits.append(exit)
            return value.get_value() if isinstance(value, Variable) else value, made

        diff = [leaf for leaf, value in zip(entry.leaves, entry.values, strict=True) if value]
        transformed = jax.value_and_grad(pure, has_aux=True, holomorphic=holomorphic, allow_int=allow_int)
        (value, made), grads = transformed(diff)
        aux = entry.finish(exits[-1], made)
        return (value, aux) if has_aux else value, _gradients(entry, grads, by, updates)

    return differentiated


def _with_aux(transform: str, out: Any) -> tuple[Any, Any]:
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(
            f"nnx.{transform} with has_aux=True: the function must return (result, auxiliary data); it returned a "
            f"{type(out).__name__}."
        )
    return out


class _Linearized:
    """A function of arrays with the differentiable result first: what ``jvp`` and ``vjp`` call."""

    exit: Exit

    def __init__(self, transform: str, f: Any, entry: Entry, has_aux: bool) -> None:
        self._transform = transform
        self._f = f
        self._entry = entry
        self._has_aux = has_aux

    def __call__(self, leaves: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        inside = self._entry.enter(leaves)
        out = self._f(*inside.trees)
        made, self.exit = self._entry.leave(inside, _with_aux(self._transform, out) if self._has_aux else (out, None))
        self._order = list(range(len(made)))
        _, (result, _) = self.exit.treedef.unflatten(self._order)
        self._of_result = set(jax.tree.leaves(result))
        return [made[i] for i in self._order if i in self._of_result], [
            made[i] for i in self._order if i not in self._of_result
        ]

    def join(self, result: Sequence[Any], others: Sequence[Any]) -> list[Any]:
        """The arrays in their order."""
        results, rest = iter(result), iter(others)
        return [next(results) if i in self._of_result else next(rest) for i in self._order]


def _without_updates(transform: str, graph: bool | None, graph_updates: bool | None) -> bool:
    """The graph mode of a transform that passes no changes of structure on."""
    if graph_mode(graph) and graph_updates:
        raise NotImplementedError(f"nnx.{transform} does not support graph_updates=True; leave it out.")
    return graph_mode(graph)


def vjp(
    f: Any = _MISSING,
    *primals: Any,
    has_aux: bool = False,
    reduce_axes: Sequence[Hashable] = (),
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """``jax.vjp`` for functions of objects, by all arrays of the primals; values that ``f`` assigns are assigned.

    >>> y, backward = nnx.vjp(f, model, x)
    >>> model_grad, x_grad = backward(jnp.ones_like(y))

    Args:
        f: the function; without primals (or left out) a function of them, or a decorator, is returned.
        primals: the arguments.
        has_aux: ``f`` returns ``(result, auxiliary data)``.
        reduce_axes: must be empty.
        graph: as for ``nnx.jit``.
        graph_updates: must not be True: changes of structure are not passed on.

    Returns:
        ``(result, backward)`` or ``(result, backward, aux)``; ``backward(cotangent)`` gives a gradient for each primal,
        of its type.
    """
    _refuse_reduce_axes(reduce_axes)
    follow = _without_updates("vjp", graph, graph_updates)
    options: dict[str, Any] = {"has_aux": has_aux, "graph": graph, "graph_updates": graph_updates}
    if f is _MISSING:
        return functools.partial(vjp, **options)
    if not primals:
        return functools.wraps(f)(lambda *primals: vjp(f, *primals, **options))
    check_not_bound(f, "vjp")
    entry = Entry("vjp", primals, follow, False)
    linearized = _Linearized("vjp", f, entry, has_aux)
    result, pullback, others = jax.vjp(linearized, entry.leaves, has_aux=True)
    out, aux = entry.finish(linearized.exit, linearized.join(result, others))

    def backward(cotangent: Any) -> Any:
        (grads,) = pullback(jax.tree.leaves(take([cotangent], follow).trees))
        return tuple(entry.enter(grads).trees)

    return (out, backward, aux) if has_aux else (out, backward)


def jvp(
    f: Any = _MISSING,
    primals: Any = _MISSING,
    tangents: Any = _MISSING,
    *,
    has_aux: bool = False,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """``jax.jvp`` for functions of objects; values that ``f`` assigns are assigned.

    Args:
        f: the function; without primals (or left out) a function of them, or a decorator, is returned.
        primals: a tuple of arguments.
        tangents: their tangents, of the same types.
        has_aux: ``f`` returns ``(result, auxiliary data)``.
        graph: as for ``nnx.jit``.
        graph_updates: must not be True: changes of structure are not passed on.

    Returns:
        ``(result, tangent)`` or ``(result, tangent, aux)``.

    Raises:
        TypeError: a tangent has another structure than its primal.
    """
    follow = _without_updates("jvp", graph, graph_updates)
    options: dict[str, Any] = {"has_aux": has_aux, "graph": graph, "graph_updates": graph_updates}
    if f is _MISSING:
        return functools.partial(jvp, **options)
    if primals is _MISSING:
        return functools.wraps(f)(lambda primals, tangents: jvp(f, primals, tangents, **options))
    check_not_bound(f, "jvp")
    entry = Entry("jvp", primals, follow, False)
    treedef: Any
    moved, treedef = jax.tree.flatten(take(tangents, follow).trees)
    if treedef != entry.treedef:
        raise TypeError(
            "nnx.jvp: primal and tangent arguments must have the same structure; the primals have "
            f"{entry.treedef}, the "
            f"tangents {treedef}."
        )
    linearized = _Linearized("jvp", f, entry, has_aux)
    result, tangent, others = jax.jvp(linearized, (entry.leaves,), (moved,), has_aux=True)
    out, aux = entry.finish(linearized.exit, linearized.join(result, others))
    of_out: Any = jax.tree.structure(out)
    moved_out = of_out.unflatten(tangent)
    return (out, moved_out, aux) if has_aux else (out, moved_out)


def remat(
    f: Any = _MISSING,
    *,
    prevent_cse: bool = True,
    static_argnums: int | tuple[int, ...] = (),
    policy: Callable[..., bool] | None = None,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """``jax.checkpoint`` for functions of objects: what they compute is computed again for the gradient, not kept.

    Args:
        f: the function; left out, a decorator is returned.
        prevent_cse: as for ``jax.checkpoint``.
        static_argnums: arguments that are constants.
        policy: as for ``jax.checkpoint``: what to keep.
        graph: as for ``nnx.jit``.
        graph_updates: as for ``nnx.jit``.
    """
    if f is _MISSING:
        options = {key: value for key, value in locals().items() if key != "f"}
        return functools.partial(remat, **options)
    check_not_bound(f, "remat")
    follow = graph_mode(graph)
    updates = updates_mode(follow, graph_updates)
    statics = (static_argnums,) if isinstance(static_argnums, int) else tuple(static_argnums)

    @functools.wraps(f)
    def rematerialized(*args: Any, **kwargs: Any) -> Any:
        fixed = {number % len(args): args[number] for number in statics}
        dynamic = [arg for i, arg in enumerate(args) if i not in fixed]
        entry = Entry("remat", (*dynamic, kwargs), follow, updates)
        exits: list[Exit] = []

        def pure(leaves: Sequence[Any]) -> list[Any]:
            inside = entry.enter(leaves)
            *given, named = inside.trees
            remaining = iter(given)
            out = f(*(fixed[i] if i in fixed else next(remaining) for i in range(len(args))), **named)
            made, exit = entry.leave(inside, out)
            exits.append(exit)
            return made

        made = jax.checkpoint(pure, prevent_cse=prevent_cse, policy=policy)(entry.leaves)
        return entry.finish(exits[-1], made)

    return rematerialized
