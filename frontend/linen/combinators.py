"""``Sequential``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from distaff.frontend.linen.class_transform import compact
from distaff.frontend.linen.module import Module


class Sequential(Module):
    """Calls ``layers``, modules or functions, one after the other.

    A tuple that one returns is passed on as positional, a dict as keyword arguments.
    """

    layers: Sequence[Callable[..., Any]]

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Sequence):
            raise ValueError(f"'layers' must be a sequence, got '{type(self.layers).__name__}'.")
        super().__post_init__()

    @compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the first layer with the arguments, the others with what the one before returned."""
        if not self.layers:
            raise ValueError(f"Empty Sequential module {self.name}.")
        first, *others = self.layers
        outputs = first(*args, **kwargs)
        for layer in others:
            if isinstance(outputs, tuple):
                outputs = layer(*outputs)
            elif isinstance(outputs, dict):
                outputs = layer(**outputs)
            else:
                outputs = layer(outputs)
        return outputs
