"""The names of ``flax.nnx.rnglib``."""

from distaff.frontend.nnx.rng_splitting import SplitBackups as SplitBackups
from distaff.frontend.nnx.rng_splitting import backup_keys as backup_keys
from distaff.frontend.nnx.rng_splitting import fork_rngs as fork_rngs
from distaff.frontend.nnx.rng_splitting import reseed as reseed
from distaff.frontend.nnx.rng_splitting import restore_rngs as restore_rngs
from distaff.frontend.nnx.rng_splitting import split_rngs as split_rngs
from distaff.frontend.nnx.rng_splitting import with_rngs as with_rngs
from distaff.frontend.nnx.rngs import KeylessInitializer as KeylessInitializer
from distaff.frontend.nnx.rngs import RngCount as RngCount
from distaff.frontend.nnx.rngs import RngKey as RngKey
from distaff.frontend.nnx.rngs import Rngs as Rngs
from distaff.frontend.nnx.rngs import RngState as RngState
from distaff.frontend.nnx.rngs import RngStream as RngStream
