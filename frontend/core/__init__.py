"""The functional core of the module system: scopes, variable collections, random keys, axis metadata, lifting."""

from jax import Array as Array

from distaff.frontend.core import lift as lift
from distaff.frontend.core import meta as meta
from distaff.frontend.core import tracers as tracers
from distaff.frontend.core import variables as variables
from distaff.frontend.core.axes_scan import broadcast as broadcast
from distaff.frontend.core.filters import DenyList as DenyList
from distaff.frontend.core.frozen_dict import FrozenDict as FrozenDict
from distaff.frontend.core.frozen_dict import copy as copy
from distaff.frontend.core.frozen_dict import freeze as freeze
from distaff.frontend.core.frozen_dict import pop as pop
from distaff.frontend.core.frozen_dict import pretty_repr as pretty_repr
from distaff.frontend.core.frozen_dict import unfreeze as unfreeze
from distaff.frontend.core.functional import apply as apply
from distaff.frontend.core.functional import bind as bind
from distaff.frontend.core.functional import init as init
from distaff.frontend.core.functional import lazy_init as lazy_init
from distaff.frontend.core.lift import custom_vjp as custom_vjp
from distaff.frontend.core.lift import jit as jit
from distaff.frontend.core.lift import jvp as jvp
from distaff.frontend.core.lift import remat as remat
from distaff.frontend.core.lift import remat_scan as remat_scan
from distaff.frontend.core.lift import scan as scan
from distaff.frontend.core.lift import vjp as vjp
from distaff.frontend.core.lift import vmap as vmap
from distaff.frontend.core.lift import while_loop as while_loop
from distaff.frontend.core.meta import AxisMetadata as AxisMetadata
from distaff.frontend.core.meta import map_axis_meta as map_axis_meta
from distaff.frontend.core.meta import unbox as unbox
from distaff.frontend.core.scope import Scope as Scope
from distaff.frontend.core.scope import Variable as Variable
from distaff.frontend.core.tracers import check_trace_level as check_trace_level
from distaff.frontend.core.tracers import current_trace as current_trace
