"""The names of ``flax.nnx.pytreelib``, which is ``nnx.object`` too."""

from distaff.frontend.nnx.kinds import has_data as has_data
from distaff.frontend.nnx.kinds import is_data as is_data
from distaff.frontend.nnx.kinds import register_data_type as register_data_type
from distaff.frontend.nnx.pytrees import Data as Data
from distaff.frontend.nnx.pytrees import Object as Object
from distaff.frontend.nnx.pytrees import Pytree as Pytree
from distaff.frontend.nnx.pytrees import PytreeMeta as PytreeMeta
from distaff.frontend.nnx.pytrees import Static as Static
from distaff.frontend.nnx.pytrees import check_pytree as check_pytree
from distaff.frontend.nnx.pytrees import data as data
from distaff.frontend.nnx.pytrees import dataclass as dataclass
from distaff.frontend.nnx.pytrees import static as static

ObjectMeta = PytreeMeta
