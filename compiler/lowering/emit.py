"""From a serving plan to a function that `jax.jit` can trace: weights, pages and a ragged batch in, logits out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.compiler import jax_compat
from distaff.compiler.analysis.tokens import Kind
from distaff.compiler.ir import ATTENTION, ROW_PROGRAM, Node, Value
from distaff.compiler.ir.evaluate import Evaluator
from distaff.compiler.ir.types import KEY, QUERY, TOKENS
from distaff.compiler.passes.regions import Region
from distaff.compiler.passes.serve import ServePlan, Slot
from distaff.compiler.serve_step import StepFunction
from distaff.kernels.paged_attention import StepBatch, paged_attention, read_context, write_pages

_ROW_BLOCK = 8  # tokens of a row program that are evaluated together


def weights_of(plan: ServePlan) -> dict[str, Value]:
    """The values that the step takes as weights, by unique name: everything that is too large to be baked in."""
    values: dict[int, Value] = {}
    graphs = [plan.graph, *(n.params["region"].body for n in plan.body if n.op == ROW_PROGRAM)]
    for graph in graphs:
        for value in graph.constants():
            if not value.is_table and (value.name or np.size(value.data) > 1024):
                values.setdefault(id(value), value)
    named: dict[str, Value] = {}
    for i, value in enumerate(values.values()):
        name = value.name or f"constant.{i}"
        named[name if name not in named else f"{name}.{i}"] = value
    return named


def emit(plan: ServePlan, weights: Sequence[Value]) -> StepFunction:
    """The step function of a plan; it is traced anew for every bucket."""

    def step(
        arrays: Sequence[jax.Array], pages: Sequence[jax.Array], batch: StepBatch
    ) -> tuple[jax.Array, list[jax.Array]]:
        known = {id(v): a for v, a in zip(weights, arrays, strict=True)}
        run = _Body(plan, known, list(pages), batch)
        run.run(plan.body)
        return _tail(plan, run, batch), run.pages

    return step


class _Body(Evaluator):
    """Evaluates the body on all tokens of the batch; attention nodes write to and read from the pages."""

    def __init__(self, plan: ServePlan, known: Mapping[int, Any], pages: list[jax.Array], batch: StepBatch) -> None:
        (tokens,) = plan.graph.inputs
        count = batch.tokens.shape[0]
        super().__init__(
            {TOKENS: count}, {TOKENS: batch.positions}, {**known, id(tokens): batch.tokens.reshape(1, count)}
        )
        self.plan, self.pages, self.batch = plan, pages, batch
        self.weights = known

    def apply(self, node: Node) -> list[Any]:
        """Adds the two operations of our own to those of the IR."""
        if node.op == ATTENTION:
            return [self.attention(node)]
        if node.op == ROW_PROGRAM:
            return [self.row_program(node)]
        return super().apply(node)

    def rows(self, value: Value) -> jax.Array:
        """A token value as [T, values of one token]."""
        array = jnp.moveaxis(self[value], value.type.token_dims[0], 0)
        return array.reshape(array.shape[0], -1)

    def write(self, slot: Slot, rows: jax.Array) -> None:
        cache, layer = slot
        self.pages[cache] = write_pages(self.pages[cache], layer, self.batch.slots, rows)

    def attention(self, node: Node) -> jax.Array:
        pattern, spec = node.params["pattern"], node.params["spec"]
        query, key, value = (
            arrange(self.rows(v), layout)
            for v, layout in zip(node.inputs, (pattern.query, pattern.key, pattern.value), strict=True)
        )
        slots = self.plan.slots[id(node)]
        for slot, rows in zip(slots, (key, value), strict=True):
            self.write(slot, rows)
        (k, layer), (v, _) = slots
        result = paged_attention(spec, query, self.pages[k], self.pages[v], layer, self.batch)
        flat = arrange(result.reshape(result.shape[0], -1), pattern.output).astype(node.output.type.dtype)
        return jnp.moveaxis(flat, 0, node.output.type.token_dims[0])

    def row_program(self, node: Node) -> jax.Array:
        """The user's own operations for one query token over its request's context, for all tokens of the batch."""
        region: Region = node.params["region"]
        slots = iter(self.plan.slots[id(node)])
        caches: dict[int, Slot] = {}
        queries: dict[int, jax.Array] = {}
        for i, (value, axis) in enumerate(region.leaves):
            if axis == KEY:
                caches[i] = next(slots)
                cache, _ = caches[i]
                self.write(caches[i], self.rows(value).reshape(-1, *self.pages[cache].shape[3:]))
            else:
                queries[i] = jnp.moveaxis(self[value], value.type.token_dims[0], 0)
        pages = self.pages

        def one(token: tuple[jax.Array, jax.Array, dict[int, jax.Array]]) -> jax.Array:
            position, row, mine = token
            known = dict(self.weights)
            for i, array in mine.items():
                inner = region.body.inputs[i]
                known[id(inner)] = jnp.expand_dims(array, inner.type.token_dims[0])
            length = 0
            for i, (cache, layer) in caches.items():
                context = read_context(pages[cache], layer, self.batch.tables[row])
                inner = region.body.inputs[i]
                length = context.shape[0]
                per_token = inner.type.per_token()
                known[id(inner)] = jnp.moveaxis(context.reshape(length, *per_token), 0, inner.type.token_dims[0])
            evaluator = Evaluator(
                {QUERY: 1, KEY: length}, {QUERY: position[None], KEY: jnp.arange(length, dtype=jnp.int32)}, known
            )
            evaluator.run(region.body.nodes)
            output = region.body.outputs[0]
            return jnp.squeeze(evaluator[output], output.type.token_dims[0])

        results = jax.lax.map(one, (self.batch.positions, self.batch.rows, queries), batch_size=_ROW_BLOCK)
        return jnp.moveaxis(results, 0, node.output.type.token_dims[0])


def _tail(plan: ServePlan, body: _Body, batch: StepBatch) -> jax.Array:
    """The tail for each sampled token by itself: the plain program at length one, at that token's position."""
    samples = batch.samples
    gathered = {
        i: jnp.moveaxis(jnp.take(body[v], samples, axis=v.type.token_dims[0]), v.type.token_dims[0], 0)
        for i, v in enumerate(plan.boundary)
    }
    constants = {i: a for i, a in body.known.items() if not isinstance(a, dict) and i not in _data_ids(plan)}
    (output,) = plan.graph.outputs

    def one(position: jax.Array, rows: dict[int, jax.Array]) -> jax.Array:
        known = dict(constants)
        for i, array in rows.items():
            value = plan.boundary[i]
            known[id(value)] = jnp.expand_dims(array, value.type.token_dims[0])
        evaluator = Evaluator({TOKENS: 1}, {TOKENS: position[None]}, known)
        evaluator.run(plan.tail)
        return jnp.reshape(evaluator[output], (plan.vocab_size,))

    with jax_compat.at_location(output.node.location if output.node is not None else plan.graph.nodes[-1].location):
        return jax.vmap(one)(batch.positions[samples], gathered).astype(jnp.float32)


