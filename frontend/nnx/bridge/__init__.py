"""Between Linen and NNX: modules of one kind inside the other, and their variables."""

from distaff.frontend.nnx.bridge.interop import linen_in_bridge_mdl as linen_in_bridge_mdl
from distaff.frontend.nnx.bridge.interop import nnx_in_bridge_mdl as nnx_in_bridge_mdl
from distaff.frontend.nnx.bridge.module import AttrPriority as AttrPriority
from distaff.frontend.nnx.bridge.module import Module as Module
from distaff.frontend.nnx.bridge.module import Scope as Scope
from distaff.frontend.nnx.bridge.module import compact as compact
from distaff.frontend.nnx.bridge.module import current_context as current_context
from distaff.frontend.nnx.bridge.module import current_module as current_module
from distaff.frontend.nnx.bridge.variables import NNXMeta as NNXMeta
from distaff.frontend.nnx.bridge.variables import with_partitioning as with_partitioning
from distaff.frontend.nnx.bridge.wrappers import Functional as Functional
from distaff.frontend.nnx.bridge.wrappers import ToLinen as ToLinen
from distaff.frontend.nnx.bridge.wrappers import ToNNX as ToNNX
from distaff.frontend.nnx.bridge.wrappers import functional as functional
from distaff.frontend.nnx.bridge.wrappers import lazy_init as lazy_init
from distaff.frontend.nnx.bridge.wrappers import to_linen as to_linen
from distaff.frontend.nnx.bridge.wrappers import to_linen_class as to_linen_class
from distaff.frontend.nnx.nn import initializers as initializers
