"""The dtype in which a layer computes."""

from __future__ import annotations

from typing import Any

from distaff.frontend.layers.dtypes import Array as Array
from distaff.frontend.layers.dtypes import Dtype as Dtype
from distaff.frontend.layers.dtypes import canonicalize_dtype as canonicalize_dtype
from distaff.frontend.layers.dtypes import promoted


def promote_dtype(*args: Any, dtype: Dtype | None = None, inexact: bool = True) -> list[Any]:
    """The arguments as arrays of one dtype, chosen by ``canonicalize_dtype``; None stays None."""
    return promoted(args, dtype, inexact)
