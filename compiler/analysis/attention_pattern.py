"""Reading a region as attention: scale, softcap, biases, heads and layouts, by what operations do, not how they look.

From the region's end the walk goes up through the weighted sum over keys, the softmax (in any of its spellings) and
the modifiers of the scores, down to the product of queries and keys. Reshapes, transposes, repeats and casts are
followed by *evaluating* them on element numbers, so every layout of heads is read right or not at all. A region that
does not fit is left as a row program: slower, never wrong.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from distaff.compiler.analysis.dims import REDUCTIONS, STRUCTURAL
from distaff.compiler.ir import Graph, Node, Sym, Value
from distaff.compiler.ir.evaluate import Evaluator
from distaff.compiler.ir.graph import ancestors
from distaff.compiler.ir.types import KEY, QUERY

_ONE = {QUERY: 1, KEY: 1}
_HIDDEN = -1e8


class NoMatch(Exception):
    """The region is not attention as kernels know it; the text says which part does not fit, ``node`` where."""

    def __init__(self, reason: str, node: Node | None = None) -> None:
        super().__init__(reason)
        self.node = node


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionPattern:
    """What a kernel needs to know of a region with H query heads, KV cached heads, key size D and value size Dv.

    The layouts hold flat element numbers: ``query[h, d]`` of the query leaf's values of one token, ``key[n, d]`` and
    ``value[n, e]`` of the cached leaves', and ``output`` (the root's per-token shape) of a kernel result [H, Dv].
    ``hides`` are boolean body values (with the sense in which they hide) and ``biases`` additive ones, all functions
    of positions alone.
    """

    query_leaf: int
    key_leaf: int
    value_leaf: int
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    output: np.ndarray
    scale: float
    softcap: float | None
    hides: tuple[tuple[Value, bool], ...]
    biases: tuple[tuple[Value, float], ...]
    heads_of_scores: np.ndarray


def match_attention(body: Graph) -> AttentionPattern:
    """Reads the body of a region as attention; raises `NoMatch` with the reason if it is something else."""
    return _Matcher(body).match()


@dataclasses.dataclass
class _Scores:
    """The chain of modifiers between the softmax and the product of queries and keys, outermost first."""

    product: Node
    modifiers: list[tuple[str, Any]]


class _Matcher:
    def __init__(self, body: Graph) -> None:
        self.body = body
        self.leaf_index = {id(v): i for i, v in enumerate(body.inputs)}
        self.data: set[int] = set(self.leaf_index)
        for node in body.nodes:
            if any(id(v) in self.data for v in node.inputs):
                self.data.update(id(v) for v in node.outputs)

    def match(self) -> AttentionPattern:
        root = self.body.outputs[0]
        weighted, weights, values, denominator = self.weighted_sum(root)
        exponentials = self.exponentials(weights, denominator)
        scores = self.scores(self.need(exponentials).inputs[0])
        return self.layouts(root, weighted, weights, values, exponentials, denominator, scores)

    # -- the softmax, from the end upwards

    def weighted_sum(self, root: Value) -> tuple[Node, Value, Value, Value | None]:
        """The product of weights and values, its operands, and a denominator that is applied after it."""
        core = self.core(root)
        denominator = None
        node = self.need(core)
        if node.op == "div":
            denominator = node.inputs[1]
            node = self.need(self.core(node.inputs[0]))
        if node.op != "dot_general":
            raise NoMatch(f"ends in {node.op} where the weighted sum over keys was expected", node)
        pairs = [v for v in node.inputs if len(v.type.token_dims) == 2]
        singles = [v for v in node.inputs if len(v.type.token_dims) == 1]
        if len(pairs) != 1 or len(singles) != 1:
            raise NoMatch("does not multiply a [query, key] matrix with values of keys", node)
        (left, _), _ = node.params["dimension_numbers"]
        if len(left) != 1:
            raise NoMatch("sums over more than the keys", node)
        return node, pairs[0], singles[0], denominator

    def exponentials(self, weights: Value, denominator: Value | None) -> Value:
        """The value ``exp(scores - shift)`` of which weights are the normalised form; checks the row sum."""
        core = self.core(weights)
        if denominator is None:
            node = self.need(core)
            if node.op != "div":
                raise NoMatch(f"weights come from {node.op} and are not normalised by a row sum (no softmax)", node)
            core, denominator = self.core(node.inputs[0]), node.inputs[1]
        node = self.need(core)
        if node.op != "exp":
            raise NoMatch(f"weights come from {node.op}, not from an exponential", node)
        total = self.need(self.core(denominator))
        if total.op != "reduce_sum" or self.core(total.inputs[0]) is not core:
            raise NoMatch("the denominator is not the row sum of the same exponentials", total)
        if tuple(total.params["axes"]) != self.key_dims(total.inputs[0]):
            raise NoMatch("the row sum runs over more than the keys", total)
        return core

    def key_dims(self, value: Value) -> tuple[int, ...]:
        return tuple(i for i, d in enumerate(value.type.shape) if isinstance(d, Sym) and d.axis == KEY)

    # -- modifiers of the scores

    def scores(self, argument: Value) -> _Scores:
        node = self.need(self.core(argument))
        if node.op == "sub" and len(self.core(node.inputs[1]).type.token_dims) == 1:
            argument = node.inputs[0]  # softmax does not change under a shift of the whole row
        modifiers: list[tuple[str, Any]] = []
        value = argument
        while True:
            node = self.need(self.core(value))
            if node.op == "dot_general":
                return _Scores(node, modifiers)
            value = self.modifier(node, modifiers)

    def modifier(self, node: Node, modifiers: list[tuple[str, Any]]) -> Value:
        """Records one modifier and returns the scores that it is applied to."""
        if node.op == "tanh":
            modifiers.append(("tanh", node))
            return node.inputs[0]
        data = [v for v in node.inputs if id(v) in self.data]
        others = [v for v in node.inputs if id(v) not in self.data]
        if len(data) != 1:
            raise NoMatch(f"{node.op} makes the mask or bias from token data", node)
        if node.op in ("mul", "div"):
            constant = self.scalar(others[0], node)
            if node.op == "div" and node.inputs[0] is others[0]:
                raise NoMatch("divides by the scores", node)
            modifiers.append(("mul", constant if node.op == "mul" else 1.0 / constant))
        elif node.op == "select_n":
            self.hide(node, data[0], modifiers)
        elif node.op in ("add", "sub"):
            if node.op == "sub" and node.inputs[1] is data[0]:
                raise NoMatch("subtracts the scores from a bias", node)
            modifiers.append(("add", (others[0], 1.0 if node.op == "add" else -1.0)))
        else:
            raise NoMatch(f"applies {node.op} to the scores", node)
        return data[0]

    def hide(self, node: Node, kept: Value, modifiers: list[tuple[str, Any]]) -> None:
        predicate, first, second = node.inputs
        other = second if first is kept else first
        if self.scalar(other, node) > _HIDDEN:
            raise NoMatch("replaces scores by a constant that does not hide them", node)
        modifiers.append(("hide", (predicate, other is second)))

    def scalar(self, value: Value, node: Node) -> float:
        """The number that a value without token data is everywhere."""
        array = self.constant(value)
        if array is None or array.size == 0 or not np.all(array == array.flat[0]):
            raise NoMatch(f"{node.op} with something that is not one number", node)
        return float(array.flat[0])

    def constant(self, value: Value) -> np.ndarray | None:
        """A value that depends on no position and no token, as an array at sizes of one."""
        nodes = set(map(id, ancestors([value])))
        used = [n for n in self.body.nodes if id(n) in nodes]
        if any(n.op == "iota" and n.outputs[0].type.token_dims for n in used):
            return None
        if any(v.is_table or (v.data is not None and np.size(v.data) > 65536) for n in used for v in n.inputs):
            return None
        if value.is_table or id(value) in self.data:
            return None
        evaluator = Evaluator(_ONE, {}, {})
        evaluator.run(used)
        return np.asarray(evaluator[value], np.float64)

    # -- layouts, by evaluating reshapes and repeats on element numbers

    def core(self, value: Value) -> Value:
        """The value without the reshapes, transposes, repeats and float casts that were applied to it."""
        while value.node is not None and self.is_structural(value.node) and id(value) in self.data:
            value = value.node.inputs[1 if value.node.op == "max" else 0]
        return value

    def is_structural(self, node: Node) -> bool:
        return node.op in STRUCTURAL or node.op == "convert_element_type" or _is_floor_of_max(node)

    def need(self, value: Value) -> Node:
        if value.node is None:
            raise NoMatch("token data is used where attention would compute something")
        return value.node

    def follow(self, target: Value, source: Value, numbers: np.ndarray) -> np.ndarray:
        """Element numbers of ``source`` (given at sizes of one) carried to ``target`` through the operations between.

        Operations that are not structural act element by element here and keep the numbers.
        """
        if target is source:
            return numbers
        node = self.need(target)
        through = [v for v in node.inputs if id(v) in self.data and self.depends(v, source)]
        if not through:
            raise NoMatch("the scores reach the result in more than one way", node)
        inner = self.follow(through[0], source, numbers)
        shape = target.type.at(_ONE)
        if node.op in REDUCTIONS:
            return inner.reshape(shape)
        if node.op in STRUCTURAL:
            evaluator = Evaluator(_ONE, {}, {id(through[0]): inner})
            return np.asarray(evaluator.apply(node)[0])
        return np.broadcast_to(inner, shape)

    def depends(self, value: Value, source: Value) -> bool:
        return (
            value is source
            or any(source.node is n for n in ancestors([value]) if source.node is not None)
            or (source.node is None and any(source is v for n in ancestors([value]) for v in n.inputs))
        )

    def leaf_layout(self, operand: Value, node: Node) -> tuple[int, np.ndarray]:
        """The leaf that an operand is only a rearrangement of, and its element numbers in the operand's shape."""
        leaf = self.core(operand)
        if id(leaf) not in self.leaf_index:
            raise NoMatch("queries, keys or values are computed inside the region (as in a latent cache)", node)
        shape = leaf.type.at(_ONE)
        numbers = np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape)
        return self.leaf_index[id(leaf)], self.follow(operand, leaf, numbers)

    def layouts(
        self, root: Value, weighted: Node, weights: Value, values: Value, exponentials: Value,
        denominator: Value | None, scores: _Scores,
    ) -> AttentionPattern:  # fmt: skip
        product = scores.product
        query_leaf, query, key_leaf, key = self.score_operands(product)
        kind = product.output.type
        score_shape = kind.at(_ONE)
        heads = np.arange(int(np.prod(score_shape)), dtype=np.int32).reshape(score_shape)
        weight_heads = self.follow(weights, product.output, heads)
        value_leaf, value_numbers = self.leaf_layout(values, weighted)
        value, output = self.value_operands(weighted, weights, weight_heads, value_numbers, len(query))
        carried = self.follow(root, weighted.output, output)
        if denominator is not None:
            division = self.need(self.core(root))
            numerator = self.follow(division.inputs[0], weighted.output, output) // value.shape[1]
            below = np.broadcast_to(self.follow(denominator, product.output, heads), numerator.shape)
            if not np.array_equal(numerator, below):
                raise NoMatch("divides one head's output by another head's row sum", division)
        scale, softcap, hides, biases = _fold(scores.modifiers)
        per_token = np.asarray(carried).reshape(root.type.per_token())
        return _group(
            AttentionPattern(
                query_leaf, key_leaf, value_leaf, query, key, value, per_token, scale, softcap, hides, biases, heads
            )
        )

    def score_operands(self, node: Node) -> tuple[int, np.ndarray, int, np.ndarray]:
        """Leaf and layout [H, D] of queries and keys, in the order of heads of the product's result."""
        contract, batch = node.params["dimension_numbers"]
        found: dict[str, tuple[int, np.ndarray]] = {}
        sides = []
        for operand, c, b in zip(node.inputs, contract, batch, strict=True):
            if len(operand.type.token_dims) != 1 or operand.type.token_dims[0] in c:
                raise NoMatch("scores are not one product of queries and keys", node)
            index, numbers = self.leaf_layout(operand, node)
            free = [i for i in range(operand.type.rank) if i not in c and i not in b]
            ordered = numbers.transpose(*b, *free, *c)
            nb, nf = len(b), len(free)
            sizes = ordered.shape
            sides.append((index, ordered.reshape(_prod(sizes[:nb]), _prod(sizes[nb : nb + nf]), -1), operand))
        (li, left, lv), (ri, right, _) = sides
        shape = (left.shape[0], left.shape[1], right.shape[1], left.shape[2])
        tables = (np.broadcast_to(left[:, :, None], shape), np.broadcast_to(right[:, None], shape))
        axis = _axis(lv)
        flat = [t.reshape(-1, shape[-1]) for t in tables]
        found[axis] = (li, flat[0])
        found[KEY if axis == QUERY else QUERY] = (ri, flat[1])
        return (*found[QUERY], *found[KEY])

    def value_operands(
        self, node: Node, weights: Value, weight_heads: np.ndarray, numbers: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Layout [H, Dv] of the values and, in the product's shape, which of [H, Dv] each result element is."""
        (lc, rc), (lb, rb) = node.params["dimension_numbers"]
        first = node.inputs[0] is weights
        wc, vc, wb, vb = (lc, rc, lb, rb) if first else (rc, lc, rb, lb)
        free_w = [i for i in range(weight_heads.ndim) if i not in wb and i not in wc]
        free_v = [i for i in range(numbers.ndim) if i not in vb and i not in vc]
        w = weight_heads.transpose(*wb, *free_w, *wc)
        v = numbers.transpose(*vb, *free_v, *vc)
        batch_shape, wf, vf = w.shape[: len(wb)], w.shape[len(wb) : -1], v.shape[len(vb) : -1]
        w2, v2 = w.reshape(_prod(batch_shape), -1), v.reshape(_prod(batch_shape), -1)
        table = np.full((count, v2.shape[1]), -1, np.int32)
        for b in range(w2.shape[0]):
            for head in w2[b]:
                table[head] = v2[b]
        if sorted(w2.reshape(-1)) != list(range(count)):
            raise NoMatch("heads are mixed or repeated between scores and values", node)
        elements = w2[:, :, None] * v2.shape[1] + np.arange(v2.shape[1], dtype=np.int32)
        if first:
            return table, elements.reshape(*batch_shape, *wf, *vf)
        return table, elements.transpose(0, 2, 1).reshape(*batch_shape, *vf, *wf)


def _is_floor_of_max(node: Node) -> bool:
    """``max(-inf, x)``, which softmax puts around its row maximum."""
    return node.op == "max" and node.inputs[0].data is not None and bool(np.all(np.isneginf(node.inputs[0].data)))


def _prod(sizes: tuple[int, ...]) -> int:
    return int(np.prod(sizes, dtype=np.int64))


def _axis(value: Value) -> str:
    dim = value.type.shape[value.type.token_dims[0]]
    assert isinstance(dim, Sym)
    return dim.axis


def _fold(
    modifiers: list[tuple[str, Any]],
) -> tuple[float, float | None, tuple[tuple[Value, bool], ...], tuple[tuple[Value, float], ...]]:
    """Folds the modifiers, innermost first, into scale, softcap, masks and biases (with their factors)."""
    factor, cap = 1.0, None
    hides: list[tuple[Value, bool]] = []
    biases: list[tuple[Value, float]] = []
    for name, what in reversed(modifiers):
        if name == "mul":
            if what <= 0:
                raise NoMatch("multiplies the scores by a number that is not positive")
            if cap is None:
                factor *= what
            else:
                cap *= what
            biases = [(v, f * what) for v, f in biases]
        elif name == "tanh":
            if cap is not None or biases or hides:
                raise NoMatch("applies tanh to scores that were capped, biased or masked before", what)
            cap = 1.0
        elif name == "hide":
            hides.append(what)
        else:
            biases.append(what)
    return (factor if cap is None else factor * cap), cap, tuple(hides), tuple(biases)


def _group(pattern: AttentionPattern) -> AttentionPattern:
    """Caches repeated heads once and orders query heads so that head h reads cached head h // (H / KV)."""
    keys = np.concatenate([pattern.key, pattern.value + pattern.key.max() + 1], axis=1)
    rows, first, group = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    group = group.reshape(-1)
    counts = np.bincount(group, minlength=len(rows))
    if len(set(counts.tolist())) > 1:
        raise NoMatch("cached heads serve different numbers of query heads")
    order = np.argsort(group, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    size = pattern.value.shape[1]
    output = place[pattern.output // size] * size + pattern.output % size
    return dataclasses.replace(
        pattern,
        query=pattern.query[order],
        key=pattern.key[first],
        value=pattern.value[first],
        output=output.astype(np.int32),
        heads_of_scores=order.astype(np.int32),
    )
