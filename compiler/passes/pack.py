"""Choosing number formats for weights and packing them as kernels read them.

A `MATMUL` or `EMBED` node comes with plain matrices and leaves with packed ones: joined where one product has several
parts, quantised, in panels. A table that both looks up tokens and makes logits is packed once.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from distaff.compiler.ir import EMBED, MATMUL, Graph, Node, Value
from distaff.compiler.passes.matmul import constant
from distaff.kernels.matmul import WeightFormat, interleave_gated, pack
from distaff.kernels.matmul.packing import LANES


@dataclasses.dataclass(frozen=True)
class WeightFormats:
    """Number formats: of the matrices inside the model, and of the tables of tokens (embedding and logits)."""

    matrices: WeightFormat
    tables: WeightFormat


@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """A packed weight, for the report."""

    format: WeightFormat
    parameters: int
    bytes: int


def pack_weights(graph: Graph, formats: WeightFormats, vocab_size: int) -> list[PackedMatrix]:
    """Packs the weights of all products and look-ups of ``graph``, which is changed."""
    packer = _Packer(formats, vocab_size)
    for node in graph.nodes:
        if node.op in (MATMUL, EMBED):
            packer.pack_node(node)
    return packer.packed


class _Packer:
    def __init__(self, formats: WeightFormats, vocab_size: int) -> None:
        self.formats = formats
        self.vocab_size = vocab_size
        self.known: dict[object, dict[str, Value]] = {}
        self.packed: list[PackedMatrix] = []

    def pack_node(self, node: Node) -> None:
        spec = node.params["spec"]
        pairs = list(zip(spec.operands, node.inputs, strict=True))
        weights = [value for role, value in pairs if role == "weight"]
        is_table = node.op == EMBED or spec.columns == (self.vocab_size,)
        form = self.formats.tables if is_table else self.formats.matrices
        key = (tuple(_identity(w.data) for w in weights), spec.gated, form)
        if key not in self.known:
            self.known[key] = self.pack(weights, spec.gated, form)
        arrays = self.known[key]
        others = []
        for role, value in pairs:
            if role == "bias":
                parts = np.split(np.asarray(value.data, np.float32)[None], np.cumsum(spec.columns)[:-1], axis=1)
                value = constant(_joined(parts, spec.gated)[0], value.name)
            if role != "weight":
                others.append((role, value))
        operands = [*others, *arrays.items()]
        node.inputs = tuple(value for _, value in operands)
        node.params = {"spec": dataclasses.replace(spec, operands=tuple(role for role, _ in operands), format=form)}

    def pack(self, weights: list[Value], gated: bool, form: WeightFormat) -> dict[str, Value]:
        matrices = [np.asarray(w.data, np.float32) for w in weights]
        joined = _joined(matrices, gated)
        packed = pack(joined, form)
        name = weights[0].name if len(weights) == 1 else "+".join(w.name for w in weights)
        arrays = {"values": packed.values, "scales": packed.scales, "offsets": packed.offsets}
        present = {role: array for role, array in arrays.items() if array is not None}
        self.packed.append(PackedMatrix(form, sum(m.size for m in matrices), sum(a.nbytes for a in present.values())))
        return {role: constant(array, f"{name}.{form.name}.{role}") for role, array in present.items()}


def padded_columns(columns: int) -> int:
    """The columns of a part among others: whole panels."""
    return -(-columns // LANES) * LANES


def _joined(parts: list[np.ndarray], gated: bool) -> np.ndarray:
    """The columns of all parts: a gate's and its partner's by turns, others one part after the other."""
    if gated:
        return interleave_gated(*parts)
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([np.pad(p, ((0, 0), (0, padded_columns(p.shape[1]) - p.shape[1]))) for p in parts], axis=1)


def _identity(array: np.ndarray) -> tuple[object, ...]:
    """Equal for views of the same memory with the same shape."""
    return (array.__array_interface__["data"][0], array.shape, array.strides, str(array.dtype))
