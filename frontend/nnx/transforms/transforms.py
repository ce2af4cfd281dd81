"""The names of ``flax.nnx.transforms.transforms``."""

from distaff.frontend.nnx.transforms.abstract import eval_shape as eval_shape
from distaff.frontend.nnx.transforms.control import checkify as checkify
from distaff.frontend.nnx.transforms.control import cond as cond
from distaff.frontend.nnx.transforms.control import make_jaxpr as make_jaxpr
from distaff.frontend.nnx.transforms.control import switch as switch
