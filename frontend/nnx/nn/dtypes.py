"""The dtype in which a layer computes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from distaff.frontend.layers.dtypes import Array as Array
from distaff.frontend.layers.dtypes import Dtype as Dtype
from distaff.frontend.layers.dtypes import canonicalize_dtype as canonicalize_dtype
from distaff.frontend.layers.dtypes import promoted


def promote_dtype(args: Iterable[Any], /, *, dtype: Dtype | None = None, inexact: bool = True) -> tuple[Any, ...]:
    """The arrays in one dtype, chosen by ``canonicalize_dtype``; None stays None."""
    return tuple(promoted(args, dtype, inexact))
