"""The names of ``flax.nnx.visualization``."""

from distaff.frontend.nnx.representation import display as display
