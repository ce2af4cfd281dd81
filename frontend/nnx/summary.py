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

from distaff.frontend.linen.summary_text import size_text, tree_text
from distaff.frontend.nnx.capture import wrapped_methods
from distaff.frontend.nnx.filters import PathParts
from distaff.frontend.nnx.functional import as_pure
from distaff.frontend.nnx.pytrees import Pytree, sorted_attributes
from distaff.frontend.nnx.rngs import RngStream
from distaff.frontend.nnx.transforms.abstract import eval_shape
from distaff.frontend.nnx.traversal import iter_graph
from distaff.frontend.nnx.variables import Variable

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class CallInfo:
    """One call: the path, class and method, what went in, and what came out (set when it has returned)."""

    path: PathParts
    type: type
    method: str
    inputs: Any
    outputs: Any


def _is_no_stream(call: CallInfo) -> bool:
    return not issubclass(call.type, RngStream)


def _record_calls(model: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[CallInfo]:
    """The calls of the model and the modules within, in the order in which they began."""
    calls: dict[int, CallInfo] = {}

    def run(model: Any, args: Any, kwargs: Any) -> None:
        nodes = [(path, node) for path, node in iter_graph(model, graph=True) if isinstance(node, Pytree)]
        paths = {id(node): path for path, node in nodes}

        def wrap(function: Any, name: str) -> Any:
            def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
                if id(self) not in paths or name != ("__call__" if self is not model else method):
                    return function(self, *args, **kwargs)
                number = len(calls)
                inputs = (*args, *([kwargs] if kwargs else []))
                shapes = _shapes(inputs[0] if len(inputs) == 1 else list(inputs))
                calls[number] = CallInfo(paths[id(self)], type(self), name, shapes, None)
                out = function(self, *args, **kwargs)
                calls[number] = dataclasses.replace(calls[number], outputs=_shapes(out))
                return out

            return recorded

        with wrapped_methods([node for _, node in nodes], wrap):
            getattr(model, method)(*args, **kwargs)

    eval_shape(run, model, args, kwargs)
    return list(calls.values())


def _shapes(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") and hasattr(x, "dtype") else x,
        as_pure(tree),
    )


def _kind(variable: Variable[Any]) -> str:
    """The class under ``Variable`` that a variable is of: the column that it stands in."""
    return [cls for cls in type(variable).__mro__ if issubclass(cls, Variable)][-2].__name__


def _sizes(node: Any) -> dict[str, tuple[int, int]]:
    """Numbers of values and bytes of the variables in a node, by kind."""
    sizes: dict[str, tuple[int, int]] = {}
    for _, variable in iter_graph(node, graph=True):
        if isinstance(variable, Variable) and type(variable) is not Variable:
            arrays = [x for x in jax.tree.leaves(variable.get_raw_value()) if hasattr(x, "dtype")]
            count, size = sizes.get(_kind(variable), (0, 0))
            count += sum(x.size for x in arrays)
            sizes[_kind(variable)] = count, size + sum(x.size * x.dtype.itemsize for x in arrays)
    return sizes


def _cell(node: Any, kind: str, sizes: Mapping[str, tuple[int, int]]) -> str:
    """The variables of a kind that are a node's own attributes, and the size of all within."""
    own = {key: node.__dict__[name] for key, name in sorted_attributes(node)}
    own = {k: v for k, v in own.items() if isinstance(v, Variable) and type(v) is not Variable and _kind(v) == kind}
    parts = [tree_text(_shapes(own)), size_text(*sizes.get(kind, (0, 0)))]
    return "\n\n".join(part for part in parts if part)


def tabulate(
    obj: Any,
    *input_args: Any,
    depth: int | None = None,
    method: str = "__call__",
    row_filter: Callable[[CallInfo], bool] = _is_no_stream,
    table_kwargs: Mapping[str, Any] = _NOTHING,
    column_kwargs: Mapping[str, Any] = _NOTHING,
    console_kwargs: Mapping[str, Any] = _NOTHING,
    compute_flops: bool = False,
    compute_vjp_flops: bool = False,
    **input_kwargs: Any,
) -> str:
    """A table of the modules that a call runs: their inputs and outputs, and their variables by type.

    Nothing is computed, and the object stays as it is.

    Args:
        obj: the module.
        input_args: of the call, with ``input_kwargs``.
        depth: show modules of at most this depth.
        method: the method to call.
        row_filter: which calls to show; by default all but those of random streams.
        table_kwargs: for ``rich.table.Table``.
        column_kwargs: for ``rich.table.Table.add_column``.
        console_kwargs: for ``rich.console.Console``.
        compute_flops: not supported.
        compute_vjp_flops: not supported.

    Raises:
        NotImplementedError: operations are to be counted.
    """
    if compute_flops or compute_vjp_flops:
        raise NotImplementedError(
            "nnx.tabulate does not count operations; use jax.jit(f).lower(...).compile().cost_analysis()."
        )
    calls = _record_calls(obj, method, input_args, input_kwargs)
    calls = [call for call in calls if row_filter(call) and (depth is None or len(call.path) <= depth)]
    nodes = {path: node for path, node in iter_graph(obj, graph=True) if isinstance(node, Pytree)}
    totals = _sizes(obj)
    all_values, all_bytes = (sum(size[i] for size in totals.values()) for i in range(2))
    shown = Table(
        title=f"{type(obj).__name__} Summary",
        caption=f"\nTotal Parameters: {size_text(all_values, all_bytes)}",
        **{"show_header": True, "show_lines": True, "show_footer": True, "caption_style": "bold", **table_kwargs},
    )
    for column in ("path", "type", "inputs", "outputs"):
        shown.add_column(column, **column_kwargs)
    shown.columns[-1].footer = Text.from_markup("Total", justify="right")
    for kind in sorted(totals):
        shown.add_column(kind, footer=size_text(*totals[kind]), **column_kwargs)
    for call in calls:
        node, sizes = nodes[call.path], _sizes(nodes[call.path])
        cells = [_cell(node, kind, sizes) for kind in sorted(totals)]
        path = call.path if call.method == "__call__" else (*call.path, call.method)
        shapes = tree_text(call.inputs), tree_text(call.outputs)
        shown.add_row("/".join(map(str, path)), call.type.__name__, *shapes, *cells)
    file = io.StringIO()
    Console(file=file, **{"force_terminal": True, "force_jupyter": False, **console_kwargs}).print(shown)
    return file.getvalue()
