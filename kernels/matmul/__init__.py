"""Products with packed weight matrices in float32, bfloat16, int8 and int4, and what is fused with them."""

from distaff.kernels.matmul.formats import WeightFormat, WeightFormatError
from distaff.kernels.matmul.gguf_blocks import gguf_format, split_gguf
from distaff.kernels.matmul.operation import MatmulSpec, call_attributes, embed_rows, matmul
from distaff.kernels.matmul.packing import (
    PackedWeight,
    interleave_gated,
    pack,
    pack_parts,
    packed_shapes,
    unpack,
)
from distaff.kernels.matmul.panels import PanelFormat
from distaff.kernels.matmul.pieces import PIECE_ALIGNMENT, Piece
from distaff.kernels.matmul.quantise import UnquantisableError

__all__ = [
    "PIECE_ALIGNMENT",
    "MatmulSpec",
    "PackedWeight",
    "PanelFormat",
    "Piece",
    "UnquantisableError",
    "WeightFormat",
    "WeightFormatError",
    "call_attributes",
    "embed_rows",
    "gguf_format",
    "interleave_gated",
    "matmul",
    "pack",
    "pack_parts",
    "packed_shapes",
    "split_gguf",
    "unpack",
]
