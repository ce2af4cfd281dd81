"""Accepted models: each is derived, validated against its plain self, and read as the attention that it is."""

import math

import jax
import jax.numpy as jnp
import model_zoo as zoo
import numpy as np
import pytest

from distaff.compiler.pipeline import derive, derive_serve_step
from distaff.compiler.validate import float32_products
from distaff.frontend import nnx as distaff_nnx

KERNEL = {
    "causal_where": ("causal", {}),
    "heads_first": ("causal", {}),
    "grouped_late_division": ("causal", {}),
    "softcap_window": ("window", {"window": 6, "softcap": 15.0}),
    "alibi": ("causal", {"alibi": True}),
    "library": ("causal", {}),
    "library_window": ("window", {"window": 5}),
    "numpy_mask": ("causal", {}),
    "chunked": ("custom", {}),
    "every_other": ("custom", {}),
}


def derived(model, params, **options):
    return derive_serve_step(model, params, max_model_len=64, page_size=4, **options)


@pytest.mark.smoke
@pytest.mark.parametrize("name", KERNEL)
def test_attention_becomes_a_kernel_with_its_attributes(name):
    mask, attributes = KERNEL[name]
    model = zoo.decoder(getattr(zoo, name), rope=name != "alibi")
    step = derived(model, zoo.parameters(3))
    assert step.report["validation"]["relative_error"] < 1e-5
    assert len(step.report["attentions"]) == zoo.LAYERS
    for found in step.report["attentions"]:
        assert (found["served_by"], found["mask"]) == ("kernel", mask), found
        assert found["scale"] == pytest.approx(1.0 if name == "grouped_late_division" else zoo.HEAD**-0.5)
        for key, value in attributes.items():
            assert found[key] == value
        assert "model_zoo.py" in found["location"]
    assert [(c.layers, c.shape) for c in step.caches] == [(zoo.LAYERS, (zoo.KV_HEADS, zoo.HEAD))] * 2
    assert step.report["kv_bytes_per_token"] == 2 * zoo.LAYERS * zoo.KV_HEADS * zoo.HEAD * 4


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({"learned": True, "rope": False}, {}),
        ({"scan": True}, {"stacked": True}),
        ({"scan": True, "remat": True}, {"stacked": True}),
        ({"remat": True}, {}),
        ({"feed_forward": zoo.experts_dense}, {"experts": True}),
        ({"feed_forward": zoo.experts_folded}, {"experts": True}),
        ({"last": True}, {}),
    ],
    ids=["learned", "scan", "scan-remat", "remat", "experts", "experts-folded", "last-token"],
)
def test_ways_to_write_a_decoder(options, weights):
    step = derived(zoo.decoder(zoo.causal_where, **options), zoo.parameters(4, **weights))
    assert step.report["validation"]["relative_error"] < 1e-5
    assert {f["served_by"] for f in step.report["attentions"]} == {"kernel"}


def test_attention_without_softmax_is_a_row_program_and_says_why():
    step = derived(zoo.decoder(zoo.sigmoid), zoo.parameters(5))
    for found in step.report["attentions"]:
        assert found["served_by"] == "row program"
        assert "no softmax" in found["reason"] and "model_zoo.py" in found["reason"]
    assert step.report["validation"]["relative_error"] < 1e-5


def test_latent_attention_by_two_products_and_its_latent_cache():
    model, params = zoo.latent_attention(concatenated=False)
    plain = derived(model, params)
    latent = derived(model, params, latent_cache=True)
    assert sorted(c.shape for c in plain.caches) == [(4,), (32,), (32,)]
    assert sorted(c.shape for c in latent.caches) == [(4,), (12,)]
    for step in (plain, latent):
        assert step.report["validation"]["relative_error"] < 1e-5


def test_latent_attention_by_concatenation_is_a_kernel_with_wider_keys():
    step = derived(*zoo.latent_attention(concatenated=True))
    assert [c.shape for c in step.caches] == [(4, 12), (4, 8)]
    assert step.report["attentions"][0]["served_by"] == "kernel"


def test_padding_is_accepted_when_every_row_keeps_its_diagonal():
    def model(params, tokens):
        s = tokens.shape[1]
        i, j = jnp.arange(s)[:, None], jnp.arange(s)[None]
        visible = (((tokens != 3)[:, None, :]) & (j <= i)) | (i == j)
        x = params["embed"][tokens]
        return jax.nn.softmax(jnp.where(visible, x @ x.transpose(0, 2, 1), -1e30)) @ x @ params["head"]

    step = derived(model, zoo.parameters(6))
    assert step.report["attentions"][0]["served_by"] == "row program"
    assert "token data" in step.report["attentions"][0]["reason"]


