"""Products with weights: what is folded into them, what is read as a norm, an activation or a rotation, and packing."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import model_zoo as zoo
import numpy as np
import pytest

from distaff.compiler.ir import ATTENTION, EMBED, MATMUL
from distaff.compiler.lowering import joined
from distaff.compiler.lowering.joined import Joined, ProgramWeights
from distaff.compiler.passes import cleanup
from distaff.compiler.passes.pack import WeightFormats
from distaff.compiler.pipeline import derive, derive_serve_step
from distaff.kernels import native, survey
from distaff.kernels.matmul import WeightFormat
from distaff.kernels.matmul import formats as matmul_formats
from distaff.kernels.matmul.pieces import as_array


def formats(matrices, tables=None):
    return WeightFormats(WeightFormat.parse(matrices), WeightFormat.parse(tables or matrices))


def raised(model, params, max_model_len=64):
    nodes = derive(model, params, max_model_len=max_model_len, raise_products=True).plan.graph.nodes
    return nodes, [n.params["spec"] for n in nodes if n.op == MATMUL]


def served(model, params, matrices="f32", **options):
    step = derive_serve_step(model, params, max_model_len=64, page_size=4, weight_formats=formats(matrices), **options)
    return step.report


@pytest.mark.smoke
def test_a_decoder_becomes_four_products_a_layer():
    nodes, specs = raised(zoo.decoder(zoo.causal_where), zoo.parameters(3))
    layer = [
        (("x", "weight", "weight", "weight", "norm"), (48, 16, 16), None),
        (("x", "weight", "residual"), (24,), None),
        (("x", "weight", "weight", "norm"), (40, 40), "silu"),
        (("x", "weight", "residual"), (24,), None),
    ]
    found = [(s.operands, s.columns, s.activation) for s in specs]
    assert found == layer * zoo.LAYERS + [(("x", "weight"), (zoo.VOCAB,), None)]
    assert all(s.norm_epsilon == pytest.approx(1e-6) for s in specs if "norm" in s.operands)
    assert [n.op for n in nodes].count(EMBED) == 1
    rotaries = [n.params["spec"].rotary for n in nodes if n.op == ATTENTION]
    assert [(r.kind, r.size) for r in rotaries] == [("half", zoo.HEAD)] * zoo.LAYERS
    left = {n.op for n in nodes} - {MATMUL, EMBED, ATTENTION}
    assert not left & {"dot_general", "rsqrt", "logistic", "cos", "concatenate"}


@pytest.mark.parametrize("serving", ["paged", "row-program"])
def test_products_read_their_weights_from_one_buffer(serving, monkeypatch):
    model = zoo.decoder(zoo.causal_where if serving == "paged" else zoo.every_other)
    options = {"max_model_len": 64, "page_size": 4, "weight_formats": formats("int8", "bf16")}
    step = derive_serve_step(model, zoo.parameters(3), **options)
    weights = ProgramWeights(step, "cpu")
    if not native.available():
        assert list(weights.arrays) == list(step.weights)
        return
    buffers = [name for name, array in weights.arrays.items() if isinstance(array, Joined)]
    assert len(buffers) == 1 and len(weights.arrays) < 6 < len(step.of_products)
    operands = weights.of_step([jnp.asarray(np.asarray(array)) for array in weights.arrays.values()])
    for operand, array in zip(operands, step.weights.values(), strict=True):
        np.testing.assert_array_equal(as_array(operand), array)
    assert list(ProgramWeights(step, "tpu").arrays) == list(step.weights)
    monkeypatch.setattr(joined, "MAX_BUFFER_BYTES", 4000)
    several = ProgramWeights(step, "cpu").arrays.values()
    assert sum(isinstance(array, Joined) for array in several) > 1
    assert max(array.nbytes for array in several) <= 4032


VARIANTS = {
    "experts": (zoo.decoder(zoo.causal_where, feed_forward=zoo.experts_dense), {"experts": True}),
    "last-token": (zoo.decoder(zoo.causal_where, last=True), {}),
    "learned": (zoo.decoder(zoo.causal_where, rope=False, learned=True), {}),
    "row-program": (zoo.decoder(zoo.every_other), {}),
    "scan": (zoo.decoder(zoo.softcap_window, scan=True), {"stacked": True}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_models_are_served_right(name):
    model, options = VARIANTS[name]
    report = served(model, zoo.parameters(1, **options))
    assert report["validation"]["relative_error"] < 1e-5
    assert report["validation_of_packed_weights"]["relative_error"] < 1e-5


def feed_forward_of(activation, gate_first=True):
    def layer(x, p):
        gate, up = activation(x @ p["gate"]), x @ p["up"]
        return (gate * up if gate_first else up * gate) @ p["down"]

    return layer


ACTIVATIONS = {
    "silu": lambda x: x / (1 + jnp.exp(-x)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: x * jax.scipy.stats.norm.cdf(x),
    "relu": lambda x: jnp.maximum(x, 0),
    None: lambda x: jnp.where(x > 0, x, 0.01 * x),
}


@pytest.mark.parametrize("name", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("gate_first", [True, False])
def test_activations_are_read_by_what_they_compute(name, gate_first):
    feed_forward = feed_forward_of(ACTIVATIONS[name], gate_first)
    _, specs = raised(zoo.decoder(zoo.causal_where, feed_forward=feed_forward), zoo.parameters(5))
    assert {s.activation for s in specs} == {None, name}
    assert sum(s.gated for s in specs) == (zoo.LAYERS if name else 0)


def norm_by_division(x, weight):
    return weight * (x / jnp.sqrt((x**2).sum(-1, keepdims=True) / x.shape[-1] + 1e-6))


def norm_in_other_words(x, weight):
    return x * (jnp.mean(x * x, -1, keepdims=True) + 1e-6) ** -0.5 * weight


def norm_less_the_mean(x, weight):
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * weight


@pytest.mark.parametrize("norm", [norm_by_division, norm_in_other_words, norm_less_the_mean])
def test_norms_are_read_by_what_they_compute(norm, monkeypatch):
    monkeypatch.setattr(zoo, "norm", norm)
    _, specs = raised(zoo.decoder(zoo.causal_where), zoo.parameters(5))
    assert sum("norm" in s.operands for s in specs) == 2 * zoo.LAYERS  # the mean is taken off before, by itself


def turned_pairs(x):
    angles = jnp.arange(x.shape[1])[:, None] * 50.0 ** (-jnp.arange(x.shape[-1] // 2) / 4)
    sin, cos = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
    a, b = x[..., ::2], x[..., 1::2]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)


def turned_in_part(x):
    return jnp.concatenate([rotate(x[..., :4]), x[..., 4:]], -1)


def stretched(x):
    return rotate(x) * (1 + jnp.arange(x.shape[1]))[:, None, None]


def bent(x):
    return jnp.tanh(rotate(x))


rotate = zoo.rotate


@pytest.mark.parametrize(
    ("turn", "wanted"),
    [(turned_pairs, ("interleaved", 8)), (turned_in_part, ("half", 4)), (stretched, ("half", 8)), (bent, None)],
)
def test_rotations_are_read_by_what_they_compute(turn, wanted, monkeypatch):
    monkeypatch.setattr(zoo, "rotate", turn)
    model, params = zoo.decoder(zoo.causal_where), zoo.parameters(2)
    nodes, _ = raised(model, params)
    for node in nodes:
        if node.op == ATTENTION:
            rotary = node.params["spec"].rotary
            assert (rotary and (rotary.kind, rotary.size)) == wanted
    if wanted:
        assert served(model, params)["validation"]["relative_error"] < 1e-5


def biased(params, tokens):
    x = params["embed"][tokens]
    h = jax.nn.relu(x @ params["in"] + params["in_bias"])
    x = x + (h @ params["out"] + params["out_bias"])
    q, k, v = ((x @ params[n] + params[f"{n}_bias"]).reshape(1, -1, 2, 16) for n in "qkv")
    i, j = zoo.grid(tokens.shape[1])
    weights = jax.nn.softmax(jnp.where(j <= i, jnp.einsum("bqhd,bkhd->bhqk", q, k), -jnp.inf))
    return (x + zoo.weigh(weights, v).reshape(x.shape)) @ params["embed"].T


def biased_parameters(seed=0):
    rng = np.random.default_rng(seed)
    sizes = {"in": (32, 48), "out": (48, 32), "q": (32, 32), "k": (32, 32), "v": (32, 32)}
    params = {name: rng.normal(size=size) / 6 for name, size in sizes.items()}
    params |= {f"{name}_bias": rng.normal(size=size[1]) for name, size in sizes.items()}
    return jax.tree.map(jnp.float32, params | {"embed": rng.normal(size=(61, 32))})


@pytest.mark.smoke
def test_biases_activations_and_residuals_are_folded():
    _, specs = raised(biased, biased_parameters())
    assert [(s.operands, s.activation) for s in specs] == [
        (("x", "weight", "bias"), "relu"),
        (("x", "weight", "bias", "residual"), None),
        (("x", "weight", "weight", "weight", "bias"), None),
        (("x", "weight"), None),
    ]


@pytest.mark.parametrize("kind", ["f32", "bf16", "int8-channel", "int8", "int4", "q4_1"])
def test_tied_tables_are_packed_once_and_errors_are_reported(kind, monkeypatch):
    monkeypatch.setattr(cleanup, "FOLD_LIMIT", 64)  # the table counts as a large one
    report = served(biased, biased_parameters(4), kind, passages=[[1, 2, 3, 4, 5, 6, 7, 8]] * 2, kv_dtype="bfloat16")
    (row,) = report["weights"]
    assert row["format"] == WeightFormat.parse(kind).name
    assert (row["matrices"], row["parameters"]) == (4, 32 * (48 * 2 + 3 * 32 + 61))
    assert row["bytes"] < 4.6 * row["parameters"]
    assert report["quality_on_text"]["tokens"] == 14
    assert report["kv_bytes_per_token"] == 2 * 2 * 16 * 2
    assert report["validation"]["relative_error"] < 2e-2  # of a bfloat16 cache


@dataclasses.dataclass(frozen=True)
class Halves(WeightFormat):
    """A format that no kernel knows: float16, as `weight_formats` says it must be written."""

    kind = "bfloat16"
    name = "f16"
    bytes_per_weight = 2.0

    def shapes(self, rows, panels):
        return [((panels, rows, 16), "float16")]

    def pack(self, weight):
        padded = np.pad(weight, ((0, 0), (0, -weight.shape[1] % 16)))
        return (padded.reshape(len(weight), -1, 16).swapaxes(0, 1).astype(np.float16),)

    def unpack(self, arrays, rows, np):
        return arrays[0].astype(np.float32).swapaxes(0, 1).reshape(rows, -1)


def test_a_new_format_is_a_class_that_the_reference_computes_with(monkeypatch):
    monkeypatch.setattr(matmul_formats, "_families", [*matmul_formats._families])
    matmul_formats.weight_formats("f16")(lambda name: Halves() if name == "f16" else None)
    report = served(zoo.decoder(zoo.causal_where), zoo.parameters(3), "f16")
    assert {row["format"] for row in report["weights"]} == {"f16"}
    assert report["validation_of_packed_weights"]["relative_error"] < 2e-3
    verdicts = {
        v.implementation.name: v.reason
        for choice in survey("cpu")
        if (choice.operation, choice.call) == ("matmul", "f16")
        for v in choice.verdicts
    }
    assert verdicts["reference"] == "serves this call"
    if native.available():
        assert verdicts["native"] == "has no code for f16"
