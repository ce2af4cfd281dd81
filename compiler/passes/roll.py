"""Rolling repeated layers into a loop.

Layers that a model runs one after the other are found again in the flat program: a run of nodes that repeats with the
same operations, where each repetition takes its weights, what the one before made, and what does not change. The loop
compiles once instead of once a layer, which is what keeps XLA's compile time flat on accelerators.

On CPUs it costs more than it saves: XLA:CPU copies each layer's slice of the stacked weights before it multiplies by
it (about 1.5 times the time for one token, ``tools/bench_layer_loop.py``), so programs for CPUs stay flat.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from distaff.compiler.analysis.tokens import DATA
from distaff.compiler.ir import ATTENTION, EMBED, MATMUL, Node, Value
from distaff.compiler.ir.hashing import parameters_key
from distaff.compiler.passes.serve import ServePlan


@dataclasses.dataclass(frozen=True)
class LayerLoop:
    """``count`` repetitions of the ``layer`` nodes.

    ``before`` and ``after`` run outside. ``carried`` pairs the value that the first repetition takes with the layer's
    result that replaces it; ``stacked`` gives for each weight of the layer those of all repetitions, and
    ``stride`` by how many cache layers a repetition moves on.
    """

    before: tuple[Node, ...]
    layer: tuple[Node, ...]
    after: tuple[Node, ...]
    count: int
    carried: tuple[tuple[Value, Value], ...]
    stacked: tuple[tuple[Value, ...], ...]
    stride: int
    last: tuple[Node, ...]


def find_layer_loop(plan: ServePlan) -> LayerLoop | None:
    """The loop over layers of the plan's body, or None if nothing repeats at least three times."""
    fixed = [n for n in plan.body if plan.classes[n.outputs[0]] not in DATA]
    nodes = [n for n in plan.body if plan.classes[n.outputs[0]] in DATA]
    keys = [_signature(n) for n in nodes]
    places = [i for i, n in enumerate(nodes) if n.op == ATTENTION]
    best: LayerLoop | None = None
    for group in range(1, len(places) // 3 + 1):
        period = places[group] - places[0]
        for start in range(max(0, places[0] - period + 1), places[0] + 1):
            count = _repetitions(keys, start, period)
            if count >= 3 and (best is None or count * period > best.count * len(best.layer)):
                best = _wire(plan, fixed, nodes, start, period, count, group) or best
        if best is not None:
            return best
    return None


def _signature(node: Node) -> tuple[Any, ...]:
    types = tuple(str(v.type) for v in (*node.inputs, *node.outputs))
    if node.op == ATTENTION:
        return (node.op, id(node.params["spec"]), id(node.params["pattern"]), types)
    if node.op in (MATMUL, EMBED):
        return (node.op, node.params["spec"], types)
    if node.primitive is None:
        return (id(node),)
    return (node.op, parameters_key(node.params), types)


def _repetitions(keys: list[Any], start: int, period: int) -> int:
    count = 1
    while keys[start : start + period] == keys[start + count * period : start + (count + 1) * period]:
        count += 1
    return count


def _wire(
    plan: ServePlan, fixed: list[Node], nodes: list[Node], start: int, period: int, count: int, group: int
) -> LayerLoop | None:
    """The loop if every operand is internal, carried, unchanging or a weight of its own, and only carries leave it."""
    layers = [nodes[start + i * period : start + (i + 1) * period] for i in range(count)]
    made = [{id(v): (j, v.index) for j, n in enumerate(layer) for v in n.outputs} for layer in layers]
    carried: dict[tuple[int, int], Value] = {}
    stacked: dict[int, tuple[Value, ...]] = {}
    for j in range(period):
        for operands in zip(*(layer[j].inputs for layer in layers), strict=True):
            here = [m.get(id(v)) for m, v in zip(made, operands, strict=True)]
            if here[0] is not None and all(h == here[0] for h in here):
                continue
            previous = {m.get(id(v)) for m, v in zip(made[:-1], operands[1:], strict=True)}
            if len(previous) == 1 and None not in previous and here[0] is None:
                (place,) = previous
                assert place is not None
                if carried.setdefault(place, operands[0]) is not operands[0]:
                    return None
            elif all(v is operands[0] for v in operands):
                continue
            elif all(v.is_constant for v in operands):
                if stacked.setdefault(id(operands[0]), operands) != operands:
                    return None
            else:
                return None
    after = nodes[start + count * period :]
    outside = {id(v) for n in (*after, *plan.tail) for v in n.inputs} | {id(v) for v in plan.graph.outputs}
    for i, layer_made in enumerate(made):
        leaving = {place for v, place in layer_made.items() if v in outside}
        if leaving - (set(carried) if i == count - 1 else set()):
            return None
    return LayerLoop(
        before=(*fixed, *nodes[:start]),
        layer=tuple(layers[0]),
        after=tuple(after),
        count=count,
        carried=tuple((initial, layers[0][j].outputs[k]) for (j, k), initial in carried.items()),
        stacked=tuple(stacked.values()),
        stride=group,
        last=tuple(layers[-1]),
    )
