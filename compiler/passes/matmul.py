"""Raising matrix products: a product of token data with a weight becomes one node, with what surrounds it folded in.

A `MATMUL` node is what one kernel call does: RMS-normalise the input, multiply by one or several matrices, add a bias,
apply an activation (or a gate to its partner), add a residual. What can be folded is found by where values flow, and
*read by evaluation*: a normalisation or an activation is recognised by what it computes on random inputs, whatever
operations it is written with. Whatever is not recognised stays as it is, beside the node.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from distaff.compiler.analysis.dims import ELEMENTWISE
from distaff.compiler.analysis.functions import read_activation, read_gate, read_rms_norm
from distaff.compiler.analysis.tokens import Kind, TokenClasses
from distaff.compiler.ir import EMBED, MATMUL, Graph, Node, StoredBlocks, Sym, Value
from distaff.compiler.ir.types import TensorType
from distaff.kernels.matmul import WeightFormat, gguf_format
from distaff.kernels.matmul.operation import MOST_PARTS

PACKED_ROLES = ("values", "scales", "offsets")  # operands in place of a weight that is packed
# Below this a product is no matter of memory or kernels.
_LEAST_ROWS, _LEAST_COLUMNS = 16, 16
_NONE: Mapping[str, StoredBlocks] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class ProductSpec:
    """What a `MATMUL` node computes of its operands, whose roles are ``operands``, in the order of the node's inputs.

    Roles: ``x``; ``weight``, once a part, each ``[rows, columns]``; ``norm`` (the weight of the RMS norm), ``bias``,
    ``residual``. A part has a result of its own, of its width in ``columns``; with ``gated`` there are two parts, and
    the one result is ``activation(first) * second``.
    """

    operands: tuple[str, ...]
    rows: int
    columns: tuple[int, ...]
    norm_epsilon: float | None = None
    activation: str | None = None
    gated: bool = False
    format: WeightFormat | None = None  # once the weights are packed


def raise_matmuls(graph: Graph, classes: TokenClasses, stored: Mapping[str, StoredBlocks] = _NONE) -> Graph:
    """Replaces products with weights, and look-ups in embedding tables, by `MATMUL` and `EMBED` nodes.

    ``graph`` is changed. Results keep their values, so ``classes`` still hold. Weights that are ``stored`` in
    different formats, by name, are not joined.
    """
    rewriter = _Rewriter(graph, classes, stored)
    for node in list(graph.nodes):
        rewriter.raise_product(node)
        rewriter.raise_lookup(node)
    for fold in (rewriter.fold_bias, rewriter.fold_norm, rewriter.fold_activation):
        for node in rewriter.matmuls():
            fold(node)
    rewriter.merge_siblings(rewriter.matmuls())
    for node in rewriter.matmuls():
        rewriter.fold_residual(node)
    return graph.reachable()


class _Rewriter:
    def __init__(self, graph: Graph, classes: TokenClasses, stored: Mapping[str, StoredBlocks]) -> None:
        self.graph = graph
        self.classes = classes
        self.stored = {name: gguf_format(blocks.type_name) for name, blocks in stored.items()}
        self.users: dict[int, list[Node]] = {}

    def matmuls(self) -> list[Node]:
        """The products as they are now; forgets what is not used any more."""
        self.graph.nodes[:] = self.graph.reachable().nodes
        self.users = self.graph.consumers()
        return [n for n in self.graph.nodes if n.op == MATMUL]

    def operand(self, node: Node, role: str) -> Value:
        spec: ProductSpec = node.params["spec"]
        return node.inputs[spec.operands.index(role)]

    def stored_format(self, node: Node) -> WeightFormat | None:
        """What the weight is packed as if it is kept as it is stored."""
        return self.stored.get(self.operand(node, "weight").name)

    def is_token(self, value: Value) -> bool:
        return self.classes.kinds.get(id(value)) is Kind.TOKEN

    def replace(self, old: Node, node: Node, outputs: tuple[Value, ...]) -> None:
        """Puts ``node`` in the place of ``old``; it makes ``outputs``, which other nodes made before."""
        self.graph.nodes[next(i for i, n in enumerate(self.graph.nodes) if n is old)] = node
        node.outputs = outputs
        for index, value in enumerate(outputs):
            value.node, value.index = node, index
        for value in old.inputs:
            self.users[id(value)] = [n for n in self.users.get(id(value), []) if n is not old]
        for value in {id(v): v for v in node.inputs}.values():
            self.users.setdefault(id(value), []).append(node)

    # Raising.

    def raise_product(self, node: Node) -> None:
        if node.op != "dot_general" or not self.is_token(node.output):
            return
        (contract, batch) = node.params["dimension_numbers"]
        data = [i for i, v in enumerate(node.inputs) if self.is_token(v)]
        if len(data) != 1 or any(batch):
            return
        at = data[0]
        x, weight = node.inputs[at], constant_array(node.inputs[1 - at])
        pairs = sorted(zip(contract[at], contract[1 - at], strict=True))
        kept = [d for i, d in enumerate(x.type.shape) if i not in contract[at] and i not in x.type.token_dims]
        if weight is None or any(d != 1 for d in kept) or not is_float(x.type) or not is_float(node.output.type):
            return
        free = [d for d in range(weight.ndim) if d not in contract[1 - at]]
        matrix = weight.transpose([d for _, d in pairs] + free)
        rows = int(np.prod([weight.shape[d] for _, d in pairs], dtype=np.int64))
        matrix = matrix.reshape(rows, -1)
        if matrix.shape[0] < _LEAST_ROWS or matrix.shape[1] < _LEAST_COLUMNS:
            return
        spec = ProductSpec(("x", "weight"), rows, (matrix.shape[1],))
        self.replace(node, _node(spec, [x, constant(matrix, name_of(node.inputs[1 - at]))], node), node.outputs)

    def raise_lookup(self, node: Node) -> None:
        """``table[tokens]``: whole rows of a two-dimensional table."""
        if node.op != "gather" or not self.is_token(node.output):
            return
        table, indices = node.inputs
        numbers = node.params["dimension_numbers"]
        array = constant_array(table)
        if array is None or array.ndim != 2 or not self.is_token(indices) or not is_float(node.output.type):
            return
        rank = node.output.type.rank
        whole_rows = (
            tuple(numbers.offset_dims) == (rank - 1,)
            and tuple(numbers.collapsed_slice_dims) == tuple(numbers.start_index_map) == (0,)
            and not numbers.operand_batching_dims
            and tuple(node.params["slice_sizes"]) == (1, array.shape[1])
            and indices.type.per_token()[-1] == 1
        )
        if not whole_rows or array.shape[1] < _LEAST_ROWS or array.shape[0] < _LEAST_COLUMNS:
            return
        spec = ProductSpec(("x", "weight"), array.shape[1], (array.shape[0],))
        new = Node(EMBED, (indices, constant(array.T, name_of(table))), {"spec": spec}, (), node.location)
        self.replace(node, new, node.outputs)

    # Folding.

    def sole_user(self, value: Value) -> tuple[Node, Value] | None:
        """The only node that uses ``value``, seen through reshapes, and the reshaped value that it takes."""
        while True:
            users = self.users.get(id(value), [])
            if len(users) != 1 or any(v is value for v in self.graph.outputs):
                return None
            if not keeps_rows(users[0]):
                return users[0], value
            value = users[0].output

    def fold_bias(self, node: Node) -> None:
        found = self.sole_user(node.output)
        if found is None or found[0].op not in ("add", "add_any"):
            return
        user, value = found
        (other,) = [v for v in user.inputs if v is not value] or [value]
        bias = broadcast_vector(other, value.type)
        if bias is not None:
            self.absorb(node, user, "bias", constant(bias, name_of(other)))

    def fold_norm(self, node: Node) -> None:
        norm = read_rms_norm(self.operand(node, "x"), self.graph, self.classes)
        if norm is None:
            return
        spec: ProductSpec = node.params["spec"]
        inputs = [norm.source if role == "x" else v for role, v in zip(spec.operands, node.inputs, strict=True)]
        spec = dataclasses.replace(spec, operands=(*spec.operands, "norm"), norm_epsilon=norm.epsilon)
        self.replace(node, _node(spec, [*inputs, constant(norm.weight, norm.name)], node), node.outputs)

    def fold_activation(self, node: Node) -> None:
        """The elementwise function of one or two products that ``node`` takes, if it is known."""
        root = self.operand(node, "x")
        leaves, nodes = self.elementwise_region(root)
        specs = [leaf.node.params["spec"] for leaf in leaves if leaf.node is not None]
        if not nodes or any(spec.activation is not None or len(spec.columns) > 1 for spec in specs):
            return
        if len(leaves) == 1 and (name := read_activation(root, leaves[0], nodes)) is not None:
            (leaf,) = leaves
            assert leaf.node is not None and root.node is not None
            new = _node(dataclasses.replace(specs[0], activation=name), list(leaf.node.inputs), leaf.node)
            self.replace(root.node, new, (root,))
        elif len(leaves) == 2 and (gate := read_gate(root, leaves, nodes)) is not None:
            first, second = leaves[gate.gate].node, leaves[1 - gate.gate].node
            assert first is not None and second is not None and root.node is not None
            joined = _join([first, second]) if self.stored_format(first) == self.stored_format(second) else None
            if joined is not None:
                spec, inputs = joined
                spec = dataclasses.replace(spec, activation=gate.activation, gated=True)
                self.replace(root.node, _node(spec, inputs, first), (root,))

    def elementwise_region(self, root: Value) -> tuple[list[Value], list[Node]]:
        """The products that ``root`` is an elementwise function of, and its nodes in order; nothing if others are met.

        No value inside may be used outside.
        """
        inside: dict[int, Node] = {}
        leaves: dict[int, Value] = {}
        stack = [root]
        while stack:
            value = stack.pop()
            node = value.node
            if node is None or node.op not in (*ELEMENTWISE, "reshape", MATMUL):
                if value.is_constant and np.size(value.data) == 1:
                    continue
                return [], []
            if node.op == MATMUL:
                leaves[id(value)] = value
            elif id(node) not in inside:
                inside[id(node)] = node
                stack.extend(node.inputs)
        made = {id(v) for n in inside.values() for v in n.outputs if v is not root} | set(leaves)
        if any(id(user) not in inside for value in made for user in self.users.get(value, [])):
            return [], []
        return list(leaves.values()), [n for n in self.graph.nodes if id(n) in inside]

    def merge_siblings(self, nodes: list[Node]) -> None:
        """Products of the same input become one node, so that its rows are read and normalised once."""
        groups: dict[tuple[object, ...], list[Node]] = {}
        for node in nodes:
            spec: ProductSpec = node.params["spec"]
            if spec.activation is None:
                norm = np.asarray(self.operand(node, "norm").data).tobytes() if "norm" in spec.operands else None
                key = (id(self.operand(node, "x")), norm, spec.norm_epsilon, self.stored_format(node))
                groups.setdefault(key, []).append(node)
        for siblings in groups.values():
            joined = _join(siblings) if 1 < len(siblings) <= MOST_PARTS else None
            if joined is None:
                continue
            first, *others = siblings
            outputs = tuple(n.output for n in siblings)
            self.replace(first, _node(*joined, first), outputs)
            dropped = {id(n) for n in others}
            self.graph.nodes[:] = [n for n in self.graph.nodes if id(n) not in dropped]

    def fold_residual(self, node: Node) -> None:
        if len(node.outputs) > 1:
            return
        found = self.sole_user(node.output)
        if found is None or found[0].op not in ("add", "add_any"):
            return
        user, value = found
        others = [v for v in user.inputs if v is not value]
        if len(others) == 1 and self.is_token(others[0]) and others[0].type == value.type:
            self.absorb(node, user, "residual", others[0])

    def absorb(self, node: Node, user: Node, role: str, operand: Value) -> None:
        """Makes ``node`` compute what ``user`` made of its result and ``operand``, in the place of ``user``."""
        spec: ProductSpec = node.params["spec"]
        spec = dataclasses.replace(spec, operands=(*spec.operands, role))
        self.replace(user, _node(spec, [*node.inputs, operand], node), user.outputs)


def _node(spec: ProductSpec, inputs: list[Value], like: Node) -> Node:
    return Node(MATMUL, tuple(inputs), {"spec": spec}, (), like.location)


def _join(nodes: list[Node]) -> tuple[ProductSpec, list[Value]] | None:
    """One product in place of several of the same input; None if they differ in more than weights and biases."""
    specs: list[ProductSpec] = [n.params["spec"] for n in nodes]
    operands = [dict(zip(s.operands, n.inputs, strict=True)) for s, n in zip(specs, nodes, strict=True)]
    first = specs[0]
    biased = ["bias" in o for o in operands]
    alike = (
        all(o["x"] is operands[0]["x"] and "residual" not in o for o in operands)
        and all(s.norm_epsilon == first.norm_epsilon and s.activation is None for s in specs)
        and all(_same_data(o.get("norm"), operands[0].get("norm")) for o in operands)
        and (all(biased) or not any(biased))
    )
    if not alike:
        return None
    roles, inputs = ["x"], [operands[0]["x"]]
    for o in operands:
        roles.append("weight")
        inputs.append(o["weight"])
    if "norm" in operands[0]:
        roles.append("norm")
        inputs.append(operands[0]["norm"])
    if biased[0]:
        roles.append("bias")
        inputs.append(
            constant(np.concatenate([np.asarray(o["bias"].data) for o in operands]), operands[0]["bias"].name)
        )
    return dataclasses.replace(first, operands=tuple(roles), columns=tuple(s.columns[0] for s in specs)), inputs


def _same_data(a: Value | None, b: Value | None) -> bool:
    if a is None or b is None:
        return a is b
    return np.array_equal(np.asarray(a.data), np.asarray(b.data))


def constant(array: np.ndarray, name: str) -> Value:
    """A weight of the IR."""
    return Value(TensorType(tuple(int(d) for d in array.shape), array.dtype), name=name, data=array)


def constant_array(value: Value) -> np.ndarray | None:
    """A weight as an array, seen through transposes, reshapes and casts to a wider float; None if it is computed.

    A view of the weight wherever that can be, so that two uses of one table can be told to be the same.
    """
    if value.data is not None:
        return None if value.is_table else np.asarray(value.data)
    node = value.node
    if node is None or node.op not in ("transpose", "reshape", "squeeze", "convert_element_type"):
        return None
    inner = constant_array(node.inputs[0])
    if inner is None:
        return None
    if node.op == "transpose":
        return inner.transpose(node.params["permutation"])
    if node.op == "convert_element_type":
        dtype = value.type.dtype
        return inner if is_float(value.type) and dtype.itemsize >= inner.dtype.itemsize else None
    return inner.reshape(value.type.at({}))


def name_of(value: Value) -> str:
    """The weight's name, seen through what `constant_array` sees through."""
    while not value.name and value.node is not None:
        value = value.node.inputs[0]
    return value.name


