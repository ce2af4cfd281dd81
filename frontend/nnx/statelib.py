"""The names of ``flax.nnx.statelib``."""

from distaff.frontend.nnx.state import FlatState as FlatState
from distaff.frontend.nnx.state import State as State
from distaff.frontend.nnx.state import create_path_filters as create_path_filters
from distaff.frontend.nnx.state import diff as diff
from distaff.frontend.nnx.state import filter_state as filter_state
from distaff.frontend.nnx.state import from_flat_state as from_flat_state
from distaff.frontend.nnx.state import map_state as map_state
from distaff.frontend.nnx.state import merge_state as merge_state
from distaff.frontend.nnx.state import replace_by_pure_dict as replace_by_pure_dict
from distaff.frontend.nnx.state import restore_int_paths as restore_int_paths
from distaff.frontend.nnx.state import split_state as split_state
from distaff.frontend.nnx.state import to_flat_state as to_flat_state
from distaff.frontend.nnx.state import to_pure_dict as to_pure_dict
