"""The programs of the published guides on views, surgery, intermediates, optimisation and text generation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff.frontend import nnx


class Block(nnx.Module):
    def __init__(self, size, *, rngs):
        self.linear = nnx.Linear(size, size, rngs=rngs)
        self.norm = nnx.BatchNorm(size, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        h = nnx.gelu(self.norm(self.linear(x)))
        self.sow(nnx.Intermediate, "h", h)
        return x + self.perturb("delta", self.dropout(h))


class Model(nnx.Module):
    def __init__(self, size=4, *, rngs):
        self.blocks = nnx.List([Block(size, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(size, 1, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 4)).astype(np.float32)
    return x, (x[:, :1] - 2 * x[:, 1:2]).astype(np.float32)


def loss_of(model, x, y):
    return ((model(x) - y) ** 2).mean()


def losses_of(model, optimizer, data, steps=30):
    @nnx.jit
    def step(model, optimizer, x, y):
        loss, grads = nnx.value_and_grad(loss_of)(model, x, y)
        optimizer.update(model, grads)
        return loss

    return [float(step(model, optimizer, *data)) for _ in range(steps)]


def test_views_share_weights_and_differ_in_mode(data):
    model = Model(rngs=nnx.Rngs(0))
    training = nnx.view(model, deterministic=False, use_running_average=False)
    serving = nnx.view(model, deterministic=True, use_running_average=True)
    assert training.head.kernel is model.head.kernel is serving.head.kernel
    before = serving(data[0])
    np.testing.assert_array_equal(serving(data[0]), before)
    assert not np.array_equal(training(data[0]), training(data[0]))
    losses = losses_of(training, nnx.Optimizer(training, optax.adam(1e-2), wrt=nnx.Param), data)
    assert losses[-1] < losses[0] and not np.array_equal(serving(data[0]), before)
    assert "deterministic" in nnx.view_info(model) and "use_running_average" in nnx.view_info(model)
    with pytest.raises(ValueError, match="temperature"):
        nnx.view(model, temperature=1.0)

    class Scaled(nnx.Module):
        def __init__(self):
            self.factor = 1.0

        def set_view(self, factor: float | None = None, **_):
            self.factor = self.factor if factor is None else factor

    assert nnx.view(nnx.List([Scaled(), nnx.Dropout(0.1)]), factor=2.0)[0].factor == 2.0
    silent = nnx.with_attributes(model, only=nnx.Dropout, rate=0.0)
    assert silent.blocks[0].dropout.rate == 0.0 and model.blocks[0].dropout.rate == 0.5


def test_surgery_by_hand_and_of_a_checkpoint(data):
    model = Model(rngs=nnx.Rngs(0))
    model.eval()
    x = data[0]
    model.blocks[1].linear = model.blocks[0].linear  # shared from now on
    assert len(nnx.to_flat_state(nnx.state(model, nnx.PathContains("linear")))) == 2
    model.blocks[0].linear.kernel = model.blocks[0].linear.kernel * 0  # a new array in its place
    assert not np.any(model.blocks[1].linear.kernel)

    old = nnx.to_pure_dict(nnx.state(Model(rngs=nnx.Rngs(1)), nnx.Param))
    old["last"] = old.pop("head")  # a checkpoint of before a renaming

    class Renamed(nnx.Module):
        def __init__(self, rngs):
            inner = Model(rngs=rngs)
            self.blocks, self.last = inner.blocks, inner.head

        def __call__(self, x):
            for block in self.blocks:
                x = block(x)
            return self.last(x)

    abstract = nnx.eval_shape(lambda: Renamed(nnx.Rngs(0)))
    graphdef, params, _ = nnx.split(abstract, nnx.Param, ...)
    assert all(isinstance(v.get_raw_value(), jax.ShapeDtypeStruct) for _, v in nnx.to_flat_state(params))
    nnx.replace_by_pure_dict(params, old)
    made = nnx.state(Renamed(nnx.Rngs(1)), nnx.Not(nnx.Param))
    restored, original = nnx.merge(graphdef, params, made), Model(rngs=nnx.Rngs(1))
    restored.eval()
    original.eval()
    np.testing.assert_array_equal(restored(x), original(x))


def test_partial_initialization_makes_only_what_is_new(data):
    old = nnx.state(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))

    @nnx.jit(donate_argnums=0)
    def create(old, rngs):
        model = nnx.LoRALinear(4, 3, lora_rank=2, rngs=rngs)
        nnx.update(model, old)
        return model

    kernel = np.asarray(old["kernel"][...])
    model = create(old, nnx.Rngs(1))
    np.testing.assert_array_equal(model.kernel[...], kernel)
    np.testing.assert_allclose(model(data[0]), data[0] @ kernel, rtol=1e-5, atol=1e-6)
    grads = nnx.grad(lambda m: m(data[0]).sum(), argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    assert {path[-1] for path, _ in nnx.to_flat_state(grads)} == {"lora_a", "lora_b"}


def test_intermediates_and_their_gradients(data):
    model = Model(rngs=nnx.Rngs(0))
    model.eval()
    x, y = data
    run = nnx.capture(model, nnx.Intermediate)
    out, intermediates = run(x)
    np.testing.assert_array_equal(out, model(x))
    (first,) = intermediates["blocks"][0]["h"].get_raw_value()
    assert first.shape == x.shape
    _, perturbations = nnx.capture(model, nnx.Perturbation)(x)

    def loss(perturbations, model):
        out, _ = nnx.capture(model, nnx.Intermediate, init=perturbations)(x)
        return ((out - y) ** 2).mean()

    grads = nnx.grad(loss)(perturbations, model)
    last = np.asarray(grads["blocks"][1]["delta"].get_raw_value())
    np.testing.assert_allclose(last, 2 * (out - y) / y.size @ model.head.kernel[...].T, rtol=1e-4, atol=1e-6)
    shapes = nnx.capture(lambda model, x: model(x), method_outputs=nnx.Intermediate)
    assert shapes(model, x).shape == (32, 1)


def test_optimisation_an_average_of_the_weights(data):
    model = Model(rngs=nnx.Rngs(0))
    model.eval()
    average = nnx.EMA(nnx.state(model, nnx.Param), decay=0.5)
    optimizer = nnx.Optimizer(model, optax.sgd(0.05), wrt=nnx.Param)
    expected = np.asarray(model.head.kernel[...])
    for _ in range(3):
        losses_of(model, optimizer, data, steps=1)
        average.update(nnx.state(model, nnx.Param))
        expected = 0.5 * expected + 0.5 * np.asarray(model.head.kernel[...])
    smoothed = average.apply_to(nnx.state(model, nnx.Param))
    np.testing.assert_allclose(smoothed["head"]["kernel"][...], expected, rtol=1e-5)


def test_optimisation_by_line_search(data):
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.lbfgs(), wrt=nnx.Param)
    graphdef = nnx.graphdef(model)

    @nnx.jit
    def step(model, optimizer, x, y):
        loss, grads = nnx.value_and_grad(loss_of)(model, x, y)
        optimizer.update(
            model, grads, grad=grads, value=loss, value_fn=lambda state: loss_of(nnx.merge(graphdef, state), x, y)
        )
        return loss

    losses = [float(step(model, optimizer, *data)) for _ in range(15)]
    assert losses[-1] < 1e-5 * losses[0]
    np.testing.assert_allclose(model.kernel[...][:, 0], [1, -2, 0, 0], atol=1e-2)


def test_optimisation_rates_by_parameter_and_accumulated_gradients(data):
    model = Model(rngs=nnx.Rngs(0))
    model.eval()
    labels = nnx.map_state(lambda path, v: v.replace("slow" if "head" in path else "fast"), nnx.state(model, nnx.Param))
    tx = optax.multi_transform({"fast": optax.sgd(0.1), "slow": optax.set_to_zero()}, nnx.as_pure(labels))
    optimizer = nnx.Optimizer(model, optax.MultiSteps(tx, every_k_schedule=2), wrt=nnx.Param)
    head, first = np.asarray(model.head.kernel[...]), np.asarray(model.blocks[0].linear.kernel[...])
    losses_of(model, optimizer, data, steps=1)
    np.testing.assert_array_equal(model.blocks[0].linear.kernel[...], first)
    losses_of(model, optimizer, data, steps=1)
    assert not np.array_equal(model.blocks[0].linear.kernel[...], first)
    np.testing.assert_array_equal(model.head.kernel[...], head)


class TextBlock(nnx.Module):
    def __init__(self, size, heads, *, rngs):
        self.before_attention, self.before_mlp = nnx.LayerNorm(size, rngs=rngs), nnx.LayerNorm(size, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, size, decode=False, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(size, 4 * size, rngs=rngs), nnx.gelu, nnx.Linear(4 * size, size, rngs=rngs)
        )

    def __call__(self, x, mask=None):
        x = x + self.attention(self.before_attention(x), mask=mask)
        return x + self.mlp(self.before_mlp(x))


class TextModel(nnx.Module):
    """Learns texts of up to ``length`` tokens, and generates with a cache: ``decode`` with one token at a time."""

    def __init__(self, vocabulary, length, size=32, *, rngs):
        self.tokens, self.places = nnx.Embed(vocabulary, size, rngs=rngs), nnx.Embed(length, size, rngs=rngs)
        self.blocks = nnx.List([TextBlock(size, 4, rngs=rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(size, rngs=rngs)

    def __call__(self, tokens, place=None):
        at = jnp.arange(tokens.shape[1]) if place is None else place
        x = self.tokens(tokens) + self.places(at)
        mask = nnx.make_causal_mask(tokens) if place is None else None
        for block in self.blocks:
            x = block(x, mask)
        return self.tokens.attend(self.norm(x))


def test_text_is_learnt_and_generated_with_a_cache():
    text = np.tile(np.arange(8, dtype=np.int32), 40)
    rng = np.random.default_rng(0)
    model = TextModel(10, 16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, tokens):
        def loss(model):
            logits = model(tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    for _ in range(60):
        loss = step(model, optimizer, np.stack([text[s : s + 16] for s in rng.integers(0, 200, 16)]))
    assert float(loss) < 0.3

    decoder = nnx.view(model, decode=True)
    for block in decoder.blocks:
        block.attention.init_cache((1, 16, 32))
    generate = nnx.jit(lambda model, token, place: model(token[None, None], place[None]))
    plain = nnx.jit(lambda model, tokens: model(tokens))  # of padded texts: what stands behind is not seen
    tokens = [3]
    for place in range(11):
        logits = generate(decoder, jnp.array(tokens[-1]), jnp.array(place))[0, 0]
        padded = np.array([tokens + [0] * (16 - len(tokens))], np.int32)
        np.testing.assert_allclose(logits, plain(model, padded)[0, place], rtol=1e-3, atol=1e-3)
        tokens.append(int(jnp.argmax(logits)))
    assert tokens == [(3 + i) % 8 for i in range(12)]
