"""Values that loops carry from one iteration to the next: their structure must stay as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distaff.frontend.nnx.boundary import Inside
from distaff.frontend.nnx.object_trees import is_object
from distaff.frontend.nnx.transforms.crossing import Entry
from distaff.frontend.nnx.variables import Variable


class Carry:
    """As an axis of ``nnx.scan``: the value is carried from one iteration to the next."""


def arrays_now(
    entry: Entry, inside: Inside, trees: Sequence[Any], carried: Callable[[Any], bool] = lambda value: True
) -> list[Any]:
    """All arrays of ``trees``, which have the structure of the arguments, with what their objects hold now.

    Args:
        carried: whether what the specification says of a variable means that it is carried; others count as they were.
    """
    cells = zip(inside.cells, inside.values, entry.cell_values, strict=True)
    now = [cell._raw_value if carried(value) else before for cell, before, value in cells]
    packed = iter(entry.signature.leaves.pack(now))
    pure = jax.tree.map(lambda x: next(packed) if is_object(x) else x, list(trees), is_leaf=is_object)
    return jax.tree.leaves(pure)


def check_same_objects(transform: str, given: Any, returned: Any, updates: bool) -> None:
    """Refuse a carry that does not come back with the structure and the objects that it was given with.

    Raises:
        TypeError: its structure is another.
        ValueError: it has other objects.
    """
    treedef: Any
    before, treedef = jax.tree.flatten(given, is_leaf=is_object)
    after, other = jax.tree.flatten(returned, is_leaf=is_object)
    if treedef != other:
        raise TypeError(
            f"nnx.{transform}: the carry must have the same pytree structure in and out, but the function was given "
            f"{treedef} and returned {other}."
        )
    for old, new in zip(before, after, strict=True):
        if (is_object(old) or is_object(new)) and old is not new:
            rule = (
                "Carry references must be the same between iterations"
                if updates
                else f"{transform} Variable identity must be preserved across iterations"
            )
            raise ValueError(
                f"{rule}, but the function of nnx.{transform} was given a {type(old).__name__} and returned another "
                f"{type(new).__name__}. Change the variables of the one that comes in, for instance with nnx.update, "
                "and return it."
            )


def check_same_structure(entry: Entry, inside: Inside, carried: Callable[[Any], bool] = lambda value: True) -> None:
    """Refuse changes of the structure of objects that are carried.

    Args:
        carried: whether what the specification says of a variable means that it is carried.

    Raises:
        TypeError: variables were added to or removed from such an object.
        ValueError: another variable stands at the place of one.
    """
    now = {_identity(cell): (value, label) for cell, value, label in entry.of_cells(inside.objects)}
    given = zip(inside.cells, entry.cell_values, entry.labels, strict=True)
    before = {_identity(cell): label for cell, value, label in given if carried(value)}
    gone = [label for key, label in before.items() if key not in now]
    new = [label for key, (value, label) in now.items() if carried(value) and key not in before]
    replaced = [label for label in gone if label.path in {other.path for other in new}]
    if replaced:
        raise ValueError(
            f"{entry.transform} Variable identity must be preserved across iterations, but the function assigned "
            f"another variable to the place of {replaced[0]}. Assign its value instead: variable[...] = x."
        )
    removed, added = map(str, gone), list(map(str, new))
    if gone or new:
        changes = [f"added {', '.join(added)}"] * bool(added) + [f"removed {', '.join(removed)}"] * bool(gone)
        raise TypeError(
            f"nnx.{entry.transform}: the structure of what is carried must stay as it is, but the function "
            f"{' and '.join(changes)}. Make such variables before the loop; values for each iteration can be "
            "returned instead."
        )


def _identity(cell: Any) -> Any:
    if isinstance(cell, Variable):
        return id(cell)
    return id(getattr(cell, "attributes", None)), getattr(cell, "name", None)


def check_same_types(entry: Entry, before: Sequence[Any], after: Sequence[Any], labels: Sequence[Any]) -> None:
    """Refuse arrays in a carry that change their shape, or a dtype that is not only a Python number's.

    Raises:
        TypeError: one does.
    """
    for old, new, label in zip(before, after, labels, strict=True):
        a, b = jax.typeof(old), jax.typeof(new)
        free = getattr(a, "weak_type", False)
        if jnp.shape(old) != jnp.shape(new) or (a.dtype != b.dtype and not free):
            raise TypeError(
                f"nnx.{entry.transform}: the carry must have equal types in and out, but {label or 'a value'} is "
                f"{a.str_short()} at the start of an iteration and {b.str_short()} at its end."
            )
