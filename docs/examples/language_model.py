"""Trains a small Llama-like language model on a book, then compiles the trained module and serves it, unchanged.

    python docs/examples/language_model.py --output /tmp/alice
    python docs/examples/language_model.py --output /tmp/alice8 --devices 8

Everything is kept in the output folder: the tokenizer, checkpoints, losses.csv, loss.png and the artifact. Started
again after an interruption (kill -9 too), it goes on from the last checkpoint, to the same losses. The model is written
for training alone, `logits = model(tokens)`; how it lies on several devices is said by the rules at the top, not by it.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import tokenizers
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distaff.compiler import compile_model
from distaff.compiler.buckets import parse_buckets
from distaff.frontend import linen as nn
from distaff.frontend.training import checkpoints
from distaff.frontend.training.train_state import TrainState

BOOK = Path(__file__).parent / "data" / "alice.txt"
END = "<|end|>"

# Where the dimensions of parameters and activations lie on the mesh: the only place that knows of devices.
RULES = (("batch", "data"), ("heads", "model"), ("mlp", "model"), ("vocab", "model"), ("embed", None))


# The model.

Features = int | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the model is."""

    vocab: int
    width: int
    layers: int
    heads: int


def linear(features: Features, names: tuple[str, ...], axis: Features = -1) -> nn.DenseGeneral:
    """A matrix product whose kernel's dimensions have logical names."""
    init = nn.with_logical_partitioning(nn.initializers.normal(0.05), names)
    return nn.DenseGeneral(features, axis=axis, use_bias=False, kernel_init=init)


def rotate(x: jax.Array) -> jax.Array:
    """Rotary position embedding of ``[B, S, heads, D]`` (arXiv:2104.09864)."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * 10_000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Attention(nn.Module):
    """Causal self-attention."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[B, S, width]`` to the same shape."""
        size = x.shape[-1] // self.heads
        query, key, value = (linear((self.heads, size), ("embed", "heads", "head_dim"))(x) for _ in range(3))
        scores = jnp.einsum("bqhd,bkhd->bhqk", rotate(query), rotate(key)) * size**-0.5
        positions = jnp.arange(x.shape[1])
        scores = jnp.where(positions[:, None] >= positions, scores, -jnp.inf)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), value)
        return linear(x.shape[-1], ("heads", "head_dim", "embed"), axis=(-2, -1))(mixed)


class MLP(nn.Module):
    """A gated MLP (arXiv:2002.05202)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[B, S, width]`` to the same shape."""
        gate, up = (linear(3 * x.shape[-1], ("embed", "mlp"))(x) for _ in range(2))
        return linear(x.shape[-1], ("mlp", "embed"))(nn.silu(gate) * up)


class LanguageModel(nn.Module):
    """Tokens in, logits of the next token out."""

    sizes: Sizes

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 ``[B, S]`` to ``[B, S, vocab]``."""
        init = nn.with_logical_partitioning(nn.initializers.normal(0.05), ("vocab", "embed"))
        x = nn.Embed(self.sizes.vocab, self.sizes.width, embedding_init=init)(tokens)
        for _ in range(self.sizes.layers):
            x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
            x = x + Attention(self.sizes.heads)(nn.RMSNorm()(x))
            x = x + MLP()(nn.RMSNorm()(x))
        return linear(self.sizes.vocab, ("embed", "vocab"))(nn.RMSNorm()(x))


# The text.


def make_tokenizer(text: str, vocab: int, folder: Path) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer of ``text``, kept in ``folder`` as Hugging Face files."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator([text], trainer)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
        tokenizer.save(str(file))
    return tokenizers.Tokenizer.from_file(str(file))


def batch_of(tokens: np.ndarray, step: int, batch: int, length: int) -> np.ndarray:
    """int32 ``[batch, length + 1]``: pieces of the text, chosen by the number of the step alone."""
    starts = np.random.default_rng(step).integers(0, len(tokens) - length, batch)
    return tokens[starts[:, None] + np.arange(length + 1)]


# Training.


def mesh_of(devices: int) -> Mesh:
    """Devices as data times model; two of an even number share a model."""
    model = 2 if devices % 2 == 0 else 1
    return jax.make_mesh(
        (devices // model, model), ("data", "model"), devices=jax.devices()[:devices], axis_types=(AxisType.Auto,) * 2
    )


def first_state(model: LanguageModel, mesh: Mesh, steps: int, rate: float, length: int) -> TrainState:
    """The state at step 0, made on the mesh as the rules say."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 20), steps, rate / 10)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))

    def make(key: jax.Array) -> TrainState:
        params = model.init(key, jnp.zeros((1, length), jnp.int32))["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    specs = nn.get_partition_spec(jax.eval_shape(make, jax.random.key(0)))
    return jax.jit(make, out_shardings=nn.logical_to_mesh_sharding(specs, mesh, RULES))(jax.random.key(0))


@partial(jax.jit, donate_argnums=0)
def train_step(state: TrainState, tokens: jax.Array) -> tuple[TrainState, jax.Array]:
    """One step on ``[B, S + 1]`` tokens; the loss is in nats a token."""

    def loss(params: dict) -> jax.Array:
        logits = state.apply_fn({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    value, gradients = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=gradients), value


class LossLog:
    """losses.csv: one row a step. What is there past the step to go on from is dropped."""

    def __init__(self, file: Path, step: int) -> None:
        rows = list(csv.reader(file.open()))[: step + 1] if file.is_file() and step else [["step", "loss"]]
        with file.open("w") as start:
            csv.writer(start).writerows(rows)
        self.file = file.open("a")
        self.losses = [float(loss) for _, loss in rows[1:]]

    def add(self, loss: float) -> None:
        """The loss of the next step."""
        csv.writer(self.file).writerow([len(self.losses), loss])
        self.file.flush()
        self.losses.append(loss)


def train(
    state: TrainState, batch_at: Callable[[int], np.ndarray], mesh: Mesh, output: Path, steps: int, save_every: int
) -> tuple[TrainState, list[float]]:
    """Trains on ``batch_at(step)`` up to step ``steps``, from the last checkpoint in ``output`` if there is one."""
    folder = output / "checkpoints"
    state = checkpoints.restore_checkpoint(folder, state)
    log = LossLog(output / "losses.csv", int(state.step))
    saver = checkpoints.AsyncManager()
    split = NamedSharding(mesh, PartitionSpec("data"))
    columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=steps, completed=int(state.step))
        for step in range(int(state.step), steps):
            with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
                pieces = jax.device_put(batch_at(step), split)
                state, loss = train_step(state, pieces)
            log.add(float(loss))
            bar.update(task, advance=1, description=f"loss {log.losses[-1]:.3f}")
            if (step + 1) % save_every == 0 or step + 1 == steps:
                checkpoints.save_checkpoint(folder, state, step + 1, overwrite=True, async_manager=saver)
    saver.wait_previous_save()
    return state, log.losses


def plot(losses: list[float], file: Path) -> None:
    """Saves the curve of the loss."""
    figure = matplotlib.figure.Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot(losses, linewidth=1)
    axes.set(xlabel="step", ylabel="loss (nats a token)", title="Training loss")
    figure.savefig(file, dpi=120, bbox_inches="tight")


# Serving.


@dataclasses.dataclass(frozen=True)
class TokenizerFolder:
    """The tokenizer's files, for the artifact."""

    folder: Path

    def save(self, folder: Path) -> None:
        """Copies the files."""
        for file in self.folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())


