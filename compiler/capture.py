"""Capture: any JAX callable to the IR, by tracing it at several lengths and reading the traces in lockstep.

The two-probe gate is part of it. Dimensions and shape parameters that grow with the length become symbolic; a length
that shows up as a *number* (``x * S ** -0.5``), or a program whose operations depend on the length, is refused with
the user's line. A third, longer trace checks that what two short ones suggest holds at serving length.

Calls (``jit``, ``custom_jvp``, ``checkpoint``, …) are inlined and loops with a fixed trip count are unrolled, so that
the passes see one flat list of nodes, each with the user's location.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from distaff.compiler import jax_compat
from distaff.compiler.errors import LengthLeakError, ModelSignatureError, UnsupportedOperationError
from distaff.compiler.ir import Graph, Location, Node, Sym, TensorType, Value

PROBES = (19, 23)
LONGEST_PROBE = 4096
_DROPPED = frozenset(
    {"sharding_constraint", "device_put", "copy", "copy_p", "stop_gradient", "optimization_barrier", "name"}
)
_LAYER_LOOP_LIMIT = 1024


@dataclasses.dataclass(frozen=True)
class Captured:
    """A captured graph, with the numbers in it that change with the length.

    ``leaks`` are kept apart because an analysis of the graph often has more to say: the mean over tokens divides by the
    length, but what is wrong with it is the sum.
    """

    graph: Graph
    leaks: tuple[LengthLeakError, ...] = ()


def capture(function: Callable[[Any, Any], Any], params: Any, max_model_len: int) -> Captured:
    """Traces ``function(params, tokens int32[1, S])`` to a graph with one input, the tokens, and one output.

    ``params`` is a pytree of arrays; its leaves become weights named by their path. Raises `ModelSignatureError` if
    the result is not one array, `LengthLeakError` if the program branches on the length, and
    `UnsupportedOperationError` for loops that cannot be unrolled.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    weights = [
        Value(TensorType(tuple(np.shape(leaf)), _dtype(leaf)), name=_path_name(path), data=leaf)
        for path, leaf in leaves
    ]

    def flat(*args: Any) -> Any:
        return function(jax.tree_util.tree_unflatten(tree, args[:-1]), args[-1])

    lengths = probe_lengths(max_model_len)
    try:
        captured = _Capture(lengths).run(_traces(flat, weights, lengths), weights)
    except LengthLeakError:
        if not any(lengths[-1] in v.type.shape for v in weights):
            raise
        # A table with exactly as many rows is not cut at that length, so its trace lacks an operation.
        lengths = (*lengths[:-1], lengths[-1] - 1)
        captured = _Capture(lengths).run(_traces(flat, weights, lengths), weights)
    _check_tables(captured.graph, max_model_len)
    return captured


def _traces(flat: Callable[..., Any], weights: list[Value], lengths: tuple[int, ...]) -> list[jax_compat.ClosedJaxpr]:
    abstract = [jax.ShapeDtypeStruct(v.type.shape, v.type.dtype) for v in weights]
    traces = []
    for length in lengths:
        try:
            traces.append(jax_compat.trace(flat, *abstract, jax.ShapeDtypeStruct((1, length), np.dtype(np.int32))))
        except (TypeError, ValueError, IndexError) as error:
            hint = f". It can at length {lengths[0]}: is max_model_len too large for it?" if traces else ""
            raise ModelSignatureError(
                f"the model cannot be traced for tokens i32[1,{length}]: {error}{hint}"
            ) from error
    shapes = [tuple(v.aval.shape) for v in traces[0].jaxpr.outvars]
    if len(shapes) != 1:
        raise ModelSignatureError(
            f"the model returns {len(shapes)} arrays of shapes {shapes}; return the logits alone, for example "
            "lambda params, tokens: model(params, tokens)[0]"
        )
    return traces


def probe_lengths(max_model_len: int) -> tuple[int, ...]:
    """Three lengths to trace at: two short, and the longest that is served (at most `LONGEST_PROBE`)."""
    if max_model_len <= max(PROBES):
        if max_model_len < 4:
            raise ModelSignatureError(f"max_model_len is {max_model_len}; a model must take at least 4 tokens")
        return (max_model_len - 2, max_model_len - 1, max_model_len)
    return (*PROBES, min(max_model_len, LONGEST_PROBE))


