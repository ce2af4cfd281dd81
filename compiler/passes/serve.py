"""Deriving the serving step: caches for every attention, and logits only where a token is sampled.

The graph is cut in two. The *body* is what attention layers need and runs on all T tokens of the step. The *tail*,
everything after the last attention (its output projection and MLP, the final norm, the vocabulary), runs on the S
sampled tokens alone; a model that selects the last token itself is served by the same cut.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from distaff.compiler.analysis.tokens import DATA, Kind, TokenClasses
from distaff.compiler.artifact import CacheSpec
from distaff.compiler.errors import ModelSignatureError
from distaff.compiler.ir import ATTENTION, ROW_PROGRAM, Graph, Node, Value
from distaff.compiler.ir.graph import ancestors
from distaff.compiler.ir.types import KEY
from distaff.kernels.paged_attention import pool_shape

Slot = tuple[int, int]  # (cache, layer)


@dataclasses.dataclass(frozen=True)
class ServePlan:
    """The serving step as data: which nodes run on which tokens, and where each attention keeps its rows.

    ``slots`` gives for each attention node (by ``id``) the cache slots of what it writes: key and value, or the leaves
    over keys of a row program. ``boundary`` are the token values that the tail takes from the body.
    """

    graph: Graph
    classes: TokenClasses
    body: tuple[Node, ...]
    tail: tuple[Node, ...]
    boundary: tuple[Value, ...]
    caches: tuple[CacheSpec, ...]
    slots: dict[int, tuple[Slot, ...]]
    vocab_size: int


def plan_serving(graph: Graph, classes: TokenClasses, *, kv_dtype: str | None = None) -> ServePlan:
    """Plans the step of a graph whose attention has been raised; raises `ModelSignatureError` for wrong outputs.

    ``kv_dtype`` is the floating point type that caches are kept in, or int8 to quantise them (default: that of the
    values themselves).
    """
    vocab_size = _vocab_size(graph, classes)
    attentions = [n for n in graph.nodes if n.op in (ATTENTION, ROW_PROGRAM)]
    needed = {id(n) for n in ancestors([v for n in attentions for v in n.outputs])}
    body = tuple(n for n in graph.nodes if id(n) in needed)
    tail = tuple(n for n in graph.nodes if id(n) not in needed or classes[n.outputs[0]] is Kind.INDEX)
    made = {id(v) for n in body for v in n.outputs} | {id(v) for v in graph.inputs}
    taken = [v for n in tail for v in n.inputs] + list(graph.outputs)
    boundary = {id(v): v for v in taken if id(v) in made and classes[v] in DATA}
    caches, slots = _assign_caches(attentions, kv_dtype)
    return ServePlan(graph, classes, body, tail, tuple(boundary.values()), caches, slots, vocab_size)


def _vocab_size(graph: Graph, classes: TokenClasses) -> int:
    (output,) = graph.outputs
    shape = output.type.shape
    kind = classes[output]
    static = [d for d in shape[:-1] if d != 1]
    per_token = kind is Kind.TOKEN and output.type.token_dims == (len(shape) - 2,) and len(static) == 1
    per_request = kind is Kind.REQUEST and not static
    if not (per_token or per_request) or not isinstance(shape[-1], int):
        raise ModelSignatureError(
            f"the model returns {output.type} for tokens i32[1,S]; it must return logits [1, S, vocab] for every "
            "token, or [1, vocab] for the last one"
        )
    return shape[-1]


def _assign_caches(
    attentions: list[Node], kv_dtype: str | None
) -> tuple[tuple[CacheSpec, ...], dict[int, tuple[Slot, ...]]]:
    """Attentions that keep rows of the same shapes share buffers, a layer each; equal leaves are kept once.

    The buffers of one attention (key and value) are filled layer by layer together, so that a kernel finds both at the
    same layer.
    """
    windows: dict[tuple[_Row, ...], list[int | None]] = {}
    known: dict[tuple[tuple[int, bytes], ...], tuple[tuple[_Row, ...], int]] = {}
    places: dict[int, tuple[tuple[_Row, ...], int]] = {}
    for node in attentions:
        rows = cached_rows(node, kv_dtype)
        group = tuple(row for row, _, _ in rows)
        identity = tuple((id(value), layout) for _, value, layout in rows)
        if identity not in known:
            windows.setdefault(group, []).append(_window(node))
            known[identity] = (group, len(windows[group]) - 1)
        places[id(node)] = known[identity]
    caches: list[CacheSpec] = []
    first: dict[tuple[_Row, ...], int] = {}
    roles = [row.role for group in windows for row in group]
    for group, seen in windows.items():
        first[group] = len(caches)
        widest = None if any(w is None for w in seen) else max(w for w in seen if w is not None)
        for row in group:
            number = sum(c.name.rstrip("0123456789") == row.role for c in caches)
            name = row.role if roles.count(row.role) == 1 else f"{row.role}{number}"
            caches.append(CacheSpec(name, len(seen), pool_shape(row.shape, row.dtype), row.dtype, widest))
    slots = {
        node: tuple((first[group] + i, layer) for i in range(len(group))) for node, (group, layer) in places.items()
    }
    return tuple(caches), slots


@dataclasses.dataclass(frozen=True)
class _Row:
    """What an attention keeps of one token in one buffer."""

    role: str
    shape: tuple[int, ...]
    dtype: str


def cached_rows(node: Node, kv_dtype: str | None = None) -> list[tuple[_Row, Value, bytes]]:
    """What an attention node writes for each token: the row, the value that it is made of, and a key of its layout."""
    if node.op == ATTENTION:
        pattern = node.params["pattern"]
        parts = (("key", node.inputs[1], pattern.key), ("value", node.inputs[2], pattern.value))
        return [(_Row(role, p.shape, _storage(v, kv_dtype)), v, p.tobytes()) for role, v, p in parts]
    rows = []
    for value, axis in node.params["region"].leaves:
        if axis == KEY:
            shape = tuple(int(d) for d in value.type.per_token() if d != 1) or (1,)
            rows.append((_Row("row", shape, _storage(value, kv_dtype)), value, b""))
    return rows


def _storage(value: Value, kv_dtype: str | None) -> str:
    """The dtype of a buffer: XLA:CPU converts a whole bfloat16 buffer to write one row, so it is kept as bits there."""
    dtype = str(value.type.dtype)
    if kv_dtype is not None and "float" in dtype:
        dtype = kv_dtype
    elif dtype == "int8":
        dtype = "int16"  # pools of int8 are quantised
    return "uint16" if dtype == "bfloat16" and jax.default_backend() == "cpu" else dtype


def _window(node: Node) -> int | None:
    spec = node.params.get("spec")
    return None if spec is None else spec.window


def bytes_per_token(caches: tuple[CacheSpec, ...]) -> int:
    """Bytes that one token keeps in the pool over all layers and caches."""
    return sum(c.layers * int(np.prod(c.shape)) * np.dtype(c.dtype).itemsize for c in caches)
