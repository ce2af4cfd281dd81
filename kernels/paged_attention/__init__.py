"""Ragged paged attention: writing new keys and values into pages and attending over them."""

from distaff.kernels.paged_attention.batch import StepBatch, batch_shapes
from distaff.kernels.paged_attention.operation import call_attributes, paged_attention
from distaff.kernels.paged_attention.pages import gather_pages, pool_shape, read_context, row_shape, write_pages
from distaff.kernels.paged_attention.rotary import Rotary, RotaryTables
from distaff.kernels.paged_attention.spec import AttentionSpec

__all__ = [
    "AttentionSpec",
    "Rotary",
    "RotaryTables",
    "StepBatch",
    "batch_shapes",
    "call_attributes",
    "gather_pages",
    "paged_attention",
    "pool_shape",
    "read_context",
    "row_shape",
    "write_pages",
]
