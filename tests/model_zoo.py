"""Small plain models for compiler tests: one decoder with interchangeable attention, feed-forward and positions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, HEADS, KV_HEADS, HEAD, MLP, LAYERS, EXPERTS = 61, 24, 6, 2, 8, 40, 2, 4
Array = jax.Array
Attention = Callable[[Array, Array, Array], Array]


def parameters(seed: int = 0, *, experts: bool = False, stacked: bool = False) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def weight(*shape: int) -> Array:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2] if len(shape) > 1 else 4), jnp.float32)

    def layer() -> dict[str, Array]:
        p = {
            "norm1": 1 + weight(WIDTH) / 8,
            "norm2": 1 + weight(WIDTH) / 8,
            "q": weight(WIDTH, HEADS * HEAD),
            "k": weight(WIDTH, KV_HEADS * HEAD),
            "v": weight(WIDTH, KV_HEADS * HEAD),
            "o": weight(HEADS * HEAD, WIDTH),
            "gate": weight(WIDTH, MLP),
            "up": weight(WIDTH, MLP),
            "down": weight(MLP, WIDTH),
        }
        if experts:
            p |= {
                "router": weight(WIDTH, EXPERTS),
                "gates": weight(EXPERTS, WIDTH, MLP),
                "ups": weight(EXPERTS, WIDTH, MLP),
                "downs": weight(EXPERTS, MLP, WIDTH),
            }
        return p

    layers: Any = [layer() for _ in range(LAYERS)]
    if stacked:
        layers = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    return {
        "embed": weight(VOCAB, WIDTH),
        "learned": weight(256, WIDTH),
        "head": weight(WIDTH, VOCAB),
        "layers": layers,
    }


def norm(x: Array, weight: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * weight


def rotate(x: Array) -> Array:
    """Rotary positions for [1, S, H, D]."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * 50.0 ** (-jnp.arange(half) / half)
    sin, cos = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def grid(length: int) -> tuple[Array, Array]:
    positions = jnp.arange(length)
    return positions[:, None], positions[None, :]


