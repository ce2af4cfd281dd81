"""Initialisers: those of ``jax.nn.initializers``, and ``zeros_init`` and ``ones_init``."""

from distaff.frontend.layers.initializers import *  # noqa: F403
