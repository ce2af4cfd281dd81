"""The names of ``flax.nnx.object``: those of ``pytreelib``."""

from distaff.frontend.nnx.pytreelib import *  # noqa: F403
