"""The names of ``flax.nnx.filterlib``."""

from distaff.frontend.nnx.filters import All as All
from distaff.frontend.nnx.filters import Any as Any
from distaff.frontend.nnx.filters import Everything as Everything
from distaff.frontend.nnx.filters import Filter as Filter
from distaff.frontend.nnx.filters import Not as Not
from distaff.frontend.nnx.filters import Nothing as Nothing
from distaff.frontend.nnx.filters import OfType as OfType
from distaff.frontend.nnx.filters import PathContains as PathContains
from distaff.frontend.nnx.filters import PathIn as PathIn
from distaff.frontend.nnx.filters import Predicate as Predicate
from distaff.frontend.nnx.filters import WithTag as WithTag
from distaff.frontend.nnx.filters import filters_to_predicates as filters_to_predicates
from distaff.frontend.nnx.filters import to_predicate as to_predicate
