"""Logical axis names under the module name that Flax has them: see ``distaff.frontend.sharding``."""

from distaff.frontend.core.meta import LogicalNames as LogicalNames
from distaff.frontend.sharding import LogicallyPartitioned as LogicallyPartitioned
from distaff.frontend.sharding import LogicalRules as LogicalRules
from distaff.frontend.sharding import RulesFallback as RulesFallback
from distaff.frontend.sharding import get_logical_axis_rules as get_logical_axis_rules
from distaff.frontend.sharding import logical_axis_rules as logical_axis_rules
from distaff.frontend.sharding import logical_to_mesh as logical_to_mesh
from distaff.frontend.sharding import logical_to_mesh_axes as logical_to_mesh_axes
from distaff.frontend.sharding import logical_to_mesh_sharding as logical_to_mesh_sharding
from distaff.frontend.sharding import set_logical_axis_rules as set_logical_axis_rules
from distaff.frontend.sharding import with_logical_constraint as with_logical_constraint
from distaff.frontend.sharding import with_logical_partitioning as with_logical_partitioning
