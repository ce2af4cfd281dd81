"""A module as a table of its submodules: inputs, outputs, variables, sizes, arithmetic (``Module.tabulate``)."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from distaff.frontend.core.filters import CollectionFilter
from distaff.frontend.core.frozen_dict import unfreeze
from distaff.frontend.core.meta import Partitioned, is_axis_metadata
from distaff.frontend.core.rng import PRNGKey
from distaff.frontend.linen.context import InterceptorContext, intercept_methods
from distaff.frontend.linen.functional import ALL_BUT_INTERMEDIATES
from distaff.frontend.linen.module import Module
from distaff.frontend.linen.summary_text import array_text, size_text, tree_text
from distaff.frontend.operation_counts import flops, vjp_flops

Path = tuple[str, ...]


@dataclasses.dataclass
class Row:
    """One call of a module's method.

    Attributes:
        path: the names from the root module to this one.
        module_copy: an unbound copy of the module.
        method: the name of the method.
        inputs, outputs: of the call, with arrays as ``jax.ShapeDtypeStruct``.
        module_variables: the module's own variables by collection, without those of submodules.
        counted_variables: the variables that count as this row's: also those of submodules below ``depth``.
        flops, vjp_flops: the floating point operations of the call, and of its gradient; -1 if not asked for.
    """

    path: Path
    module_copy: Module
    method: str
    inputs: Any
    outputs: Any
    module_variables: dict[str, dict[str, Any]]
    counted_variables: dict[str, dict[str, Any]]
    flops: int = -1
    vjp_flops: int = -1

    def size_and_bytes(self, collections: Iterable[str]) -> dict[str, tuple[int, int]]:
        """The number of values, and of bytes, that count as this row's, by collection."""
        return {col: _size_and_bytes(self.counted_variables.get(col)) for col in collections}


class Table(list[Row]):
    """The rows of ``module``, and the names of its variable ``collections``."""

    def __init__(self, module: Module, collections: Sequence[str], rows: Iterable[Row]) -> None:
        super().__init__(rows)
        self.module = module
        self.collections = collections


@dataclasses.dataclass
class _Call:
    """A recorded call; arrays in ``args``, ``kwargs`` and ``outputs`` are ``jax.ShapeDtypeStruct``."""

    path: Path
    module: Module
    rngs: dict[str, jax.ShapeDtypeStruct]
    mutable: CollectionFilter
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any = None


def _abstract(tree: Any) -> Any:
    """The tree with arrays as ``jax.ShapeDtypeStruct`` and everything else as it is."""

    def leaf(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") and hasattr(x, "dtype") else x

    return jax.tree.map(leaf, tree, is_leaf=lambda x: x is None)


class _Recorder:
    """Notes every call of a module method, in the order in which calls begin."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []

    def __call__(
        self,
        next_method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        about: InterceptorContext,
    ) -> Any:
        if about.method_name == "setup" or about.module.scope is None:
            return next_method(*args, **kwargs)
        scope = about.module.scope
        call = _Call(
            scope.path,
            about.module.clone(_deep_clone=True, _reset_names=True, name=None),
            {stream: _abstract(lazy.rng) for stream, lazy in scope.rngs.items()},
            scope.mutable,
            about.method_name,
            _abstract(args),
            _abstract(kwargs),
        )
        self.calls.append(call)
        outputs = next_method(*args, **kwargs)
        call.outputs = _abstract(outputs)
        return outputs


def module_table(
    module: Module,
    rngs: PRNGKey | Mapping[str, PRNGKey],
    *args: Any,
    depth: int | None = None,
    show_repeated: bool = False,
    compute_flops: bool = False,
    compute_vjp_flops: bool = False,
    **kwargs: Any,
) -> Table:
    """The table of ``module.init(rngs, *args, **kwargs)``, which is traced and not run; options as for ``tabulate``."""
    record = _Recorder()
    with intercept_methods(record), jax.check_tracer_leaks(False):
        variables = jax.eval_shape(lambda: module.init(rngs, *args, **kwargs))
    paths = {call.path for call in record.calls}
    seen: set[Path] = set()
    rows = []
    for call in record.calls:
        repeated = call.path in seen or not hasattr(type(call.module), call.method)
        if (repeated and not show_repeated) or (depth is not None and len(call.path) > depth):
            continue
        seen.add(call.path)
        own = {} if repeated else _own_variables(call.path, variables, paths)
        counted = _variables_at(call.path, variables) if len(call.path) == depth and not repeated else own
        inputs = _inputs(call.args, call.kwargs)
        counts = _flops(call) if compute_flops else -1, _flops(call, gradient=True) if compute_vjp_flops else -1
        rows.append(Row(call.path, call.module, call.method, inputs, call.outputs, own, counted, *counts))
    return Table(module, tuple(variables), rows)


def _variables_at(path: Path, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a module and its submodules by collection."""
    found = {}
    for col, values in variables.items():
        for name in path:
            values = values.get(name) if isinstance(values, Mapping) else None
        if isinstance(values, Mapping):
            found[col] = unfreeze(values)
    return found


def _own_variables(path: Path, variables: Mapping[str, Any], modules: set[Path]) -> dict[str, Any]:
    """The variables of a module by collection, without those of submodules."""
    return {
        col: {name: value for name, value in values.items() if (*path, name) not in modules}
        for col, values in _variables_at(path, variables).items()
    }


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs:
        return (*args, kwargs) if args else kwargs
    return args[0] if len(args) == 1 else args


def _flops(call: _Call, gradient: bool = False) -> int:
    """The floating point operations of a call, or of its gradient, as XLA estimates them."""
    inputs = (call.args, call.kwargs)
    leaves: list[Any] = jax.tree.leaves(inputs)
    tree: Any = jax.tree.structure(inputs)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.ShapeDtypeStruct)]

    def run(start: Callable[..., Any], arrays: Sequence[Any]) -> Any:
        filled = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            filled[place] = array
        args, kwargs = tree.unflatten(filled)
        return start(*args, method=call.method, mutable=call.mutable, **kwargs)

    def init(rngs: Any, arrays: Sequence[Any]) -> Any:
        return run(lambda *args, **kwargs: call.module.init(rngs, *args, **kwargs), arrays)

    def apply(variables: Any, rngs: Any, arrays: Sequence[Any]) -> Any:
        return run(lambda *args, **kwargs: call.module.apply(variables, *args, rngs=rngs, **kwargs), arrays)

    arrays = [leaves[place] for place in places]
    variables = jax.eval_shape(init, call.rngs, arrays)
    return (vjp_flops if gradient else flops)(apply, variables, call.rngs, arrays)


