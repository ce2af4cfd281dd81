"""The names of ``flax.nnx.tracers``."""

from distaff.frontend.core.tracers import current_trace as current_jax_trace

__all__ = ["current_jax_trace"]
