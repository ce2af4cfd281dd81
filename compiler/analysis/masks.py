"""The causality prover: which keys each query can see, over the whole grid of positions up to the longest length.

The body of an attention region looks at other tokens only where it reduces or contracts the key axis. There, each
(query, key) entry must be *dead* for every key after the query: below everything visible under a maximum, exactly 0
under a sum or product. Interval analysis decides this for blocks of the grid; undecided blocks are split. The same
evaluation finds what is visible before the query.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from distaff.compiler.analysis import intervals
from distaff.compiler.analysis.blocks import Blocks, Bools, Floats
from distaff.compiler.analysis.dims import TOUCHED, dim_map
from distaff.compiler.analysis.interval_arithmetic import BOUND
from distaff.compiler.analysis.intervals import Interval
from distaff.compiler.analysis.position_tables import PositionTable
from distaff.compiler.errors import NotCausalError
from distaff.compiler.ir import Graph, Node, Sym, Value
from distaff.compiler.ir.types import KEY, QUERY

_BUDGET = 4_000_000  # blocks evaluated before giving up
_BATCH = 32_768
_FEW = 64  # undecided blocks up to which only the distance is split; rows without a visible key tried one by one
_WEAK_MASK = -1e3  # constants between this and -BOUND look like masks that are too weak to be proved

# How an entry must be to take no part in a reduction over keys.
_BELOW, _ABOVE, _ZERO, _ONE = "below", "above", "zero", "one"
_NEUTRAL = {
    "reduce_max": _BELOW,
    "argmax": _BELOW,
    "reduce_min": _ABOVE,
    "argmin": _ABOVE,
    "reduce_sum": _ZERO,
    "dot_general": _ZERO,
    "reduce_or": _ZERO,
    "reduce_xor": _ZERO,
    "reduce_prod": _ONE,
    "reduce_and": _ONE,
}


@dataclasses.dataclass(frozen=True)
class Visibility:
    """Which keys can contribute to a query.

    ``kind`` is 'causal' (exactly all up to the query's own position), 'window' (exactly the last ``window``, its own
    included) or 'custom' (some of those up to its own). ``data_dependent`` tells that a mask computed from token data
    can hide more of them; ``blocks`` how many blocks of the grid were evaluated.
    """

    kind: str
    window: int | None
    data_dependent: bool
    blocks: int


def prove_causal(body: Graph, max_len: int) -> Visibility:
    """Proves that no query position below ``max_len`` depends on a later key, and finds the keys that it can see.

    ``body`` is a region's graph, its token dimensions bound to the axes 'q' and 'k', its inputs token data. Assumes
    that ordinary scores stay within ``+-BOUND``. Raises `NotCausalError` with an example if a later key is visible or
    if this cannot be excluded.
    """
    search = _Search(_Body(body), max_len)
    if not search.body.looks:
        return Visibility("custom", None, False, 0)
    search.prove_future_dead()
    search.require_visible_keys()
    kind, window = search.classify_past()
    return Visibility(kind, window, search.body.data_dependent, search.evaluated)


@dataclasses.dataclass(frozen=True)
class _Look:
    """The entries of one reduction over keys, for a batch of blocks; each array is ``[blocks]``.

    ``dead``: none of them takes part; ``live``: each of them can; ``visible``: each does, whatever the data;
    ``finite``: dead, but not infinitely far below the visible ones.
    """

    dead: Bools
    live: Bools
    visible: Bools
    finite: Bools


class _Body:
    """A region's body, prepared for evaluation: the nodes up to its reductions over keys."""

    def __init__(self, graph: Graph) -> None:
        self.looks: list[Node] = []
        for node in graph.nodes:
            axes = _touched(node)
            if QUERY in axes:
                raise NotCausalError(
                    node.op, node.location, "it runs over the query axis, so that queries see each other",
                    "normalise and sum scores over keys (axis=-1 of [..., query, key]), for each query by itself",
                )  # fmt: skip
            if KEY in axes and node.op not in _NEUTRAL:
                raise NotCausalError(
                    node.op, node.location, "it combines keys in a way for which causality cannot be proved",
                    "use masked maxima, sums and products over keys",
                )  # fmt: skip
            if KEY in axes:
                self.looks.append(node)
        needed = {id(v) for look in self.looks for v in look.inputs}
        self.nodes: list[Node] = []
        for node in reversed(graph.nodes):
            if any(id(v) in needed for v in node.outputs) or node in self.looks:
                self.nodes.append(node)
                needed.update(id(v) for v in node.inputs)
        self.nodes.reverse()
        self.slices = {id(n): t for n in self.nodes if n.op == "slice" and (t := intervals.token_slice(n)) is not None}
        values = [v for n in self.nodes if id(n) not in self.slices for v in n.inputs]
        self.constants = {id(v): intervals.constant(v) for v in values if v.data is not None}
        self.inputs = {id(v): intervals.ordinary_data(v.type.dtype) for v in graph.inputs}
        self.data_dependent = self._masked_by_data(graph.inputs)

    def _masked_by_data(self, inputs: Sequence[Value]) -> bool:
        """Whether a boolean over keys depends on token data."""
        data = {id(v) for v in inputs}
        values = list(inputs)
        for node in self.nodes:
            if any(id(v) in data for v in node.inputs):
                data.update(id(v) for v in node.outputs)
                values.extend(node.outputs)
        return any(v.type.dtype == np.bool_ and KEY in _axes(v) for v in values)

    def evaluate(self, blocks: Blocks) -> list[_Look]:
        """What each reduction over keys looks at, in the order of ``looks``."""
        env: dict[int, Interval] = dict(self.inputs)
        for key, constant in self.constants.items():
            env[key] = intervals.from_table(constant, blocks) if isinstance(constant, PositionTable) else constant
        looks = []
        for node in self.nodes:
            if id(node) in self.slices:
                env[id(node.output)] = intervals.from_table(self.slices[id(node)], blocks)
                continue
            args = [env[id(v)] for v in node.inputs]
            if node in self.looks:
                entries = intervals.contract(node, args, blocks) if node.op == "dot_general" else args[0].plain(blocks)
                looks.append(_look(_NEUTRAL[node.op], entries, len(blocks)))
                results = [intervals.ordinary_data(v.type.dtype) for v in node.outputs]
            else:
                results = intervals.transfer(node, args, blocks)
            env.update((id(v), r) for v, r in zip(node.outputs, results, strict=True))
        return looks

    def short_tables(self, length: int) -> list[int]:
        """Lengths of captured tables that end before ``length``."""
        tables = [c for c in (*self.constants.values(), *self.slices.values()) if isinstance(c, PositionTable)]
        return [n for t in tables for n in t.sizes.values() if n < length]

    def weak_mask(self) -> float | None:
        """A constant that looks like a mask value but is too close to ordinary scores."""
        lows = [float(c.lo[0]) for c in self.constants.values() if isinstance(c, Interval) and not c.data]
        return min((x for x in lows if -BOUND <= x <= _WEAK_MASK), default=None)


