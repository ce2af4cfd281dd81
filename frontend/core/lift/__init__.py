"""JAX transforms lifted to functions of scopes: they transform variables and random keys along with arguments."""

from distaff.frontend.core.lift.axes import In as In
from distaff.frontend.core.lift.axes import Out as Out
from distaff.frontend.core.lift.axes import remat_scan as remat_scan
from distaff.frontend.core.lift.axes import scan as scan
from distaff.frontend.core.lift.axes import vmap as vmap
from distaff.frontend.core.lift.compiled import fold_rngs as fold_rngs
from distaff.frontend.core.lift.compiled import jit as jit
from distaff.frontend.core.lift.control import cond as cond
from distaff.frontend.core.lift.control import switch as switch
from distaff.frontend.core.lift.control import while_loop as while_loop
from distaff.frontend.core.lift.derivatives import custom_vjp as custom_vjp
from distaff.frontend.core.lift.derivatives import jvp as jvp
from distaff.frontend.core.lift.derivatives import value_and_grad as value_and_grad
from distaff.frontend.core.lift.derivatives import vjp as vjp
from distaff.frontend.core.lift.mapping import id_fn as id_fn
from distaff.frontend.core.lift.mapping import map_variables as map_variables
from distaff.frontend.core.lift.mapping import swap_collection as swap_collection
from distaff.frontend.core.lift.pack import pack as pack
from distaff.frontend.core.lift.recompute import checkpoint as checkpoint
from distaff.frontend.core.lift.recompute import remat as remat
