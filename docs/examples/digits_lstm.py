"""Trains an LSTM to read scikit-learn's 8 x 8 digits row by row, and stops when that no longer helps.

python docs/examples/digits_lstm.py
"""

from __future__ import annotations

from functools import partial

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from sklearn.datasets import load_digits

from distaff.frontend import linen as nn
from distaff.frontend.training.early_stopping import EarlyStopping
from distaff.frontend.training.train_state import TrainState


class RowReader(nn.Module):
    """An LSTM over the rows; its last output names the digit."""

    features: int

    @nn.compact
    def __call__(self, rows: jax.Array) -> jax.Array:
        """``[B, 8, 8]`` to logits ``[B, 10]``."""
        outputs = nn.RNN(nn.OptimizedLSTMCell(self.features))(rows)
        return nn.Dense(10)(outputs[:, -1])


@partial(jax.jit, donate_argnums=0)
def train_step(state: TrainState, rows: jax.Array, labels: jax.Array) -> tuple[TrainState, jax.Array]:
    """One step on a batch; the loss is cross entropy."""

    def loss(params: dict) -> jax.Array:
        logits = state.apply_fn({"params": params}, rows)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, gradients = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=gradients), value


@jax.jit
def evaluate(state: TrainState, rows: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Loss and accuracy."""
    logits = state.apply_fn({"params": state.params}, rows)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, (jnp.argmax(logits, -1) == labels).mean()


@click.command(help=__doc__.replace("\n\n", "\n\n\b\n", 1))
@click.option("--epochs", default=40, show_default=True, help="At most.")
@click.option("--patience", default=3, show_default=True, help="Epochs in a row without a better loss.")
@click.option("--features", default=64, show_default=True)
@click.option("--batch", default=64, show_default=True)
@click.option("--rate", default=5e-3, show_default=True, help="Learning rate.")
@click.option("--seed", default=0, show_default=True)
def main(epochs: int, patience: int, features: int, batch: int, rate: float, seed: int) -> None:
    """Trains and prints loss and accuracy on digits that were kept back."""
    digits = load_digits()
    rows, labels = (digits.images / 16).astype(np.float32), digits.target.astype(np.int32)
    test_rows, test_labels, rows, labels = rows[:360], labels[:360], rows[360:], labels[360:]

    model = RowReader(features)
    params = model.init(jax.random.key(seed), rows[:1])["params"]
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    order, stopping = np.random.default_rng(seed), EarlyStopping(min_delta=1e-3, patience=patience)
    for epoch in track(range(epochs), "training", console=Console(stderr=True)):
        for chosen in np.split(order.permutation(len(labels)), range(batch, len(labels), batch))[:-1]:
            state, _ = train_step(state, rows[chosen], labels[chosen])
        loss, accuracy = evaluate(state, test_rows, test_labels)
        print(f"epoch {epoch + 1}: loss {loss:.3f}, accuracy {accuracy:.3f}")
        stopping = stopping.update(float(loss))
        if stopping.should_stop:
            print(f"stopped: no better loss for {stopping.patience_count} epochs")
            break


if __name__ == "__main__":
    main()
