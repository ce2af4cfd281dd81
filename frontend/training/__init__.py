"""Training: states, checkpoints, loss scaling, early stopping; the modules are named as in ``flax.training``."""