def repeated(*arrays: Array) -> list[Array]:
    return [jnp.repeat(a, HEADS // KV_HEADS, axis=2) for a in arrays]


def scores_of(q: Array, k: Array) -> Array:
    return jnp.einsum("bqhd,bkhd->bhqk", q, k) * HEAD**-0.5


def weigh(weights: Array, v: Array) -> Array:
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def causal_where(q: Array, k: Array, v: Array) -> Array:
    k, v = repeated(k, v)
    i, j = grid(q.shape[1])
    return weigh(jax.nn.softmax(jnp.where(j <= i, scores_of(q, k), -1e30)), v)


def heads_first(q: Array, k: Array, v: Array) -> Array:
    k, v = repeated(k, v)
    q, k, v = (a.transpose(0, 2, 1, 3) for a in (q, k, v))
    mask = jnp.tril(jnp.ones((q.shape[2], q.shape[2]), bool))
    weights = jax.nn.softmax(jnp.where(mask, q @ k.transpose(0, 1, 3, 2) / np.sqrt(HEAD), -jnp.inf))
    return (weights @ v).transpose(0, 2, 1, 3)


def grouped_late_division(q: Array, k: Array, v: Array) -> Array:
    b, s, _, _ = q.shape
    q = q.reshape(b, s, KV_HEADS, HEADS // KV_HEADS, HEAD) * HEAD**-0.5
    i, j = grid(s)
    x = jnp.einsum("bqngd,bknd->bngqk", q, k) + jnp.where(j > i, jnp.finfo(jnp.float32).min, 0.0)
    e = jnp.exp(x - x.max(-1, keepdims=True))
    out = jnp.einsum("bngqk,bknd->bqngd", e, v) / e.sum(-1).transpose(0, 3, 1, 2)[..., None]
    return out.reshape(b, s, HEADS, HEAD)


def softcap_window(q: Array, k: Array, v: Array) -> Array:
    k, v = repeated(k, v)
    i, j = grid(q.shape[1])
    x = 15.0 * jnp.tanh(scores_of(q, k) / 15.0)
    return weigh(jax.nn.softmax(jnp.where((j <= i) & (i - j < 6), x, -jnp.inf)), v)


def alibi(q: Array, k: Array, v: Array) -> Array:
    k, v = repeated(k, v)
    i, j = grid(q.shape[1])
    slopes = 2.0 ** -jnp.arange(1, HEADS + 1)
    x = scores_of(q, k) - slopes[:, None, None] * (i - j).astype(jnp.float32)
    return weigh(jax.nn.softmax(x + jnp.triu(jnp.full(x.shape[-2:], -1e9), 1)), v)


def library(q: Array, k: Array, v: Array) -> Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def library_window(q: Array, k: Array, v: Array) -> Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=(4, 0))


def numpy_mask(q: Array, k: Array, v: Array) -> Array:
    k, v = repeated(k, v)
    mask = np.tril(np.ones((q.shape[1], q.shape[1]), bool))
    return weigh(jax.nn.softmax(jnp.where(mask, scores_of(q, k), -1e30)), v)


def sigmoid(q: Array, k: Array, v: Array) -> Array:
    k, v = repeated(k, v)
    i, j = grid(q.shape[1])
    return weigh(jnp.where(j <= i, jax.nn.sigmoid(scores_of(q, k)), 0.0), v)


def chunked(q: Array, k: Array, v: Array) -> Array:
    k, v = repeated(k, v)
    i, j = grid(q.shape[1])
    return weigh(jax.nn.softmax(jnp.where((j <= i) & (i // 5 == j // 5), scores_of(q, k), -1e30)), v)


def every_other(q: Array, k: Array, v: Array) -> Array:
    k, v = repeated(k, v)
    i, j = grid(q.shape[1])
    return weigh(jax.nn.softmax(jnp.where((j <= i) & ((i - j) % 2 == 0), scores_of(q, k), -1e30)), v)


def unmasked(q: Array, k: Array, v: Array) -> Array:
    k, v = repeated(k, v)
    return weigh(jax.nn.softmax(scores_of(q, k)), v)


def prefix(q: Array, k: Array, v: Array) -> Array:
    k, v = repeated(k, v)
    i, j = grid(q.shape[1])
    return weigh(jax.nn.softmax(jnp.where((j <= i) | (j < 40), scores_of(q, k), -1e30)), v)


def linear_unmasked(q: Array, k: Array, v: Array) -> Array:
    k, v = repeated(k, v)
    return jnp.einsum("bqhd,bhde->bqhe", q, jnp.einsum("bkhd,bkhe->bhde", k, v))


def over_queries(q: Array, k: Array, v: Array) -> Array:
    k, v = repeated(k, v)
    i, j = grid(q.shape[1])
    return weigh(jax.nn.softmax(jnp.where(j <= i, scores_of(q, k), -1e30), axis=-2), v)


def dense(x: Array, p: dict[str, Array]) -> Array:
    return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def experts_dense(x: Array, p: dict[str, Array]) -> Array:
    weights, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
    gates = (jax.nn.one_hot(chosen, EXPERTS) * weights[..., None]).sum(-2)
    h = jax.nn.silu(jnp.einsum("bsd,edf->bsef", x, p["gates"])) * jnp.einsum("bsd,edf->bsef", x, p["ups"])
    return jnp.einsum("bsef,efd,bse->bsd", h, p["downs"], gates)


def experts_folded(x: Array, p: dict[str, Array]) -> Array:
    b, s, d = x.shape
    return experts_dense(x.reshape(1, b * s, d), p).reshape(b, s, d)


def experts_with_capacity(x: Array, p: dict[str, Array]) -> Array:
    chosen = jax.nn.one_hot(jnp.argmax(x @ p["router"], -1), EXPERTS)
    place = jnp.cumsum(chosen, 1) * chosen
    h = jax.nn.silu(jnp.einsum("bsd,edf->bsef", x, p["gates"]))
    return jnp.einsum("bsef,efd,bse->bsd", h, p["downs"], (place <= 4) * chosen)


def decoder(
    attention: Attention,
    *,
    rope: bool = True,
    learned: bool = False,
    feed_forward: Callable[[Array, dict[str, Array]], Array] = dense,
    scan: bool = False,
    remat: bool = False,
    last: bool = False,
) -> Callable[[Any, Array], Array]:
    """``logits = model(params, tokens)``, as one would write it for training."""

    def model(params: Any, tokens: Array) -> Array:
        b, s = tokens.shape
        x = params["embed"][tokens]
        if learned:
            x = x + params["learned"][:s]

        def block(x: Array, p: dict[str, Array]) -> Array:
            h = norm(x, p["norm1"])
            q, k, v = (
                (h @ p[n]).reshape(b, s, count, HEAD) for n, count in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
            )
            if rope:
                q, k = rotate(q), rotate(k)
            x = x + attention(q, k, v).reshape(b, s, HEADS * HEAD) @ p["o"]
            return x + feed_forward(norm(x, p["norm2"]), p)

        if remat:
            block = jax.checkpoint(block)
        if scan:
            x, _ = jax.lax.scan(lambda c, p: (block(c, p), None), x, params["layers"])
        else:
            for p in params["layers"]:
                x = block(x, p)
        if last:
            x = x[:, -1]
        return x @ params["head"]

    return model


def latent_attention(concatenated: bool) -> tuple[Callable[[Any, Array], Array], dict[str, Any]]:
    """Multi-head latent attention, written naively: keys and values are expanded from a narrow latent."""
    rng = np.random.default_rng(7)
    rank, rope, heads, head = 12, 4, 4, 8

    def weight(*shape: int) -> Array:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)

    params = {
        "embed": weight(VOCAB, WIDTH),
        "head": weight(WIDTH, VOCAB),
        "q": weight(WIDTH, heads * (head + rope)),
        "down": weight(WIDTH, rank),
        "rope": weight(WIDTH, rope),
        "key": weight(rank, heads * head),
        "value": weight(rank, heads * head),
        "out": weight(heads * head, WIDTH),
    }

    def model(p: Any, tokens: Array) -> Array:
        b, s = tokens.shape
        x = p["embed"][tokens]
        q = (x @ p["q"]).reshape(b, s, heads, head + rope)
        plain, turned = q[..., :head], rotate(q[..., head:])
        latent, shared = x @ p["down"], rotate((x @ p["rope"])[:, :, None])
        k, v = ((latent @ p[n]).reshape(b, s, heads, head) for n in ("key", "value"))
        if concatenated:
            k = jnp.concatenate([k, jnp.broadcast_to(shared, (b, s, heads, rope))], -1)
            scores = jnp.einsum("bqhd,bkhd->bhqk", jnp.concatenate([plain, turned], -1), k)
        else:
            scores = jnp.einsum("bqhd,bkhd->bhqk", plain, k) + jnp.einsum("bqhd,bkd->bhqk", turned, shared[:, :, 0])
        i, j = grid(s)
        weights = jax.nn.softmax(jnp.where(j <= i, scores * (head + rope) ** -0.5, -1e30))
        return (x + weigh(weights, v).reshape(b, s, -1) @ p["out"]) @ p["head"]

    return model, params
