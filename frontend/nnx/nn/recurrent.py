"""The names of the cells of recurrent networks, and sequences with padding."""

from distaff.frontend.layers.recurrent import flip_sequences as flip_sequences
from distaff.frontend.nnx.nn.recurrent_cells import GRUCell as GRUCell
from distaff.frontend.nnx.nn.recurrent_cells import LSTMCell as LSTMCell
from distaff.frontend.nnx.nn.recurrent_cells import OptimizedLSTMCell as OptimizedLSTMCell
from distaff.frontend.nnx.nn.recurrent_cells import RNNCellBase as RNNCellBase
from distaff.frontend.nnx.nn.recurrent_cells import SimpleCell as SimpleCell
from distaff.frontend.nnx.nn.recurrent_cells import default_bias_init as default_bias_init
from distaff.frontend.nnx.nn.recurrent_cells import default_kernel_init as default_kernel_init
from distaff.frontend.nnx.nn.recurrent_cells import modified_orthogonal as modified_orthogonal
