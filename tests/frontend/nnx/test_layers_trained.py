"""A model of many layers, trained with dropout and batch statistics by either library: the same losses and outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff.frontend import nnx


def trained(nnx, optax):
    class Classifier(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.dropout = nnx.Dropout(0.3, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(
                2, 4, decode=False, dropout_rate=0.1, deterministic=False, rngs=rngs
            )
            self.rnn = nnx.RNN(nnx.LSTMCell(4, 8, rngs=rngs))
            self.out = nnx.LoRALinear(8, 3, lora_rank=2, rngs=rngs)

        def __call__(self, x):
            x = nnx.avg_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), (2, 2))
            x = self.dropout(x).reshape(x.shape[0], -1, 4)
            return self.out(self.rnn(x + self.attention(x))[:, -1])

    abstract = nnx.eval_shape(lambda: Classifier(nnx.Rngs(0)))
    assert isinstance(abstract.conv.kernel.get_raw_value(), jax.ShapeDtypeStruct)
    model = Classifier(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, labels):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 1)), jnp.float32)
    losses = [step(model, optimizer, x, jnp.array([0, 1, 2, 0])) for _ in range(4)]
    model.eval()
    return np.asarray(losses), np.asarray(model(x))


def test_training(flax_nnx):
    optax = pytest.importorskip("optax")
    (losses, logits), (expected_losses, expected) = trained(nnx, optax), trained(flax_nnx, optax)
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
