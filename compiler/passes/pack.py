"""Choosing number formats for weights and packing them as kernels read them.

A `MATMUL` or `EMBED` node comes with plain matrices and leaves with packed ones: joined where one product has several
parts, quantised, in panels. A table that both looks up tokens and makes logits is packed once. What a checkpoint holds
quantised is packed as it is, after a check that it is exactly the matrix that the product takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from distaff.compiler.ir import EMBED, MATMUL, Graph, Node, StoredBlocks, Value
from distaff.compiler.passes.matmul import PACKED_ROLES, constant
from distaff.kernels.matmul import (
    PackedWeight,
    WeightFormat,
    gguf_format,
    interleave_gated,
    pack,
    pack_parts,
    split_gguf,
    unpack,
)
from distaff.kernels.matmul.formats import LANES


@dataclasses.dataclass(frozen=True)
class WeightFormats:
    """Number formats: of the matrices inside the model, and of the tables of tokens (embedding and logits)."""

    matrices: WeightFormat
    tables: WeightFormat


@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """A packed weight, for the report; ``as_stored`` if its numbers are the checkpoint's, bit for bit."""

    format: WeightFormat
    as_stored: bool
    parameters: int
    bytes: int


def pack_weights(
    graph: Graph, formats: WeightFormats, vocab_size: int, stored: Mapping[str, StoredBlocks]
) -> list[PackedMatrix]:
    """Packs the weights of all products and look-ups of ``graph``, which is changed.

    Those named in ``stored`` keep their numbers if a format holds them; ``formats`` are for the others.
    """
    packer = _Packer(formats, vocab_size, stored)
    for node in graph.nodes:
        if node.op in (MATMUL, EMBED):
            packer.pack_node(node)
    return packer.packed


class _Packer:
    def __init__(self, formats: WeightFormats, vocab_size: int, stored: Mapping[str, StoredBlocks]) -> None:
        self.formats = formats
        self.vocab_size = vocab_size
        self.stored = stored
        self.known: dict[object, tuple[WeightFormat, dict[str, Value]]] = {}
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
        form, arrays = self.known[key]
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

    def pack(self, weights: list[Value], gated: bool, form: WeightFormat) -> tuple[WeightFormat, dict[str, Value]]:
        joined = _joined([np.asarray(w.data, np.float32) for w in weights], gated)
        packed = self.pack_stored(weights, gated)
        as_stored = packed is not None and np.array_equal(unpack(packed), joined)
        if packed is None or not as_stored:
            packed = pack(joined, form)
        form, name = packed.format, "+".join(w.name for w in weights)
        arrays = dict(zip(PACKED_ROLES, packed.arrays, strict=False))
        size = sum(int(np.size(w.data)) for w in weights)
        self.packed.append(PackedMatrix(form, as_stored, size, sum(a.nbytes for a in packed.arrays)))
        return form, {role: constant(array, f"{name}.{form.name}.{role}") for role, array in arrays.items()}

    def pack_stored(self, weights: list[Value], gated: bool) -> PackedWeight | None:
        """The weights as the checkpoint has them; None unless they are all stored in one format that there is."""
        stored = [self.stored[w.name] for w in weights if w.name in self.stored]
        formats = {gguf_format(blocks.type_name) for blocks in stored}
        shapes = [(w.data.shape[1], w.data.shape[0]) for w in weights]
        if [blocks.shape for blocks in stored] != shapes or len(formats) > 1 or (form := formats.pop()) is None:
            return None
        split = [split_gguf(blocks.read(), blocks.type_name, blocks.shape[0]) for blocks in stored]
        return pack_parts(tuple(_joined(parts, gated) for parts in zip(*split, strict=True)), form)


def padded_columns(columns: int) -> int:
    """The columns of a part among others: whole panels."""
    return -(-columns // LANES) * LANES


def _joined(parts: Sequence[np.ndarray], gated: bool) -> np.ndarray:
    """The columns of all parts: a gate's and its partner's by turns, others one part after the other."""
    if gated:
        return interleave_gated(*parts)
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([np.pad(p, ((0, 0), (0, padded_columns(p.shape[1]) - p.shape[1]))) for p in parts], axis=1)


def _identity(array: np.ndarray) -> tuple[object, ...]:
    """Equal for views of the same memory with the same shape."""
    return (array.__array_interface__["data"][0], array.shape, array.strides, str(array.dtype))