def _check_tables(graph: Graph, max_model_len: int) -> None:
    """Arrays that are read by position must have a row for every position that is served."""
    for node in graph.nodes:
        for value in node.inputs:
            cut = node.op == "slice" and value.is_constant and bool(node.outputs[0].type.token_dims)
            dims = node.outputs[0].type.token_dims if cut else value.type.token_dims if value.is_table else ()
            rows = min((np.shape(value.data)[d] for d in dims), default=max_model_len)
            if rows < max_model_len:
                raise UnsupportedOperationError(
                    node.op,
                    node.location,
                    f"it reads an array of {rows} positions by position, and up to {max_model_len} are to be served",
                    f"compute it from jnp.arange(tokens.shape[1]), or serve at most {rows} tokens (max_model_len)",
                )


def _dtype(leaf: Any) -> np.dtype[Any]:
    return np.dtype(getattr(leaf, "dtype", np.asarray(leaf).dtype))


def _path_name(path: Any) -> str:
    keys = [getattr(k, "key", getattr(k, "name", getattr(k, "idx", None))) for k in path]
    return ".".join(str(k) for k in keys if k is not None) or "weight"


class _Capture:
    """Walks the traces of all lengths side by side and builds one symbolic graph."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = lengths
        self.nodes: list[Node] = []
        self.enclosing: list[Location] = []
        self.leaks: list[LengthLeakError] = []

    def run(self, traces: Sequence[jax_compat.ClosedJaxpr], weights: list[Value]) -> Captured:
        tokens = Value(TensorType((1, Sym()), np.dtype(np.int32)), name="tokens")
        outputs = self.jaxprs([t.jaxpr for t in traces], [t.consts for t in traces], [*weights, tokens])
        return Captured(Graph((tokens,), self.nodes, tuple(outputs)).reachable(), tuple(self.leaks))

    def jaxprs(
        self, jaxprs: Sequence[jax_compat.Jaxpr], consts: Sequence[Sequence[Any]], args: Sequence[Value]
    ) -> list[Value]:
        """Inlines jaxprs of the same program, one a length; ``consts`` may be arrays or values."""
        first = jaxprs[0]
        env: dict[Any, Value] = dict(zip(first.invars, args, strict=True))
        for i, var in enumerate(first.constvars):
            env[var] = self.constant([c[i] for c in consts], Location())
        for equations in self.lockstep(jaxprs):
            location = jax_compat.location_of(equations[0], self.enclosing)
            inputs = [
                self.literal([e.invars[i] for e in equations], location, equations[0].primitive.name)
                if isinstance(atom, jax_compat.Literal)
                else env[atom]
                for i, atom in enumerate(equations[0].invars)
            ]
            results = self.equation(equations, inputs, location)
            env.update(zip(equations[0].outvars, results, strict=True))
        return [
            self.literal([j.outvars[i] for j in jaxprs], Location())
            if isinstance(atom, jax_compat.Literal)
            else env[atom]
            for i, atom in enumerate(first.outvars)
        ]

    def lockstep(self, jaxprs: Sequence[jax_compat.Jaxpr]) -> Any:
        """Yields the equations of all traces side by side; refuses where they differ."""
        for equations in zip(*(j.eqns for j in jaxprs), strict=False):
            if len({e.primitive for e in equations}) > 1:
                self.branches(equations)
            yield equations
        if len({len(j.eqns) for j in jaxprs}) > 1:
            shortest = min(len(j.eqns) for j in jaxprs)
            self.branches([j.eqns[shortest] for j in jaxprs if len(j.eqns) > shortest])

    def branches(self, equations: Sequence[Any]) -> None:
        raise LengthLeakError(
            equations[0].primitive.name,
            jax_compat.location_of(equations[0], self.enclosing),
            f"the traces at lengths {self.lengths} run different operations here "
            f"({', '.join(dict.fromkeys(e.primitive.name for e in equations))}), so the program branches on the length",
            "compute the same operations for every length; mask by position instead of an `if` on tokens.shape",
        )

    def equation(self, equations: Sequence[Any], inputs: list[Value], location: Location) -> list[Value]:
        first = equations[0]
        name = first.primitive.name
        if name in _DROPPED:
            return inputs
        if name == "scan":
            return self.scan(equations, inputs, location)
        if name == "call_hi_primitive":
            expanded = [jax_compat.expand_hijax_call(e) for e in equations]
            if all(e is not None for e in expanded):
                return self.call([e.jaxpr for e in expanded if e], [e.consts for e in expanded if e], inputs, location)
        if name == "cond":
            return self.cond(equations, inputs, location)
        if name not in ("while", "pallas_call", "shard_map", "reduce", "custom_root", "custom_linear_solve"):
            inner = [jax_compat.inner_jaxpr(e.params) for e in equations]
            if inner[0] is not None:
                return self.call([i[0] for i in inner if i], [i[1] for i in inner if i], inputs, location)
        return self.node(equations, inputs, location)

    def call(
        self, jaxprs: Sequence[jax_compat.Jaxpr], consts: Sequence[Sequence[Any]], inputs: list[Value], at: Location
    ) -> list[Value]:
        self.enclosing.append(at)
        try:
            return self.jaxprs(jaxprs, consts, inputs)
        finally:
            self.enclosing.pop()

    def node(self, equations: Sequence[Any], inputs: list[Value], location: Location) -> list[Value]:
        first = equations[0]
        name = first.primitive.name
        params = {k: self.generalise([e.params[k] for e in equations], f"{name}.{k}", location) for k in first.params}
        types = []
        for i, var in enumerate(first.outvars):
            shape = self.generalise([tuple(e.outvars[i].aval.shape) for e in equations], f"{name} shape", location)
            try:
                types.append(TensorType(shape, jax_compat.aval_dtype(var.aval)))
            except TypeError:
                raise UnsupportedOperationError(
                    name,
                    location,
                    f"it makes a value of type {var.aval.dtype}, as random numbers need",
                    "serve the deterministic model: switch dropout and other randomness off (deterministic=True)",
                ) from None
        node = Node.make(name, inputs, params, types, location, first.primitive)
        self.nodes.append(node)
        return list(node.outputs)

    def scan(self, equations: Sequence[Any], inputs: list[Value], location: Location) -> list[Value]:
        """Unrolls a loop over layers: the stacked inputs are sliced, the carry is threaded, outputs are stacked."""
        params = equations[0].params
        lengths = {e.params["length"] for e in equations}
        if len(lengths) > 1:
            raise UnsupportedOperationError(
                "scan",
                location,
                "it loops over the token axis: each step needs the state of the one before",
                "recurrences over tokens (RNN, Mamba, linear attention) are not served; only attention keeps a cache",
            )
        (length,) = lengths
        if length > _LAYER_LOOP_LIMIT:
            raise UnsupportedOperationError(
                "scan",
                location,
                f"it runs {length} times, and loops are unrolled up to {_LAYER_LOOP_LIMIT} times",
                "vectorise this loop; only loops over layers are meant to be scans",
            )
        num_consts, num_carry = jax_compat.scan_parts(params)
        consts, carry, stacked = (
            inputs[:num_consts],
            inputs[num_consts : num_consts + num_carry],
            inputs[num_consts + num_carry :],
        )
        jaxprs = [e.params["jaxpr"] for e in equations]
        collected: list[list[Value]] = []
        steps = range(length - 1, -1, -1) if params["reverse"] else range(length)
        for i in steps:
            xs = [self.element(value, i, location) for value in stacked]
            results = self.call([j.jaxpr for j in jaxprs], [j.consts for j in jaxprs], [*consts, *carry, *xs], location)
            carry = results[:num_carry]
            collected.append(results[num_carry:])
        if params["reverse"]:
            collected.reverse()
        return [*carry, *(self.stack(list(column), location) for column in zip(*collected, strict=True))]

    def element(self, value: Value, i: int, location: Location) -> Value:
        """``value[i]``; of a weight, a weight of its own that is sliced here and now."""
        shape = value.type.shape
        if value.data is not None and not value.is_table:
            return Value(
                TensorType(shape[1:], value.type.dtype),
                name=f"{value.name}.{i}" if value.name else "",
                data=value.data[i],
            )
        starts = (i, *(0,) * (len(shape) - 1))
        sliced = self.apply(
            jax.lax.slice_p, [value], location, TensorType((1, *shape[1:]), value.type.dtype),
            start_indices=starts, limit_indices=(i + 1, *shape[1:]), strides=None,
        )  # fmt: skip
        return self.apply(
            jax.lax.squeeze_p, [sliced], location, TensorType(shape[1:], value.type.dtype), dimensions=(0,)
        )

    def stack(self, values: list[Value], location: Location) -> Value:
        kind = values[0].type
        rows = [
            self.apply(
                jax.lax.broadcast_in_dim_p, [v], location, TensorType((1, *kind.shape), kind.dtype),
                shape=(1, *kind.shape), broadcast_dimensions=tuple(range(1, kind.rank + 1)), sharding=None,
            )
            for v in values
        ]  # fmt: skip
        return self.apply(
            jax.lax.concatenate_p, rows, location, TensorType((len(rows), *kind.shape), kind.dtype), dimension=0
        )

    def apply(self, primitive: Any, inputs: list[Value], location: Location, kind: TensorType, **params: Any) -> Value:
        node = Node.make(primitive.name, inputs, params, [kind], location, primitive)
        self.nodes.append(node)
        return node.output

    def cond(self, equations: Sequence[Any], inputs: list[Value], location: Location) -> list[Value]:
        """Both branches run and the predicate selects; only for a two-way branch on one scalar."""
        branches = [e.params["branches"] for e in equations]
        predicate, *operands = inputs
        if len(branches[0]) != 2 or predicate.type.rank:
            raise UnsupportedOperationError(
                "cond", location, f"it switches between {len(branches[0])} branches", "use jnp.where or lax.select"
            )
        results = [
            self.call([b[i].jaxpr for b in branches], [b[i].consts for b in branches], operands, location)
            for i in (0, 1)
        ]
        if predicate.type.dtype != np.bool_:
            zero = Value(TensorType((), predicate.type.dtype), data=np.zeros((), predicate.type.dtype))
            predicate = self.apply(jax.lax.ne_p, [predicate, zero], location, TensorType((), np.dtype(np.bool_)))
        return [
            self.apply(jax.lax.select_n_p, [predicate, a, b], location, a.type) for a, b in zip(*results, strict=True)
        ]

    def literal(self, atoms: Sequence[Any], location: Location, user: str = "output") -> Value:
        return self.constant([np.asarray(a.val, a.aval.dtype) for a in atoms], location, user)

    def constant(self, arrays: Sequence[Any], location: Location, user: str = "constant") -> Value:
        """A captured array: the same at all lengths, or a table of which shorter ones are the leading part."""
        if isinstance(arrays[0], Value):
            return arrays[0]
        longest = arrays[-1]
        kind = TensorType(
            self.generalise([tuple(np.shape(a)) for a in arrays], "constant shape", location), _dtype(longest)
        )
        if not all(a is longest for a in arrays) and not all(_is_leading_part(a, longest) for a in arrays[:-1]):
            shown = f"{np.asarray(arrays[0])} and {np.asarray(longest)}" if not kind.rank else f"of type {kind}"
            self.leaks.append(
                LengthLeakError(
                    user,
                    location,
                    f"it takes a number that changes between lengths {self.lengths[0]} and {self.lengths[-1]}: {shown}",
                    "do not compute numbers from tokens.shape[1]; compute them from positions (jnp.arange) instead",
                )
            )
        return Value(kind, data=longest)

    def generalise(self, values: Sequence[Any], what: str, location: Location) -> Any:
        """One parameter seen at every length: equal, or an integer that grows with the length."""
        first = values[0]
        if isinstance(first, bool) or not isinstance(first, (int, np.integer, tuple, list, float)):
            return first
        if isinstance(first, (tuple, list)) and not hasattr(first, "_fields"):
            if len({len(v) for v in values}) == 1:
                parts = [self.generalise([v[i] for v in values], what, location) for i in range(len(first))]
                return tuple(parts) if isinstance(first, tuple) else parts
        elif all(v == first or (v != v and first != first) for v in values):
            return int(first) if isinstance(first, np.integer) else first
        elif isinstance(first, (int, np.integer)):
            scale, rest = divmod(int(values[1]) - int(first), self.lengths[1] - self.lengths[0])
            offset = int(first) - scale * self.lengths[0]
            if (
                not rest
                and scale
                and all(int(v) == scale * n + offset for v, n in zip(values, self.lengths, strict=True))
            ):
                return Sym(scale=scale, offset=offset)
        raise LengthLeakError(
            what,
            location,
            f"its value is {', '.join(map(str, values))} at lengths {', '.join(map(str, self.lengths))}",
            "only shapes may depend on the sequence length; use positions (jnp.arange) for anything else",
        )


def _is_leading_part(array: Any, longest: Any) -> bool:
    leading = np.asarray(longest)[tuple(slice(n) for n in np.shape(array))]
    return bool(np.array_equal(np.asarray(array), leading, equal_nan=np.issubdtype(leading.dtype, np.inexact)))