def serve(model: LanguageModel, params: dict, output: Path, end: int, prompt: str, tokens: int) -> None:
    """Compiles the trained module, lets the engine complete ``prompt``, and compares with the module itself."""
    from distaff.runtime import LLM, SamplingParams

    artifact = output / "artifact"
    compile_model(
        lambda params, tokens: model.apply({"params": params}, tokens),
        params,
        output=artifact,
        name="alice",
        max_model_len=256,
        buckets=parse_buckets("decode=1,4 mixed=64x4"),
        eos_token_ids=[end],
        tokenizer=TokenizerFolder(output / "tokenizer"),
        force=True,
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    answer = LLM(artifact).generate([prompt], greedy)[0]
    served = answer.outputs[0]
    print(f"served: {prompt}|{served.text}")
    whole = jnp.array([[*answer.prompt_token_ids, *served.token_ids]])
    best = jnp.argmax(model.apply({"params": params}, whole)[0], axis=-1)[len(answer.prompt_token_ids) - 1 : -1]
    same = best.tolist() == list(served.token_ids)
    if not same:
        raise SystemExit(f"served tokens {list(served.token_ids)} are not the training module's: {best.tolist()}")
    print("every served token is the argmax of the training module's logits")
    print(f"serve it over HTTP: serve-model {artifact}")


@click.command(help=__doc__.replace("\n\n", "\n\n\b\n", 1))
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder for everything that is made.")
@click.option("--steps", default=600, show_default=True)
@click.option("--batch", default=16, show_default=True, help="Pieces of text in a step.")
@click.option("--length", default=96, show_default=True, help="Tokens in a piece.")
@click.option("--width", default=128, show_default=True)
@click.option("--layers", default=4, show_default=True)
@click.option("--heads", default=4, show_default=True)
@click.option("--vocab", default=1024, show_default=True, help="Size of the tokenizer.")
@click.option("--rate", default=3e-3, show_default=True, help="Highest learning rate.")
@click.option("--save-every", default=100, show_default=True, help="Steps between checkpoints.")
@click.option("--devices", default=1, show_default=True, help="Devices; on a CPU, as many are made.")
@click.option("--text", type=click.Path(exists=True, path_type=Path), default=BOOK, help="Another text to train on.")
@click.option("--prompt", default="Alice was beginning to", show_default=True)
@click.option("--tokens", default=32, show_default=True, help="Tokens to generate when the model is served.")
@click.option("--serve/--no-serve", "is_served", default=True, show_default=True)
def main(
    output: Path, steps: int, batch: int, length: int, width: int, layers: int, heads: int, vocab: int, rate: float,
    save_every: int, devices: int, text: Path, prompt: str, tokens: int, is_served: bool,
) -> None:  # fmt: skip
    """Trains, plots, compiles, serves."""
    if devices > 1:
        jax.config.update("jax_num_cpu_devices", devices)
    book = text.read_text(encoding="utf-8")
    tokenizer = make_tokenizer(book, vocab, output / "tokenizer")
    ids = np.array(tokenizer.encode(book).ids, np.int32)
    model = LanguageModel(Sizes(tokenizer.get_vocab_size(), width, layers, heads))
    mesh = mesh_of(devices)
    state = first_state(model, mesh, steps, rate, length)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(f"{len(ids)} tokens of text, {count} parameters, mesh {dict(mesh.shape)}")
    state, losses = train(state, lambda step: batch_of(ids, step, batch, length), mesh, output, steps, save_every)
    plot(losses, output / "loss.png")
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps; see {output / 'loss.png'}")
    if is_served:
        params = jax.device_put(jax.device_get(nn.unbox(state.params)))
        serve(model, params, output, tokenizer.token_to_id(END), prompt, tokens)


if __name__ == "__main__":
    main()
