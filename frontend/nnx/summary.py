"""``tabulate``: the modules of a model, what goes in and out of them, and their variables, as a table."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distaff.frontend.linen.summary_text import array_text, size_text, tree_text
from distaff.frontend.nnx.capture import wrapped_methods
from distaff.frontend.nnx.filters import PathParts
from distaff.frontend.nnx.functional import as_pure
from distaff.frontend.nnx.graph_functions import merge, split
from distaff.frontend.nnx.kinds import is_node
from distaff.frontend.nnx.pytrees import Pytree
from distaff.frontend.nnx.rngs import RngState, RngStream
from distaff.frontend.nnx.traversal import iter_graph, keyed_children
from distaff.frontend.nnx.variables import Variable
from distaff.frontend.operation_counts import flops, named_part, part_as_function, vjp_flops
from distaff.frontend.typing import SizeBytes, has_shape_dtype

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_NUMBER = "_pytree__number"  # the attribute by which a node is known in copies that transforms make of it


@dataclasses.dataclass
class CallInfo:
    """One call of a method.

    Attributes:
        call_order: how many calls began before.
        object_id: what all calls on one object have in common.
        type: the class of the object.
        path: of the object, and the name of the method if that is not ``__call__``.
        inputs_repr: the arguments as text.
        outputs: the result, with abstract arrays.
        flops, vjp_flops: the operations of the call, and of it with its gradient; None if they are not counted.
    """

    call_order: int
    object_id: int
    type: type
    path: PathParts
    inputs_repr: str
    outputs: Any
    flops: int | None = None
    vjp_flops: int | None = None


def filter_rng_streams(call: CallInfo) -> bool:
    """Whether a call is none of a random stream: the rows that ``tabulate`` shows if it is not told."""
    return not issubclass(call.type, RngStream)


def _record_calls(model: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[CallInfo], Any]:
    """The calls of the model and the modules within, in the order in which they began, and the jaxpr of the first.

    Of calls of the same method of the same object with the same arguments, only the first.
    """
    definition, given = split((model, args, kwargs), graph=True)
    paths = _paths(model)
    calls: dict[tuple[int, str, str], CallInfo] = {}

    def wrap(function: Any, name: str) -> Any:
        def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
            number = vars(self).get(_NUMBER)
            inputs = _inputs_text(args, kwargs)
            key = (number, name, inputs)
            if number is None or key in calls:
                return function(self, *args, **kwargs)
            path = paths[number] if name == "__call__" else (*paths[number], name)
            call = calls[key] = CallInfo(len(calls), number, type(self), path, inputs, None)
            out = named_part(_part(call), lambda: function(self, *args, **kwargs), is_leaf=_is_object)
            call.outputs = _described(out)
            return out

        return recorded

    def run(given: Any) -> list[Any]:
        model, args, kwargs = merge(definition, given)
        nodes = [node for _, node in iter_graph(model, graph=True) if isinstance(node, Pytree)]
        for number, node in enumerate(nodes):
            vars(node)[_NUMBER] = number
        with wrapped_methods(nodes, wrap):
            out = getattr(model, method)(*args, **kwargs)
        return [x for x in jax.tree.leaves(as_pure(out)) if isinstance(x, jax.Array)]

    closed = jax.make_jaxpr(run)(given)
    return list(calls.values()), closed.jaxpr


def _paths(model: Any) -> list[PathParts]:
    return [path for path, node in iter_graph(model, graph=True) if isinstance(node, Pytree)]


def _part(call: CallInfo) -> str:
    return f"call_{call.call_order}_of_tabulate"


def _is_object(x: Any) -> bool:
    return isinstance(x, Pytree | Variable)


def _described(tree: Any) -> Any:
    """A tree with its arrays abstract, and classes and modules as their names."""

    def describe(x: Any) -> Any:
        if isinstance(x, Variable):
            return _described(x.get_raw_value())
        if isinstance(x, Pytree):
            return f"{type(x).__name__}(...)"
        if isinstance(x, type):
            return f"type[{x.__name__}]"
        return jax.ShapeDtypeStruct(x.shape, x.dtype) if has_shape_dtype(x) else x

    return jax.tree.map(describe, tree, is_leaf=_is_object)


def _inputs_text(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    first = tree_text(_described(args[0] if len(args) == 1 and not kwargs else list(args)))
    return "\n".join(part for part in (first, tree_text(_described(kwargs))) if part)


@dataclasses.dataclass
class _Variables:
    """Those of one node: its own by kind and name, and the sizes of all within that no node before has, by kind."""

    own: dict[str, dict[Any, Variable[Any]]] = dataclasses.field(default_factory=dict)
    sizes: dict[str, SizeBytes] = dataclasses.field(default_factory=dict)

    def add(self, kind: str, size: SizeBytes) -> None:
        """Count values of a kind."""
        self.sizes[kind] = self.sizes.get(kind, SizeBytes(0, 0)) + size

    def cell(self, kind: str) -> str:
        """The own variables of a kind, with their metadata, and the size of all within."""
        own = jax.tree.map(lambda x: x, {key: _entry(variable) for key, variable in self.own.get(kind, {}).items()})
        size = self.sizes.get(kind, SizeBytes(0, 0))
        total = f"[bold]{size_text(size.size, size.bytes)}[/bold]" if size else ""
        return "\n\n".join(part for part in (tree_text(own), total) if part)


def _entry(variable: Variable[Any]) -> Any:
    value = variable.get_raw_value()
    text = array_text(value) if has_shape_dtype(value) else ""
    metadata = variable.get_metadata(exclude_required=True)
    return {"value": text, **metadata} if metadata else text


def _kind(variable: Variable[Any]) -> str:
    return RngState.__name__ if isinstance(variable, RngState) else type(variable).__name__


def _collect(node: Any, found: dict[int, _Variables | None]) -> _Variables:
    """The variables of a node and, by ``id``, of all within; what stands at several places counts at the first."""
    about = found[id(node)] = _Variables()
    for key, child in keyed_children(node, graph=True):
        if id(child) in found:
            continue
        if isinstance(child, Variable):
            found[id(child)] = None
            kind = _kind(child)
            about.own.setdefault(kind, {})[key] = child
            about.add(kind, SizeBytes.from_any(child.get_raw_value()))
        elif is_node(child):
            for kind, size in _collect(child, found).sizes.items():
                about.add(kind, size)
    return about


def tabulate(
    obj: Any,
    *input_args: Any,
    depth: int | None = None,
    method: str = "__call__",
    row_filter: Callable[[CallInfo], bool] = filter_rng_streams,
    table_kwargs: Mapping[str, Any] = _NOTHING,
    column_kwargs: Mapping[str, Any] = _NOTHING,
    console_kwargs: Mapping[str, Any] = _NOTHING,
    compute_flops: bool = False,
    compute_vjp_flops: bool = False,
    **input_kwargs: Any,
) -> str:
    """A table of the methods that a call runs: their inputs and outputs, and their objects' variables by type.

    Nothing is computed, and the object stays as it is.

    Args:
        obj: the module.
        input_args: of the call, with ``input_kwargs``; what is no array is a constant.
        depth: show calls whose path has at most this length.
        method: the method to call.
        row_filter: which calls to show; by default all but those of random streams.
        table_kwargs: for ``rich.table.Table``.
        column_kwargs: for ``rich.table.Table.add_column``.
        console_kwargs: for ``rich.console.Console``.
        compute_flops: show the floating point operations of each call, as XLA estimates them.
        compute_vjp_flops: show those of each call with its gradient.
    """
    calls, jaxpr = _record_calls(obj, method, input_args, input_kwargs)
    calls = [call for call in calls if row_filter(call) and (depth is None or len(call.path) <= depth)]
    counters = {"flops": flops} if compute_flops else {}
    counters |= {"vjp_flops": vjp_flops} if compute_vjp_flops else {}
    for call in calls:
        part = part_as_function(jaxpr, _part(call)) if counters else None
        for name, count in counters.items():
            setattr(call, name, count(part[0], *part[1]) if part is not None else 0)
    found: dict[int, _Variables | None] = {}
    totals = _collect(obj, found).sizes
    nodes = [found[id(node)] for _, node in iter_graph(obj, graph=True) if isinstance(node, Pytree)]
    total = sum(totals.values(), SizeBytes(0, 0))
    shown = Table(
        title=f"{type(obj).__name__} Summary",
        caption=f"\nTotal Parameters: {size_text(total.size, total.bytes) or '0 (0 B)'}",
        **{"show_header": True, "show_lines": True, "show_footer": True, "caption_style": "bold", **table_kwargs},
    )
    for column in ("path", "type", "inputs", "outputs", *counters):
        shown.add_column(column, **column_kwargs)
    shown.columns[-1].footer = Text.from_markup("Total", justify="right")
    for kind in sorted(totals):
        shown.add_column(kind, footer=size_text(totals[kind].size, totals[kind].bytes), **column_kwargs)
    for call in calls:
        about = nodes[call.object_id] or _Variables()
        counts = [str(getattr(call, name)) for name in counters]
        cells = [about.cell(kind) for kind in sorted(totals)]
        path = "/".join(map(str, call.path))
        shown.add_row(path, call.type.__name__, call.inputs_repr, tree_text(call.outputs), *counts, *cells)
    file = io.StringIO()
    Console(file=file, **{"force_terminal": True, "force_jupyter": False, **console_kwargs}).print(shown)
    return file.getvalue()
