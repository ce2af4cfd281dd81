"""The names of ``flax.nnx.variablelib``."""

from distaff.frontend.nnx.config import VarDefaults as VarDefaults
from distaff.frontend.nnx.config import use_eager_sharding as use_eager_sharding
from distaff.frontend.nnx.config import using_eager_sharding as using_eager_sharding
from distaff.frontend.nnx.config import var_defaults as var_defaults
from distaff.frontend.nnx.stored_values import is_array_ref as is_array_ref
from distaff.frontend.nnx.variable_kinds import BatchStat as BatchStat
from distaff.frontend.nnx.variable_kinds import Cache as Cache
from distaff.frontend.nnx.variable_kinds import HijaxVariable as HijaxVariable
from distaff.frontend.nnx.variable_kinds import Intermediate as Intermediate
from distaff.frontend.nnx.variable_kinds import Param as Param
from distaff.frontend.nnx.variable_kinds import Perturbation as Perturbation
from distaff.frontend.nnx.variable_kinds import register_variable_name as register_variable_name
from distaff.frontend.nnx.variable_kinds import variable_name_from_type as variable_name_from_type
from distaff.frontend.nnx.variable_kinds import variable_type_from_name as variable_type_from_name
from distaff.frontend.nnx.variable_metadata import VariableMetadata as VariableMetadata
from distaff.frontend.nnx.variable_metadata import with_metadata as with_metadata
from distaff.frontend.nnx.variables import Variable as Variable