def test_layers_that_share_keys_and_values_share_a_cache():
    def model(params, tokens):
        x = params["embed"][tokens]
        s = tokens.shape[1]
        q, k, v = ((x @ params["layers"][0][n]).reshape(1, s, -1, zoo.HEAD) for n in "qkv")
        for p in params["layers"]:
            x = x + zoo.causal_where(q, k, v).reshape(1, s, -1) @ p["o"]
            q = (x @ p["q"]).reshape(1, s, zoo.HEADS, zoo.HEAD)
        return x @ params["head"]

    step = derived(model, zoo.parameters(8))
    assert len(step.report["attentions"]) == zoo.LAYERS
    assert [c.layers for c in step.caches] == [1, 1]


def test_the_tail_runs_on_sampled_tokens_only():
    """The last layer's MLP and the vocabulary product take S rows, not T."""
    step = derived(zoo.decoder(zoo.causal_where), zoo.parameters(9))
    shapes = _dot_shapes(step, tokens=32, rows=4, samples=3)
    mlp, vocabulary = ([s for s in shapes if s[-1] == size] for size in (zoo.MLP, zoo.VOCAB))
    assert sorted(32 in s for s in mlp) == [False, False, True, True]  # gate and up of the last and the first layer
    assert all(32 in s or 3 in s for s in mlp)
    assert len(vocabulary) == 1 and 3 in vocabulary[0] and 32 not in vocabulary[0]


def _dot_shapes(step, *, tokens, rows, samples):
    from distaff.kernels.paged_attention import StepBatch

    def i32(*shape):
        return jax.ShapeDtypeStruct(shape, np.int32)

    batch = StepBatch(
        i32(tokens), i32(tokens), i32(tokens), i32(tokens), i32(rows + 1), i32(rows), i32(rows, 16), i32(), i32(samples)
    )
    weights = [jax.ShapeDtypeStruct(np.shape(w), w.dtype) for w in step.weights.values()]
    pages = [jax.ShapeDtypeStruct((c.layers, 8, 4, *c.shape), np.float32) for c in step.caches]
    jaxpr = jax.make_jaxpr(step.function)(weights, pages, batch)
    return [e.outvars[0].aval.shape for e in jaxpr.jaxpr.eqns if e.primitive.name == "dot_general"]


def test_modules_are_served_as_they_are():
    nn = pytest.importorskip("flax.linen")
    nnx = pytest.importorskip("flax.nnx")
    eqx = pytest.importorskip("equinox")

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(zoo.VOCAB, zoo.WIDTH)(tokens) + nn.Embed(128, zoo.WIDTH)(jnp.arange(tokens.shape[1]))
            mask = nn.make_causal_mask(tokens)
            for _ in range(2):
                x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x), mask=mask)
                x = x + nn.Dense(zoo.WIDTH)(nn.gelu(nn.Dense(48)(nn.LayerNorm()(x))))
            return nn.Dense(zoo.VOCAB)(x)

    linen = Linen()
    variables = linen.init(jax.random.key(0), jnp.zeros((1, 5), jnp.int32))

    def objects(nnx):
        class Object(nnx.Module):
            def __init__(self, rngs):
                self.embed = nnx.Embed(zoo.VOCAB, zoo.WIDTH, rngs=rngs)
                self.attention = nnx.MultiHeadAttention(4, zoo.WIDTH, num_kv_heads=2, decode=False, rngs=rngs)
                self.head = nnx.Linear(zoo.WIDTH, zoo.VOCAB, rngs=rngs)

            def __call__(self, tokens):
                x = self.embed(tokens)
                return self.head(x + self.attention(x, mask=nnx.make_causal_mask(tokens)))

        definition, state = nnx.split(Object(nnx.Rngs(0)))
        return lambda s, t: nnx.merge(definition, s)(t), state

    class Tree(eqx.Module):
        embed: eqx.nn.Embedding
        attention: eqx.nn.MultiheadAttention
        head: eqx.nn.Linear

        def __call__(self, tokens):
            x = jax.vmap(self.embed)(tokens[0])
            i, j = zoo.grid(tokens.shape[1])
            x = x + self.attention(x, x, x, mask=j <= i)
            return jax.vmap(self.head)(x)[None]

    a, b, c = jax.random.split(jax.random.key(1), 3)
    tree = Tree(
        eqx.nn.Embedding(zoo.VOCAB, zoo.WIDTH, key=a),
        eqx.nn.MultiheadAttention(4, zoo.WIDTH, key=b),
        eqx.nn.Linear(zoo.WIDTH, zoo.VOCAB, key=c),
    )
    arrays, static = eqx.partition(tree, eqx.is_array)
    cases = {
        "linen": (linen.apply, variables),
        "nnx": objects(nnx),
        "distaff's nnx": objects(distaff_nnx),
        "equinox": (lambda p, t: eqx.combine(p, static)(t), arrays),
    }
    for name, (function, params) in cases.items():
        step = derived(function, params)
        assert step.report["validation"]["relative_error"] < 1e-5, name
        assert {f["served_by"] for f in step.report["attentions"]} == {"kernel"}, name
        assert all("test_derive.py" in f["location"] for f in step.report["attentions"]), name