def broadcast_vector(value: Value, like: TensorType) -> np.ndarray | None:
    """What ``value`` adds to every token of type ``like``, flat; None if it is not constant."""
    shape = [1 if isinstance(d, Sym) else d for d in like.shape]
    node = value.node
    array: np.ndarray | None
    if node is not None and node.op == "broadcast_in_dim":
        array = constant_array(node.inputs[0])
        if array is None:
            return None
        kept = [1] * len(shape)
        for dim, size in zip(node.params["broadcast_dimensions"], array.shape, strict=True):
            kept[dim] = size
        array = array.reshape(kept)
    else:
        array = constant_array(value)
    if array is None or array.ndim not in (0, len(shape)):
        return None
    return np.broadcast_to(array, shape).reshape(-1)


def keeps_rows(node: Node) -> bool:
    """Whether the node only reshapes the values of each token, in their order."""
    if node.op not in ("reshape", "squeeze", "expand_dims"):
        return False
    before, after = node.inputs[0].type, node.output.type
    return all(len(t.token_dims) == 1 and all(d == 1 for d in t.shape[: t.token_dims[0]]) for t in (before, after))


def is_float(kind: TensorType) -> bool:
    """Whether the type is one of the floating point types that kernels take."""
    return str(kind.dtype) in ("float32", "bfloat16", "float16")
