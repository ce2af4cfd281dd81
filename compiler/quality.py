"""What number formats cost a model: perplexity and agreement on a text, packed weights against plain ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.compiler.serve_step import ServeStep
from distaff.compiler.validate import serve


@dataclasses.dataclass(frozen=True)
class Quality:
    """Over ``tokens`` predictions of a text: how often the most likely token is the plain model's, and perplexities."""

    tokens: int
    top1_agreement: float
    perplexity: float
    plain_perplexity: float


def compare_on_text(
    step: ServeStep,
    plain: Callable[[Any, Any], Any],
    params: Any,
    passages: Sequence[Sequence[int]],
    *,
    max_model_len: int,
    page_size: int,
    seed: int = 0,
) -> Quality:
    """Runs both on up to four ``passages`` (token ids of equal length) and compares their predictions."""
    rng = np.random.default_rng(seed)
    prompts = [np.asarray(passage, np.int32) for passage in passages]
    served = serve(step, prompts, max_model_len=max_model_len, page_size=page_size, rng=rng)
    function = jax.jit(plain)
    agreed, losses, plain_losses = [], [], []
    for prompt, logits in zip(prompts, served, strict=True):
        wanted = np.asarray(function(params, jnp.asarray(prompt[None])), np.float32).reshape(len(prompt), -1)
        agreed.append(logits[:-1].argmax(-1) == wanted[:-1].argmax(-1))
        losses.append(_losses(logits[:-1], prompt[1:]))
        plain_losses.append(_losses(wanted[:-1], prompt[1:]))
    return Quality(
        tokens=sum(map(len, agreed)),
        top1_agreement=float(np.concatenate(agreed).mean()),
        perplexity=float(np.exp(np.concatenate(losses).mean())),
        plain_perplexity=float(np.exp(np.concatenate(plain_losses).mean())),
    )


def _losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each target."""
    highest = logits.max(-1, keepdims=True)
    total = np.log(np.exp(logits - highest).sum(-1)) + highest[:, 0]
    losses: np.ndarray = total - logits[np.arange(len(targets)), targets]
    return losses
