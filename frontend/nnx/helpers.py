"""The names of ``flax.nnx.helpers``."""

from distaff.frontend.nnx.containers import Dict as Dict
from distaff.frontend.nnx.containers import List as List
from distaff.frontend.nnx.containers import Sequential as Sequential
from distaff.frontend.nnx.training.train_state import TrainState as TrainState
