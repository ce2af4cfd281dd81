"""Value classes: what each value of a plain model is to a single token.

The model is read at batch 1. Every value is one of

* ``CONSTANT``: weights and numbers; no token axis,
* ``INDEX``: a function of positions only (arange, rope tables, masks); evaluated later at the positions wanted,
* ``TOKEN``: data with exactly one token axis,
* ``PAIR``: data with a query and a key axis (attention scores and probabilities),
* ``OPEN``: data that has lost its key axis but still belongs to the attention it came from (row maximum and sum, an
  output that is yet to be divided),
* ``REQUEST``: data of the last token alone, after ``x[:, -1]``.

Anything else would let tokens see each other outside attention and is refused with the user's line.
"""

from __future__ import annotations

import dataclasses
import enum

from distaff.compiler.analysis.dims import ELEMENTWISE, REDUCTIONS, STRUCTURAL, TOUCHED, DimMap, dim_map
from distaff.compiler.errors import MixesTokensError, UnsupportedOperationError
from distaff.compiler.ir import Graph, Node, Sym, Value


class Kind(enum.Enum):
    """The class of a value; see the module's text."""

    CONSTANT = enum.auto()
    INDEX = enum.auto()
    TOKEN = enum.auto()
    PAIR = enum.auto()
    OPEN = enum.auto()
    REQUEST = enum.auto()


DATA = frozenset({Kind.TOKEN, Kind.PAIR, Kind.OPEN, Kind.REQUEST})
_RANDOM = frozenset({"random_bits", "random_seed", "random_wrap", "random_fold_in", "random_split", "threefry2x32"})


@dataclasses.dataclass(frozen=True)
class TokenClasses:
    """Class of each value (by ``id``) and the values at which attention regions end, in program order."""

    kinds: dict[int, Kind]
    roots: list[Value]

    def __getitem__(self, value: Value) -> Kind:
        return self.kinds[id(value)]


def classify_tokens(graph: Graph) -> TokenClasses:
    """Classifies every value of a captured graph; raises `ModelRefusedError` where tokens are mixed."""
    analysis = _Classifier(graph)
    for node in graph.nodes:
        kind = analysis.classify(node)
        for value in node.outputs:
            analysis.kinds[id(value)] = kind
    return analysis.close_regions()