def _size_and_bytes(tree: Any) -> tuple[int, int]:
    arrays = [x for x in jax.tree.leaves(tree) if hasattr(x, "size")]
    return sum(x.size for x in arrays), sum(x.size * x.dtype.itemsize for x in arrays)


def tabulate(
    module: Module,
    rngs: PRNGKey | Mapping[str, PRNGKey],
    depth: int | None = None,
    show_repeated: bool = False,
    mutable: CollectionFilter = ALL_BUT_INTERMEDIATES,
    console_kwargs: Mapping[str, Any] | None = None,
    table_kwargs: Mapping[str, Any] | None = None,
    column_kwargs: Mapping[str, Any] | None = None,
    compute_flops: bool = False,
    compute_vjp_flops: bool = False,
    **kwargs: Any,
) -> Callable[..., str]:
    """A function of example inputs that gives a table of the module's submodules as text.

    The module is initialised abstractly: nothing is computed and no memory allocated.

    Args:
        rngs: random keys, as for ``Module.init``.
        depth: how many levels of submodules to show; the variables of those below count as their ancestor's.
        show_repeated: show every call of a module, not only the first.
        mutable: the collections to make, as for ``Module.init``.
        console_kwargs: for ``rich.console.Console``, such as ``{"width": 120}``.
        table_kwargs, column_kwargs: for ``rich.table.Table`` and its ``add_column``.
        compute_flops, compute_vjp_flops: count the floating point operations of calls, and of their gradients.
        **kwargs: passed to ``Module.init``.
    """
    if mutable != ALL_BUT_INTERMEDIATES:
        kwargs["mutable"] = mutable

    def table(*args: Any, **more: Any) -> str:
        rows = module_table(
            module,
            rngs,
            *args,
            depth=depth,
            show_repeated=show_repeated,
            compute_flops=compute_flops,
            compute_vjp_flops=compute_vjp_flops,
            **kwargs,
            **more,
        )
        columns = ["inputs", "outputs", *["flops"] * compute_flops, *["vjp_flops"] * compute_vjp_flops]
        return _render(rows, columns, console_kwargs or {}, table_kwargs or {}, column_kwargs or {})

    return table


def _render(
    table: Table,
    columns: Sequence[str],
    console_kwargs: Mapping[str, Any],
    table_kwargs: Mapping[str, Any],
    column_kwargs: Mapping[str, Any],
) -> str:
    totals = [row.size_and_bytes(table.collections) for row in table]
    total = {col: tuple(map(sum, zip(*(row[col] for row in totals), strict=True))) for col in table.collections}
    grand_total = tuple(map(sum, zip(*total.values(), strict=True))) or (0, 0)
    options = {"show_header": True, "show_lines": True, "show_footer": True, "caption_style": "bold", **table_kwargs}
    shown = RichTable(
        title=f"{type(table.module).__name__} Summary",
        caption=f"\nTotal Parameters: {size_text(*grand_total)}",
        **options,
    )
    for column in ("path", "module", *columns):
        shown.add_column(column, **column_kwargs)
    shown.columns[-1].footer = Text.from_markup("Total", justify="right")
    for col in table.collections:
        shown.add_column(col, footer=size_text(*total[col]), **column_kwargs)
    for row, sizes in zip(table, totals, strict=True):
        method = "" if row.method in ("__call__", "<lambda>") else f" [dim]({row.method})[/dim]"
        shown.add_row(
            "/".join(row.path),
            type(row.module_copy).__name__ + method,
            *(tree_text(getattr(row, column)) for column in columns),
            *(_variables_text(row.module_variables.get(col), sizes[col]) for col in table.collections),
        )
    file = io.StringIO()
    Console(file=file, **{"force_terminal": True, "force_jupyter": False, **console_kwargs}).print(shown)
    return f"\n{file.getvalue()}\n"


def _variables_text(variables: Any, size_and_bytes: tuple[int, int]) -> str:
    text = tree_text(jax.tree.map(_boxed_text, variables, is_leaf=is_axis_metadata))
    size = size_text(*size_and_bytes)
    return "\n\n".join(part for part in (text, f"[bold]{size}[/bold]") if part)


def _boxed_text(x: Any) -> Any:
    """A variable in a metadata box as text: its type, and the names of its axes."""
    if not isinstance(x, Partitioned):
        return x
    names = ", ".join(map(str, x.names)) + "," * (len(x.names) == 1)  # as tuples are written
    return f"{array_text(x.value)} [dim]P[/dim]({names})"
