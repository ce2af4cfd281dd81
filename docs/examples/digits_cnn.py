"""Trains a small convolutional network with batch normalisation and dropout on scikit-learn's 8 x 8 digits.

    python docs/examples/digits_cnn.py

It shows state beside the parameters (`batch_stats`), random keys for dropout, and an exponential moving average of the
parameters, which is evaluated too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from sklearn.datasets import load_digits

from distaff.frontend import linen as nn
from distaff.frontend.training import train_state


class CNN(nn.Module):
    """Two convolutions, then one layer."""

    features: tuple[int, ...] = (16, 32)
    dropout: float = 0.3

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """``[B, 8, 8, 1]`` to logits ``[B, 10]``."""
        x = images
        for features in self.features:
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.max_pool(nn.relu(x), (2, 2), strides=(2, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x.reshape(x.shape[0], -1))
        return nn.Dense(10)(x)


class TrainState(train_state.TrainState):
    """The usual state, with the statistics of batch normalisation and an average of the parameters."""

    batch_stats: Any
    average: optax.EmaState


AVERAGE = optax.ema(0.95)


@partial(jax.jit, donate_argnums=0)
def train_step(state: TrainState, images: jax.Array, labels: jax.Array, key: jax.Array) -> tuple[TrainState, jax.Array]:
    """One step on a batch; the loss is cross entropy."""

    def loss(params: dict) -> tuple[jax.Array, dict]:
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            rngs={"dropout": jax.random.fold_in(key, state.step)},
            mutable=["batch_stats"],
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

    (value, updates), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
    state = state.apply_gradients(grads=gradients, batch_stats=updates["batch_stats"])
    _, average = AVERAGE.update(state.params, state.average)
    return state.replace(average=average), value


def accuracy(state: TrainState, params: dict, images: np.ndarray, labels: np.ndarray) -> float:
    """The share of images that the network with ``params`` names rightly."""
    logits = state.apply_fn({"params": params, "batch_stats": state.batch_stats}, images, train=False)
    return float((jnp.argmax(logits, -1) == labels).mean())


@click.command(help=__doc__.replace("\n\n", "\n\n\b\n", 1))
@click.option("--epochs", default=10, show_default=True)
@click.option("--batch", default=64, show_default=True)
@click.option("--rate", default=3e-3, show_default=True, help="Learning rate.")
@click.option("--seed", default=0, show_default=True)
def main(epochs: int, batch: int, rate: float, seed: int) -> None:
    """Trains and prints accuracies on images that were kept back."""
    digits = load_digits()
    images, labels = (digits.images[..., None] / 16).astype(np.float32), digits.target.astype(np.int32)
    held_out = slice(0, 360)
    test_images, test_labels, images, labels = images[held_out], labels[held_out], images[360:], labels[360:]

    model = CNN()
    variables = model.init(jax.random.key(seed), images[:1], train=False)
    state = TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=optax.adamw(rate),
        batch_stats=variables["batch_stats"],
        average=AVERAGE.init(variables["params"]),
    )
    order, key = np.random.default_rng(seed), jax.random.key(seed + 1)
    for epoch in track(range(epochs), "training", console=Console(stderr=True)):
        losses = []
        for chosen in np.split(order.permutation(len(labels)), range(batch, len(labels), batch))[:-1]:
            state, loss = train_step(state, images[chosen], labels[chosen], key)
            losses.append(loss)
        print(
            f"epoch {epoch + 1}: loss {np.mean(losses):.3f}, "
            f"accuracy {accuracy(state, state.params, test_images, test_labels):.3f}"
        )
    averaged = optax.tree.bias_correction(state.average.ema, 0.95, state.average.count)
    print(f"accuracy of the averaged parameters: {accuracy(state, averaged, test_images, test_labels):.3f}")


if __name__ == "__main__":
    main()