class _Classifier:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.kinds: dict[int, Kind] = {id(v): Kind.TOKEN for v in graph.inputs}
        for value in graph.constants():
            self.kinds[id(value)] = Kind.INDEX if value.is_table else Kind.CONSTANT

    def classify(self, node: Node) -> Kind:
        kinds = [self.kinds[id(v)] for v in node.inputs]
        if not DATA & set(kinds) and not any(v.type.token_dims for v in (*node.inputs, *node.outputs)):
            return Kind.CONSTANT
        if node.op in _RANDOM:
            raise UnsupportedOperationError(
                node.op, node.location, "it draws random numbers", "switch dropout off (deterministic=True) for serving"
            )
        maps = dim_map(node)
        if maps is None:
            raise UnsupportedOperationError(
                node.op, node.location,
                "how it carries the token axis is not known, so it cannot be proved that it keeps tokens apart",
                "write it with other jax.numpy operations, or describe it with distaff.compiler.register_dim_map",
            )  # fmt: skip
        self.check_axes(node)
        self.check_new_axes(node, maps)
        if not DATA & set(kinds):
            return self.index(node, maps)
        if Kind.REQUEST in kinds:
            return self.request(node, kinds)
        if takes_last_token(node) and kinds[0] in (Kind.TOKEN, Kind.OPEN):
            return Kind.REQUEST
        return self.data(node, kinds, maps)

    def check_axes(self, node: Node) -> None:
        """Token dimensions stay whole: never a part (S-1), a multiple (S*heads) or more than two of them."""
        for value in node.outputs:
            partial = [d for d in value.type.shape if isinstance(d, Sym) and not d.is_axis]
            if partial:
                raise MixesTokensError(
                    node.op, node.location,
                    f"it makes a value of type {value.type}, in which the token axis S is cut, shifted or merged",
                    "keep the token axis whole; shift labels in the loss, not in the model, and build positions with "
                    "jnp.arange(tokens.shape[1])",
                )  # fmt: skip
            if len(value.type.token_dims) > 2:
                raise MixesTokensError(
                    node.op, node.location, f"it makes a value with three token axes, {value.type}",
                    "only one query and one key axis can be served",
                )  # fmt: skip

    def check_new_axes(self, node: Node, maps: list[DimMap]) -> None:
        """A token dimension that comes from no operand is a repeat, an arange, or a table cut to the length."""
        mapped = {dims[d] for v, dims in zip(node.inputs, maps, strict=True) for d in v.type.token_dims}
        new = [d for d in node.outputs[0].type.token_dims if d not in mapped]
        if not new or TOUCHED in mapped or node.op in ("iota", "broadcast_in_dim"):
            return
        if node.op == "slice" and not node.inputs[0].type.token_dims and node.params["strides"] is None:
            starts, limits = node.params["start_indices"], node.params["limit_indices"]
            if all(isinstance(starts[d], int) and limits[d] == Sym(offset=starts[d]) for d in new):
                return
        raise UnsupportedOperationError(
            node.op, node.location, f"it makes a token axis of its own, in {node.outputs[0].type}",
            "make positions with jnp.arange(tokens.shape[1]) and tables with table[:tokens.shape[1]]",
        )  # fmt: skip

    def index(self, node: Node, maps: list[DimMap]) -> Kind:
        for value, dims in zip(node.inputs, maps, strict=True):
            if any(dims[d] in (TOUCHED, None) for d in value.type.token_dims):
                raise MixesTokensError(
                    node.op, node.location, "it reduces, sorts or cuts a table of positions along the sequence",
                    "compute the table from jnp.arange(tokens.shape[1]) position by position",
                )  # fmt: skip
        return Kind.INDEX

    def request(self, node: Node, kinds: list[Kind]) -> Kind:
        """After last-token selection everything is per request; it must not meet other tokens again."""
        others = [
            v for v, k in zip(node.inputs, kinds, strict=True) if k is not Kind.REQUEST and k is not Kind.CONSTANT
        ]
        if others or any(v.type.token_dims for v in node.outputs):
            raise MixesTokensError(
                node.op, node.location, "it combines the last token's value with values of other tokens or positions",
                "select the last token at the end of the model only",
            )  # fmt: skip
        return Kind.REQUEST

    def data(self, node: Node, kinds: list[Kind], maps: list[DimMap]) -> Kind:
        pair = any(k is Kind.PAIR for k in kinds)
        for value, kind, dims in zip(node.inputs, kinds, maps, strict=True):
            touched = [d for d in value.type.token_dims if dims[d] == TOUCHED]
            if not touched or kind is Kind.CONSTANT:
                continue
            contracts = node.op == "dot_general" and pair
            if kind is Kind.PAIR and len(touched) == 1 and (node.op in REDUCTIONS or node.op == "dot_general"):
                continue
            if contracts and kind is not Kind.PAIR:
                continue
            raise self.mixing(node, value, touched[0])
        token_dims = len(node.outputs[0].type.token_dims)
        if token_dims == 2:
            return Kind.PAIR
        if token_dims == 0:
            raise self.mixing(node, node.inputs[0], 0)
        if pair:
            return Kind.OPEN
        extends = node.op in ELEMENTWISE or node.op in STRUCTURAL
        data = [k for k in kinds if k in DATA]
        return Kind.OPEN if extends and all(k is Kind.OPEN for k in data) else Kind.TOKEN

    def mixing(self, node: Node, value: Value, dim: int) -> MixesTokensError:
        how = "contracts" if node.op == "dot_general" else "runs along"
        return MixesTokensError(
            node.op,
            node.location,
            f"it {how} the token axis (dimension {dim} of {value.type}), so tokens see each other",
            "only causal attention (scores between query and key tokens, masked, then summed over keys) may look "
            "across tokens; apply everything else token by token",
        )  # fmt: skip

    def close_regions(self) -> TokenClasses:
        """Ends each region at its first complete value.

        An OPEN value is internal while it feeds scores again (a row maximum) or is to be joined with another OPEN
        value (output / row sum); otherwise the region ends there and what follows is ordinary TOKEN data.
        """
        consumers = self.graph.consumers()
        internal: set[int] = set()
        for node in reversed(self.graph.nodes):
            for value in node.outputs:
                if self.kinds[id(value)] is Kind.OPEN and any(
                    self.keeps_open(user, internal) for user in consumers.get(id(value), [])
                ):
                    internal.add(id(value))
        roots = []
        for node in self.graph.nodes:
            for value in node.outputs:
                if self.kinds[id(value)] is Kind.OPEN and id(value) not in internal:
                    self.kinds[id(value)] = Kind.TOKEN
                    if any(self.kinds[id(v)] in (Kind.PAIR, Kind.OPEN) for v in node.inputs):
                        roots.append(value)
        return TokenClasses(self.kinds, roots)

    def keeps_open(self, user: Node, internal: set[int]) -> bool:
        kind = self.kinds[id(user.outputs[0])]
        if kind is Kind.PAIR:
            return True
        if kind is not Kind.OPEN:
            return False
        opened = {id(v) for v in user.inputs if self.kinds[id(v)] is Kind.OPEN}
        joins = len(opened) > 1 or any(self.kinds[id(v)] is Kind.PAIR for v in user.inputs)
        return joins or id(user.outputs[0]) in internal


def takes_last_token(node: Node) -> bool:
    """Whether the node is ``x[:, -1]`` or ``x[:, -1:]``: a slice [S-1:S] of the token axis, whole elsewhere."""
    if node.op != "slice" or len(node.inputs[0].type.token_dims) != 1:
        return False
    (dim,) = node.inputs[0].type.token_dims
    whole = all(
        (a, b) == (0, d)
        for i, (a, b, d) in enumerate(
            zip(node.params["start_indices"], node.params["limit_indices"], node.inputs[0].type.shape, strict=True)
        )
        if i != dim
    )
    return whole and (node.params["start_indices"][dim], node.params["limit_indices"][dim]) == (Sym(offset=-1), Sym())