def test_repeated_layers_are_proved_once(monkeypatch):
    from distaff.compiler.passes import attention

    calls = []
    prove = attention.prove_causal
    monkeypatch.setattr(attention, "prove_causal", lambda body, n: (calls.append(n), prove(body, n))[1])
    derive(zoo.decoder(zoo.softcap_window), zoo.parameters(1), max_model_len=4096)
    assert calls == [4096]


@pytest.mark.parametrize("attention", [zoo.causal_where, zoo.softcap_window])
def test_repeated_layers_are_rolled_into_a_loop(attention):
    params = zoo.parameters(2)
    params["layers"] = zoo.parameters(3)["layers"] + zoo.parameters(4)["layers"] + params["layers"]
    step = derived(zoo.decoder(attention), params, roll_layers=True)
    assert step.report["rolled_layers"] == 5  # the last layer's MLP runs on the sampled tokens only
    assert step.report["validation"]["relative_error"] < 1e-5
    assert "layers.0.q.stacked" in step.weights and step.weights["layers.0.q.stacked"].shape[0] == 5
    flat = derived(zoo.decoder(attention), params, roll_layers=False)
    assert flat.report["rolled_layers"] == 0
    assert sum(np.size(w) for w in flat.weights.values()) == sum(np.size(w) for w in step.weights.values())


def test_layers_of_two_kinds_are_rolled_in_pairs():
    params = zoo.parameters(2)
    params["layers"] = [p for seed in range(4) for p in zoo.parameters(seed)["layers"]]
    kinds = [zoo.softcap_window, zoo.causal_where] * 4

    def model(params, tokens):
        x = params["embed"][tokens]
        for p, attention in zip(params["layers"], kinds, strict=True):
            h = zoo.norm(x, p["norm1"])
            q, k, v = ((h @ p[n]).reshape(1, tokens.shape[1], -1, zoo.HEAD) for n in "qkv")
            x = x + attention(q, k, v).reshape(1, tokens.shape[1], -1) @ p["o"]
        return x @ params["head"]

    step = derived(model, params, roll_layers=True)
    assert step.report["rolled_layers"] == 3
    assert step.report["validation"]["relative_error"] < 1e-5


@pytest.mark.parametrize("name", ["grouped_late_division", "every_other"])  # by the kernel, and with a mask of its own
def test_int8_caches_keep_steps_beside_the_values(name):
    step = derived(zoo.decoder(getattr(zoo, name)), zoo.parameters(3), kv_dtype="int8", passages=[range(1, 9)] * 2)
    plain = derived(zoo.decoder(getattr(zoo, name)), zoo.parameters(3))
    assert {c.dtype for c in step.caches} == {"int8"}
    assert [(*c.shape[:-1], c.shape[-1] - 4) for c in step.caches] == [c.shape for c in plain.caches]
    assert step.report["kv_bytes_per_token"] == sum(c.layers * math.prod(c.shape) for c in step.caches)
    assert 1e-4 < step.report["validation"]["relative_error"] < 0.03
    assert step.report["quality_on_text"]["tokens"] == 14


def test_bfloat16_models_cache_bits_on_a_cpu():
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), zoo.parameters(1))
    step = derived(zoo.decoder(zoo.causal_where, rope=False), params)
    assert {c.dtype for c in step.caches} == {"uint16" if jax.default_backend() == "cpu" else "bfloat16"}
    assert step.report["validation"]["relative_error"] < 0.05


def test_the_bound_follows_what_a_platform_makes_of_float32(monkeypatch):
    with jax.default_matmul_precision("default"):
        for platform, expected in {"cpu": "float32", "gpu": "tensorfloat32", "tpu": "bfloat16"}.items():
            monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
            assert float32_products() == expected
    with jax.default_matmul_precision("highest"):
        assert float32_products() == "float32"