def _data_ids(plan: ServePlan) -> set[int]:
    """Values that differ between tokens or positions, which the tail must not take from the body as they are."""
    return {
        id(v)
        for v in (*plan.graph.inputs, *(v for n in plan.body for v in n.outputs))
        if plan.classes[v] is not Kind.CONSTANT
    }


def arrange(rows: jax.Array, layout: np.ndarray) -> jax.Array:
    """``rows[:, layout]`` for rows [T, N]: a reshape or transpose where the layout is one, a gather otherwise."""
    count = rows.shape[0]
    flat = layout.reshape(-1)
    if flat.size == rows.shape[1]:
        if np.array_equal(flat, np.arange(flat.size)):
            return rows.reshape(count, *layout.shape)
        order = np.argsort([layout.strides[i] for i in range(layout.ndim)])
        for permutation in _permutations(layout, order):
            sizes = tuple(layout.shape[i] for i in permutation)
            if np.array_equal(layout.transpose(permutation).reshape(-1), np.arange(flat.size)):
                inverse = np.argsort(permutation)
                return rows.reshape(count, *sizes).transpose(0, *(int(i) + 1 for i in inverse))
    return jnp.take(rows, flat, axis=1).reshape(count, *layout.shape)


def _permutations(layout: np.ndarray, order: np.ndarray) -> list[tuple[int, ...]]:
    """The one permutation that can make the layout contiguous: dimensions by falling step of their element numbers."""
    first = (0,) * layout.ndim
    steps = []
    for d in range(layout.ndim):
        second = tuple(1 if i == d else 0 for i in range(layout.ndim))
        steps.append(int(layout[second]) - int(layout[first]) if layout.shape[d] > 1 else layout.size)
    return [tuple(int(i) for i in np.argsort([-s for s in steps], kind="stable"))]
