"""The names of ``flax.nnx.extract``."""

from distaff.frontend.nnx.contexts import NodeStates as NodeStates
from distaff.frontend.nnx.contexts import clear_non_graph_nodes as clear_non_graph_nodes
from distaff.frontend.nnx.contexts import from_tree as from_tree
from distaff.frontend.nnx.contexts import is_tree_node as is_tree_node
from distaff.frontend.nnx.contexts import merge_tree_node as merge_tree_node
from distaff.frontend.nnx.contexts import to_tree as to_tree
from distaff.frontend.nnx.prefix_mapping import PrefixMapping as PrefixMapping
from distaff.frontend.nnx.prefix_mapping import broadcast_prefix as broadcast_prefix
from distaff.frontend.nnx.transforms.prefixes import TreeState as TreeState
from distaff.frontend.nnx.transforms.prefixes import prefix as prefix