def _look(neutral: str, entries: Interval, count: int) -> _Look:
    low, high = entries.lo, entries.hi
    if neutral == _BELOW:
        dead, visible = high < -BOUND, low >= -BOUND
        finite = high > -np.inf
    elif neutral == _ABOVE:
        dead, visible = low > BOUND, high <= BOUND
        finite = low < np.inf
    else:
        value = 0.0 if neutral == _ZERO else 1.0
        dead, visible = (low == value) & (high == value), (low > value) | (high < value)
        finite = np.zeros(1, np.bool_)  # sums need no visible key
    live = entries.live if entries.data else visible
    return _Look(*(np.broadcast_to(x, count) for x in (dead, live & ~dead, visible, finite & dead)))


def _touched(node: Node) -> set[str]:
    """Axes along which the node mixes values; an operation that is not known mixes all."""
    maps = dim_map(node)
    axes = set()
    for i, value in enumerate(node.inputs):
        for d, dim in enumerate(value.type.shape):
            if isinstance(dim, Sym) and (maps is None or maps[i][d] == TOUCHED):
                axes.add(dim.axis)
    return axes


def _axes(value: Value) -> set[str]:
    return {d.axis for d in value.type.shape if isinstance(d, Sym)}


class _Search:
    """Refinement of the grid until every block is decided."""

    def __init__(self, body: _Body, length: int) -> None:
        self.body = body
        self.length = length
        self.evaluated = 0
        self.finite = [False] * len(body.looks)

    def evaluate(self, blocks: Blocks) -> list[_Look]:
        """As `_Body.evaluate`, in batches and counted."""
        self.evaluated += len(blocks)
        if len(blocks) <= _BATCH:
            return self.body.evaluate(blocks)
        parts = [self.body.evaluate(blocks[i : i + _BATCH]) for i in range(0, len(blocks), _BATCH)]
        fields = [f.name for f in dataclasses.fields(_Look)]
        return [
            _Look(*(np.concatenate([getattr(p[i], f) for p in parts]) for f in fields))
            for i in range(len(self.body.looks))
        ]

    def refine(self, blocks: Blocks, undecided: Bools) -> Blocks:
        """The parts of the undecided blocks. Few are split by distance alone, on which most masks depend."""
        return blocks[undecided].split(distances_only=int(undecided.sum()) <= _FEW)

    def prove_future_dead(self) -> None:
        """Every key after the query must be dead in every reduction."""
        last = self.length - 1
        for blocks in (self.samples(-1), Blocks([0], [last], [-last], [-1], self.length)):
            while len(blocks):
                looks = self.evaluate(blocks)
                for node, look in zip(self.body.looks, looks, strict=True):
                    if look.live.any():
                        self.refuse_later_key(node, blocks[look.live], decided=True)
                for node, look in zip(self.body.looks, looks, strict=True):
                    if (stuck := ~look.dead & blocks.is_cell).any():
                        self.refuse_later_key(node, blocks[stuck], decided=False)
                self.finite = [f or bool(look.finite.any()) for f, look in zip(self.finite, looks, strict=True)]
                undecided = ~np.logical_and.reduce([look.dead for look in looks])
                if self.evaluated > _BUDGET:
                    self.refuse_effort(blocks[undecided], looks)
                blocks = self.refine(blocks, undecided)

    def classify_past(self) -> tuple[str, int | None]:
        """Finds whether the visible keys are all those in a window, or all."""
        nearest_hidden, farthest_visible = float(self.length), -1.0
        last = self.length - 1
        for blocks in (self.samples(1), Blocks([0], [last], [0], [last], self.length)):
            while len(blocks):
                looks = self.evaluate(blocks)
                dead = np.logical_and.reduce([look.dead for look in looks])
                live = np.logical_and.reduce([look.live for look in looks])
                nearest_hidden = np.min(blocks.d0[dead], initial=nearest_hidden)
                farthest_visible = np.max(blocks.d1[live], initial=farthest_visible)
                undecided = ~dead & ~live
                stuck = (undecided & blocks.is_cell).any() or self.evaluated > _BUDGET
                if stuck or farthest_visible >= nearest_hidden:
                    return "custom", None
                blocks = self.refine(blocks, undecided)
        if nearest_hidden == self.length:
            return "causal", None
        return ("window", int(nearest_hidden)) if nearest_hidden else ("custom", None)

    def samples(self, sign: int) -> Blocks:
        """Cells near the corners and at powers of two, of distances with ``sign``: where most faults show at once."""
        powers = 2 ** np.arange(self.length.bit_length())
        marks = np.unique(np.concatenate([np.arange(16), powers - 1, powers, powers + 1]))
        rows = np.unique(np.concatenate([marks, self.length - 1 - marks, [self.length // 2, self.length // 3]]))
        distances = sign * marks[marks > 0] if sign < 0 else marks
        q, d = (x.ravel() for x in np.meshgrid(rows[(rows >= 0) & (rows < self.length)], distances))
        return Blocks(q, q, d, d, self.length)

    def require_visible_keys(self) -> None:
        """A maximum over finitely masked keys needs a visible key in each row.

        Without one, the row attends to all keys alike, also to later ones. Masked with infinities it is NaN instead.
        """
        for i, node in enumerate(self.body.looks):
            if self.finite[i] and (row := self.row_without_key(i)) is not None:
                raise NotCausalError(
                    node.op, node.location,
                    f"no key is certain to be visible to query position {row}, and masked scores are finite: a row "
                    "whose keys are all masked attends to all of them alike, later keys included",
                    "mask with -jnp.inf, or keep the diagonal visible (mask | (query == key))",
                )  # fmt: skip

    def row_without_key(self, look: int) -> int | None:
        """A query position for which no key is definitely visible, or none can be found with reasonable effort."""
        first = np.zeros(1)
        if not self.visible(look, first, first)[0]:
            return 0
        rows = self.rows_hidden_on_diagonal(look)
        for distance in (*range(1, 16), *(2 ** np.arange(4, self.length.bit_length())).tolist()):
            rows = rows[~self.visible(look, rows, rows - distance)]
            rows = rows[~self.visible(look, rows, np.full(len(rows), distance - 1.0))]
        for row in rows[:_FEW]:
            keys = np.arange(row + 1)
            if not self.visible(look, np.full(len(keys), row), keys).any():
                return int(row)
        return int(rows[_FEW]) if len(rows) > _FEW else None

    def rows_hidden_on_diagonal(self, look: int) -> Floats:
        """Query positions to which their own key is not definitely visible."""
        blocks = Blocks([0], [self.length - 1], [0], [0], self.length)
        rows = []
        while len(blocks):
            visible = self.evaluate(blocks)[look].visible
            rows.append(blocks.q0[~visible & blocks.is_cell])
            blocks = blocks[~visible & ~blocks.is_cell].split()
        return np.concatenate(rows)

    def visible(self, look: int, q: Floats, k: Floats) -> Bools:
        """Whether the cells are definitely visible in a reduction; those outside the past are not."""
        inside = (k >= 0) & (k <= q)
        result = np.zeros(len(q), np.bool_)
        result[inside] = self.evaluate(Blocks.cells(q[inside], k[inside], self.length))[look].visible
        return result

    def refuse_later_key(self, node: Node, blocks: Blocks, *, decided: bool) -> NoReturn:
        """Raises with the example among ``blocks`` of the first query."""
        query, key = blocks.nearest(int(np.argmin(blocks.q0)))
        what = "can see" if decided else "cannot be shown not to see"
        reason = f"query position {query} {what} key position {key}, which comes after it"
        fix = (
            "mask the scores before they are reduced over keys, for example jnp.where(key <= query, scores, -jnp.inf) "
            "with positions from jnp.arange"
        )
        if (weak := self.body.weak_mask()) is not None:
            reason += f"; the constant {weak:g} is too close to ordinary scores to hide any"
            fix = "mask with -jnp.inf or jnp.finfo(scores.dtype).min, on float32 scores"
        if short := self.body.short_tables(self.length):
            reason += f"; a captured table of {min(short)} positions does not say what holds up to {self.length}"
            fix = "compute masks from jnp.arange(tokens.shape[1]) inside the model, or lower max_model_len"
        raise NotCausalError(node.op, node.location, reason, fix)

    def refuse_effort(self, blocks: Blocks, looks: Sequence[_Look]) -> NoReturn:
        query, key = blocks.nearest(0)
        node = next(n for n, look in zip(self.body.looks, looks, strict=True) if not look.dead.all())
        raise NotCausalError(
            node.op, node.location,
            f"the mask could not be proved for all {self.length} positions after {self.evaluated} steps (undecided "
            f"around query {query} and key {key})",
            "lower max_model_len, or write the mask as comparisons of query and key positions",
        )  # fmt: skip
