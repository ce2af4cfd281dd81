"""Ragged paged attention: writing new keys and values into pages and attending over them."""

from distaff.kernels.paged_attention.batch import StepBatch, batch_shapes

__all__ = ["StepBatch", "batch_shapes"]
