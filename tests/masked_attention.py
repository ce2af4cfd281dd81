"""Small attentions that apply one mask in many spellings, for tests of the causality prover."""

import functools

import jax
import jax.numpy as jnp

HEADS, HEAD = 2, 4
LEAVES = (("q", HEADS, HEAD), ("k", HEADS, HEAD), ("k", HEADS, HEAD))
LOWEST = float(jnp.finfo(jnp.float32).min)


def positions(q, k):
    return jnp.arange(q.shape[0])[:, None], jnp.arange(k.shape[0])[None, :]


def scores_of(q, k):
    return jnp.einsum("qhd,khd->hqk", q, k) * HEAD**-0.5


def weigh(p, v):
    return jnp.einsum("hqk,khd->qhd", p, v)


def softmax_attention(hide, mask, q, k, v):
    """Attention whose scores go through ``hide(scores, mask)``."""
    return weigh(jax.nn.softmax(hide(scores_of(q, k), mask(*positions(q, k)))), v)


def softmax_where(mask, q, k, v):
    return weigh(jax.nn.softmax(scores_of(q, k), where=mask(*positions(q, k))), v)


def sigmoid_where(mask, q, k, v):
    return weigh(jnp.where(mask(*positions(q, k)), jax.nn.sigmoid(scores_of(q, k)), 0), v)


def sigmoid_below(mask, q, k, v):
    return weigh(jax.nn.sigmoid(jnp.where(mask(*positions(q, k)), scores_of(q, k), -1e9)), v)


def linear_times(mask, q, k, v):
    return weigh(scores_of(q, k) * mask(*positions(q, k)).astype(jnp.float32), v)


def divided_after(mask, q, k, v):
    s = jnp.where(mask(*positions(q, k)), scores_of(q, k), -jnp.inf)
    p = jnp.exp2(s - s.max(-1, keepdims=True))
    return weigh(p, v) / p.sum(-1).T[..., None]


def gpt2(mask, q, k, v):
    m = mask(*positions(q, k)).astype(jnp.float32)
    return weigh(jax.nn.softmax(scores_of(q, k) * m - 1e10 * (1 - m)), v)


def capped_and_half(mask, q, k, v):
    """Softcap, bfloat16 scores, mask value of bfloat16, softmax in float32."""
    s = (20 * jnp.tanh(scores_of(q, k) / 20)).astype(jnp.bfloat16)
    s = jnp.where(mask(*positions(q, k)), s, jnp.finfo(jnp.bfloat16).min)
    return weigh(jax.nn.softmax(s.astype(jnp.float32)).astype(jnp.bfloat16), v)


# name -> (attention(mask, q, k, v), whether a row without keys attends to everything)
STYLES = {
    "where -inf": (functools.partial(softmax_attention, lambda s, m: jnp.where(m, s, -jnp.inf)), False),
    "where lowest": (functools.partial(softmax_attention, lambda s, m: jnp.where(m, s, LOWEST)), True),
    "where -1e30": (functools.partial(softmax_attention, lambda s, m: jnp.where(~m, -1e30, s)), True),
    "plus -1e9": (functools.partial(softmax_attention, lambda s, m: s + jnp.where(m, 0.0, -1e9)), True),
    "plus -inf": (functools.partial(softmax_attention, lambda s, m: s + jnp.where(m, 0.0, -jnp.inf)), False),
    "float mask": (functools.partial(softmax_attention, lambda s, m: s + (1 - m.astype(jnp.float32)) * -1e9), True),
    "lowest plus log": (functools.partial(softmax_attention, lambda s, m: s + jnp.log(m.astype(jnp.float32))), False),
    "gpt2": (gpt2, True),
    "bfloat16": (capped_and_half, True),
    "divided after": (divided_after, False),
    "softmax where": (softmax_where, False),
    "sigmoid where": (sigmoid_where, False),
    "sigmoid below": (sigmoid_below, False),
    "linear": (linear_times, False),
}


def causal(i, j):
    return j <= i


def windowed(w):
    return lambda i, j: (j <= i) & (i - j < w)


where_lowest = STYLES["where lowest"][0]
