"""The names of ``flax.nnx.transforms.iteration``."""

from distaff.frontend.nnx.transforms.carry import Carry as Carry
from distaff.frontend.nnx.transforms.loops import fori_loop as fori_loop
from distaff.frontend.nnx.transforms.loops import scan as scan
from distaff.frontend.nnx.transforms.loops import while_loop as while_loop
from distaff.frontend.nnx.transforms.mapping import pmap as pmap
from distaff.frontend.nnx.transforms.mapping import transform_metadata as transform_metadata
from distaff.frontend.nnx.transforms.mapping import vmap as vmap
from distaff.frontend.nnx.transforms.prefixes import StateAxes as StateAxes
