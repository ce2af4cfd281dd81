"""The names of ``flax.nnx.reprlib``: how an object prints."""

from distaff.frontend.nnx.representation import represent as get_repr

__all__ = ["get_repr"]
