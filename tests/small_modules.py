"""Small Linen modules that several tests share, and an input for them."""

import jax
import jax.numpy as jnp
import numpy as np

from distaff.frontend import linen as nn

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4)), jnp.float32)


class MLP(nn.Module):
    features: int = 3

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features)(nn.relu(nn.Dense(5, name="hidden")(x)))


class AutoEncoder(nn.Module):
    def setup(self):
        self.encoder = MLP(2)
        self.decoder = nn.Dense(4)

    def __call__(self, x):
        return self.decoder(self.encode(x))

    def encode(self, x):
        return self.encoder(x)
