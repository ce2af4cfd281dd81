"""The names of ``flax.nnx.graph``: those of ``graphlib``."""

from distaff.frontend.nnx.graphlib import *  # noqa: F403
