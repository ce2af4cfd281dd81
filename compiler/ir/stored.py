"""Weights as checkpoints hold them when they are quantised already."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class StoredBlocks:
    """A matrix ``[outputs, inputs]`` whose numbers are quantised in blocks, as in a GGUF file.

    ``type_name`` is ggml's (Q8_0, Q4_0, Q4_K …). ``read`` gives the bytes, uint8 ``[outputs, bytes of a row]``, blocks
    along the inputs; it may be a view of the file.
    """

    type_name: str
    shape: tuple[int, int]
    read: Callable[[], np.ndarray]
