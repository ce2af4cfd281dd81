"""The functional core of the module system: scopes, variable collections, random keys, axis metadata."""

from distaff.frontend.core import meta as meta
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
from distaff.frontend.core.meta import AxisMetadata as AxisMetadata
from distaff.frontend.core.meta import map_axis_meta as map_axis_meta
from distaff.frontend.core.meta import unbox as unbox
from distaff.frontend.core.scope import Scope as Scope
from distaff.frontend.core.scope import Variable as Variable
