"""The IR: types with symbolic token dimensions, the graph, locations, printer, verifier and structural hashing."""

from distaff.compiler.ir.graph import ATTENTION, EMBED, MATMUL, ROW_PROGRAM, Graph, Node, Value
from distaff.compiler.ir.location import Frame, Location
from distaff.compiler.ir.stored import StoredBlocks
from distaff.compiler.ir.types import Dim, Sym, TensorType

__all__ = [
    "ATTENTION",
    "EMBED",
    "MATMUL",
    "ROW_PROGRAM",
    "Dim",
    "Frame",
    "Graph",
    "Location",
    "Node",
    "StoredBlocks",
    "Sym",
    "TensorType",
    "Value",
]
