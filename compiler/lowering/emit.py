"""From a serving plan to a function that `jax.jit` can trace: weights, pages and a ragged batch in, logits out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.compiler import jax_compat
from distaff.compiler.analysis.tokens import Kind
from distaff.compiler.ir import ATTENTION, EMBED, MATMUL, ROW_PROGRAM, Graph, Node, Value
from distaff.compiler.ir.evaluate import Evaluator
from distaff.compiler.ir.types import KEY, QUERY, TOKENS
from distaff.compiler.passes.matmul import PACKED_ROLES, ProductSpec
from distaff.compiler.passes.pack import padded_columns
from distaff.compiler.passes.regions import Region
from distaff.compiler.passes.roll import LayerLoop
from distaff.compiler.passes.serve import ServePlan, Slot
from distaff.compiler.serve_step import StepFunction
from distaff.kernels.matmul import embed_rows, matmul
from distaff.kernels.matmul.operation import ACTIVATIONS
from distaff.kernels.matmul.pieces import Operand
from distaff.kernels.paged_attention import StepBatch, paged_attention, read_context, row_shape, write_pages

_ROW_BLOCK = 8  # tokens of a row program that are evaluated together


@dataclasses.dataclass(frozen=True)
class Weights:
    """What the step takes as weights, in order: arrays by name, and the values that each of them stands for.

    An array of a rolled loop stands for one value of every layer, stacked along its first dimension. ``of_products``
    are the names of those that packed products alone read.
    """

    arrays: dict[str, Any]
    values: tuple[tuple[Value, ...], ...]
    of_products: frozenset[str]


def collect_weights(plan: ServePlan, loop: LayerLoop | None = None) -> Weights:
    """The weights of a plan, stacked by layer where the loop needs them so."""
    stacked = {id(v): values for values in (loop.stacked if loop else ()) for v in values}
    arrays: dict[str, Any] = {}
    groups: list[tuple[Value, ...]] = []
    named = _named_weights(plan)
    for name, value in named.items():
        group = stacked.get(id(value))
        if group is None:
            arrays[name] = value.data
            groups.append((value,))
        elif value is group[0]:
            arrays[f"{name}.stacked"] = np.stack([np.asarray(v.data) for v in group])
            groups.append(group)
    others = _read_otherwise(plan)
    of_products = frozenset(name for name, value in named.items() if loop is None and id(value) not in others)
    return Weights(arrays, tuple(groups), of_products)


def _read_otherwise(plan: ServePlan) -> set[int]:
    """The values (by ``id``) that anything but a packed product takes, or such a product as its input or residual."""
    exempt = (*PACKED_ROLES, "norm", "bias")
    taken = {id(v) for graph in _graphs(plan) for v in graph.outputs}
    for node in (n for graph in _graphs(plan) for n in graph.nodes):
        spec: Any = node.params.get("spec")
        is_packed = isinstance(spec, ProductSpec) and spec.format is not None
        roles = spec.operands if is_packed else ("",) * len(node.inputs)
        taken |= {id(v) for v, role in zip(node.inputs, roles, strict=True) if role not in exempt}
    return taken


def _graphs(plan: ServePlan) -> list[Graph]:
    return [plan.graph, *(n.params["region"].body for n in plan.body if n.op == ROW_PROGRAM)]


def _named_weights(plan: ServePlan) -> dict[str, Value]:
    """The values that are too large to be baked into the program, by unique name."""
    values: dict[int, Value] = {}
    for graph in _graphs(plan):
        for value in graph.constants():
            if not value.is_table and (value.name or np.size(value.data) > 1024):
                values.setdefault(id(value), value)
    named: dict[str, Value] = {}
    for i, value in enumerate(values.values()):
        name = value.name or f"constant.{i}"
        named[name if name not in named else f"{name}.{i}"] = value
    return named


def emit(plan: ServePlan, weights: Weights, loop: LayerLoop | None = None) -> StepFunction:
    """The step function of a plan, with its layers in a loop if one is given; it is traced anew for every bucket."""

    def step(
        arrays: Sequence[Operand], pages: Sequence[jax.Array], batch: StepBatch
    ) -> tuple[jax.Array, list[jax.Array]]:
        single: dict[int, Any] = {}
        stacks: dict[int, Any] = {}
        for values, array in zip(weights.values, arrays, strict=True):
            (single if len(values) == 1 else stacks)[id(values[0])] = array
        run = _Body(plan, single, list(pages), batch)
        if loop is None:
            run.run(plan.body)
        else:
            run.run_loop(loop, stacks)
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
        self.layer_offset: int | jax.Array = 0
        self.live: jax.Array | None = batch.starts[-1] if count > 1 else None  # what comes after is padding

    def run_loop(self, loop: LayerLoop, stacks: Mapping[int, jax.Array]) -> None:
        """Evaluates the body with repeated layers in one `jax.lax.scan`; pages are carried and stay in place."""
        self.run(loop.before)

        def layer(state: tuple[list[Any], list[jax.Array]], step: tuple[jax.Array, dict[int, jax.Array]]) -> Any:
            carried, pages = state
            index, weights = step
            inner = _Body(self.plan, self.known, pages, self.batch)
            inner.known.update(weights)
            inner.known.update({id(v): a for (v, _), a in zip(loop.carried, carried, strict=True)})
            inner.layer_offset = index * loop.stride
            inner.run(loop.layer)
            return ([inner[result] for _, result in loop.carried], inner.pages), None

        initial = [self[v] for v, _ in loop.carried]
        numbers = jnp.arange(loop.count, dtype=jnp.int32)
        (final, self.pages), _ = jax.lax.scan(layer, (initial, self.pages), (numbers, dict(stacks)))
        places = {id(v): (j, v.index) for j, n in enumerate(loop.layer) for v in n.outputs}
        for (_, result), array in zip(loop.carried, final, strict=True):
            j, k = places[id(result)]
            self.known[id(loop.last[j].outputs[k])] = array
        self.run(loop.after)

    def apply(self, node: Node) -> list[Any]:
        """Adds the two operations of our own to those of the IR."""
        if node.op == ATTENTION:
            return [self.attention(node)]
        if node.op == ROW_PROGRAM:
            return [self.row_program(node)]
        if node.op == MATMUL:
            return self.matmul(node)
        if node.op == EMBED:
            return [self.embed(node)]
        return super().apply(node)

    def rows(self, value: Value) -> jax.Array:
        """A token value as [T, values of one token]."""
        array = jnp.moveaxis(self[value], value.type.token_dims[0], 0)
        return array.reshape(array.shape[0], -1)

    def of_rows(self, value: Value, rows: jax.Array) -> jax.Array:
        """The token value whose `rows` these are."""
        tokens = rows.reshape(rows.shape[0], *value.type.per_token()).astype(value.type.dtype)
        return jnp.moveaxis(tokens, 0, value.type.token_dims[0])

    def matmul(self, node: Node) -> list[jax.Array]:
        spec: ProductSpec = node.params["spec"]
        if spec.format is None:
            return self.plain_matmul(spec, node)
        operands = dict(zip(spec.operands, node.inputs, strict=True))
        joined = len(spec.columns) > 1 and not spec.gated
        widths = [padded_columns(columns) if joined else columns for columns in spec.columns]
        results = matmul(
            self.rows(operands["x"]),
            self.packed(operands),
            format=spec.format,
            rows=spec.rows,
            columns=sum(widths),
            norm_weight=self[operands["norm"]] if "norm" in operands else None,
            norm_eps=spec.norm_epsilon,
            bias=self[operands["bias"]] if "bias" in operands else None,
            activation=spec.activation,
            gated=spec.gated,
            residual=self.rows(operands["residual"]) if "residual" in operands else None,
            live=self.live,
            parts=spec.columns if joined else (),
        )
        return [self.of_rows(value, rows) for value, rows in zip(node.outputs, results, strict=True)]

    def packed(self, operands: Mapping[str, Value]) -> list[Operand]:
        return [self[operands[role]] for role in PACKED_ROLES if role in operands]

    def plain_matmul(self, spec: ProductSpec, node: Node) -> list[jax.Array]:
        """What `matmul` means, with weights as the model has them: the definition that packing is checked against."""
        arrays = [(role, self[v]) for role, v in zip(spec.operands, node.inputs, strict=True)]
        known, weights = dict(arrays), [a for role, a in arrays if role == "weight"]
        x = self.rows(node.inputs[spec.operands.index("x")]).astype(jnp.float32)
        if spec.norm_epsilon is not None:
            x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + spec.norm_epsilon) * known["norm"]
        results = [x @ weight for weight in weights]
        if "bias" in known:
            starts = np.cumsum((0, *spec.columns))
            results = [r + known["bias"][a:b] for r, a, b in zip(results, starts[:-1], starts[1:], strict=True)]
        if spec.activation is not None:
            activated = ACTIVATIONS[spec.activation](results[0])
            results = [activated * results[1] if spec.gated else activated]
        if "residual" in known:
            results[0] = results[0] + self.rows(node.inputs[spec.operands.index("residual")])
        return [self.of_rows(value, rows) for value, rows in zip(node.outputs, results, strict=True)]

    def embed(self, node: Node) -> jax.Array:
        spec: ProductSpec = node.params["spec"]
        operands = dict(zip(spec.operands, node.inputs, strict=True))
        if spec.format is None:
            return self.of_rows(node.output, self[operands["weight"]].T[self.rows(operands["x"])[:, 0]])
        tokens = self.rows(operands["x"])[:, 0]
        rows = embed_rows(self.packed(operands), tokens, format=spec.format, rows=spec.rows, columns=spec.columns[0])
        return self.of_rows(node.output, rows)

    def write(self, slot: Slot, rows: jax.Array) -> None:
        cache, layer = slot
        self.pages[cache] = write_pages(self.pages[cache], self.layer_offset + layer, self.batch.slots, rows)

    def attention(self, node: Node) -> jax.Array:
        pattern, spec = node.params["pattern"], node.params["spec"]
        query, key, value = (
            arrange(self.rows(v), layout)
            for v, layout in zip(node.inputs[:3], (pattern.query, pattern.key, pattern.value), strict=True)
        )
        rotary = None if spec.rotary is None else (self[node.inputs[3]], self[node.inputs[4]])
        (k, layer), (v, _) = self.plan.slots[id(node)]
        pools = self.pages[k], self.pages[v]
        result, self.pages[k], self.pages[v] = paged_attention(
            spec, query, key, value, *pools, self.layer_offset + layer, self.batch, rotary=rotary
        )
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
                self.write(caches[i], self.rows(value).reshape(-1, *row_shape(self.pages[cache])))
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
                rows_of = context.reshape(length, *per_token).astype(inner.type.dtype)
                known[id(inner)] = jnp.moveaxis(rows_of, 0, inner.type.token_dims[0])
            evaluator = Evaluator(
                {QUERY: 1, KEY: length}, {QUERY: position[None], KEY: jnp.arange(length, dtype=jnp.int32)}, known
            )
            evaluator.run(region.body.nodes)
            output = region.body.outputs[0]
            return jnp.squeeze(evaluator[output], output.type.token_dims[0])

        results = jax.lax.map(one, (self.batch.positions, self.batch.rows, queries), batch_size=_ROW_BLOCK)
        return jnp.moveaxis(results, 0, node.output.type.token_dims[0])


def _tail(plan: ServePlan, body: _Body, batch: StepBatch) -> jax.Array:
    """Logits of the sampled tokens: the rest of the body on them, then what follows the choice of a last one."""
    samples, data = batch.samples, _data_ids(plan)
    known = {i: a for i, a in body.known.items() if not isinstance(a, dict) and i not in data}
    known |= {id(v): jnp.take(body[v], samples, axis=v.type.token_dims[0]) for v in plan.boundary}
    chosen = batch._replace(tokens=batch.tokens[samples], positions=batch.positions[samples])
    tail = _Body(plan, known, body.pages, chosen)
    # Samples stand in front, and where there are as many as requests, there is no more than one of each.
    requests = jnp.sum(batch.contexts > 0, dtype=jnp.int32)
    tail.live = requests if samples.shape == batch.contexts.shape else None
    of_request = [n for n in plan.tail if plan.classes[n.outputs[0]] is Kind.REQUEST]
    tail.run(n for n in plan.tail if plan.classes[n.outputs[0]] is not Kind.REQUEST)
    (output,) = plan.graph.outputs
    logits = _of_last_tokens(plan, tail, of_request) if of_request else tail.rows(output)
    return logits.astype(jnp.float32)


def _of_last_tokens(plan: ServePlan, tail: _Body, nodes: Sequence[Node]) -> jax.Array:
    """What ``nodes`` make of each sampled token by itself: the plain program at length one, as its last token."""
    taken = {id(v): v for n in nodes for v in n.inputs if plan.classes.kinds.get(id(v)) is Kind.TOKEN}
    rows = {i: jnp.moveaxis(tail[v], v.type.token_dims[0], 0) for i, v in taken.items()}
    constants = {i: a for i, a in tail.known.items() if i not in taken}
    (output,) = plan.graph.outputs

    def one(mine: dict[int, jax.Array]) -> jax.Array:
        tokens = {i: jnp.expand_dims(array, taken[i].type.token_dims[0]) for i, array in mine.items()}
        evaluator = Evaluator({TOKENS: 1}, {}, {**constants, **tokens})
        evaluator.run(nodes)
        return jnp.reshape(evaluator[output], (plan.vocab_size,))

    with jax_compat.at_location(output.node.location if output.node is not None else plan.graph.nodes[-1].location):
        return jax.vmap(one)(rows)


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
    if layout.size == rows.shape[1]:
        corner = layout[(0,) * layout.ndim]
        steps = [int(np.take(layout, min(1, n - 1), axis=d).flat[0]) - int(corner) for d, n in enumerate(layout.shape)]
        outer_first = np.argsort([-s if s else -layout.size for s in steps], kind="stable")
        ordered = layout.transpose(outer_first)
        if np.array_equal(ordered.reshape(-1), np.arange(layout.size)):
            back = np.argsort(outer_first)
            return rows.reshape(count, *ordered.shape).transpose(0, *(int(i) + 1 for i in back))
    return jnp.take(rows, layout.reshape(-1), axis=1).reshape(count, *layout.shape)
