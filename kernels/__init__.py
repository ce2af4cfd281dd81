"""The fused operations that models are compiled to, and the registry of what serves them on which platform.

`survey` tells which kernel serves which operation, and why others do not; `native.features` of this package tells
which instruction sets the native ones use here.
"""

from distaff.kernels.registry import Choice, Implementation, Verdict, choose, explain, survey

__all__ = ["Choice", "Implementation", "Verdict", "choose", "explain", "survey"]
