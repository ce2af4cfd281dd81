"""The layers of NNX, by the module paths of ``flax.nnx.nn``."""
