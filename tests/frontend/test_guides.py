"""The tasks of Flax's guides, programmed anew: each program runs with either library's ``nn`` and must agree."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff.frontend import linen as nn

from .conftest import assert_same_tree

KEY = jax.random.key(42)
DATA = np.random.default_rng(1)
X = jnp.asarray(DATA.standard_normal((8, 4)), jnp.float32)
Y = jnp.asarray(DATA.standard_normal((8, 3)), jnp.float32)
LABELS = jnp.asarray(DATA.integers(0, 3, 8))
TOKENS = jnp.asarray(DATA.integers(0, 10, (2, 5)))

GUIDES: list[Callable] = []


def guide(program):
    """A program of a library's nn that returns a tree of arrays."""
    GUIDES.append(program)
    return program


@guide
def linear_regression_by_hand(nn):
    model = nn.Dense(features=3)
    params = model.init(KEY, X)

    @jax.jit
    def step(params):
        def loss(params):
            return jnp.mean(
                jax.vmap(lambda x, y: jnp.inner(y - model.apply(params, x), y - model.apply(params, x)))(X, Y)
            )

        value, grads = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)

    losses = []
    for _ in range(5):
        value, params = step(params)
        losses.append(value)
    assert losses[-1] < losses[0]
    return losses, params


@guide
def layers_of_ones_own(nn):
    class MyDense(nn.Module):
        features: int
        kernel_init: Callable = nn.initializers.lecun_normal()
        bias_init: Callable = nn.initializers.zeros_init()

        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
            return x @ kernel + self.param("bias", self.bias_init, (self.features,))

    class ExplicitMLP(nn.Module):
        sizes: Sequence[int]

        def setup(self):
            self.layers = [MyDense(size) for size in self.sizes]

        def __call__(self, x):
            for i, layer in enumerate(self.layers):
                x = layer(x)
                x = nn.relu(x) if i + 1 < len(self.layers) else x
            return x

    class CompactMLP(nn.Module):
        sizes: Sequence[int]

        @nn.compact
        def __call__(self, x):
            for i, size in enumerate(self.sizes):
                x = MyDense(size, name=f"layers_{i}")(x)
                x = nn.relu(x) if i + 1 < len(self.sizes) else x
            return x

    explicit, compact = ExplicitMLP([5, 4, 3]), CompactMLP([5, 4, 3])
    variables = explicit.init(KEY, X)
    np.testing.assert_array_equal(explicit.apply(variables, X), compact.apply(variables, X))
    return variables, compact.init(KEY, X), explicit.apply(variables, X)


@guide
def running_mean_as_state(nn):
    class Centre(nn.Module):
        decay: float = 0.9

        @nn.compact
        def __call__(self, x):
            exists = self.has_variable("batch_stats", "mean")
            mean = self.variable("batch_stats", "mean", lambda shape: jnp.zeros(shape), x.shape[1:])
            bias = self.param("bias", lambda key, shape: jnp.zeros(shape), x.shape[1:])
            if exists:
                mean.value = self.decay * mean.value + (1 - self.decay) * jnp.mean(x, axis=0)
            return x - mean.value + bias

    model = Centre()
    variables = model.init(KEY, X)
    params, state = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    optimizer = optax.sgd(0.1)
    opt_state = optimizer.init(params)
    for i in range(3):

        def loss(params, state=state, i=i):
            y, updates = model.apply({"params": params, **state}, X + i, mutable=list(state))
            return jnp.sum((X - y) ** 2), updates

        (_, state), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
    return params, state


@guide
def dropout_and_batch_norm_in_training(nn):
    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, x, training: bool):
            x = nn.Dense(6)(x)
            x = nn.BatchNorm(use_running_average=not training, momentum=0.9)(x)
            x = nn.Dropout(rate=0.5, deterministic=not training)(nn.relu(x))
            return nn.Dense(3)(x)

    model = Classifier()
    params_key, dropout_key = jax.random.split(KEY)
    variables = model.init(params_key, X, training=False)
    params, batch_stats = variables["params"], variables["batch_stats"]
    optimizer = optax.adam(1e-2)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, batch_stats, opt_state, number):
        key = jax.random.fold_in(dropout_key, number)

        def loss(params):
            logits, updates = model.apply(
                {"params": params, "batch_stats": batch_stats},
                X,
                training=True,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean(), updates

        (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(params)
        changes, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, changes), updates["batch_stats"], opt_state, value

    losses = []
    for number in range(4):
        params, batch_stats, opt_state, value = step(params, batch_stats, opt_state, number)
        losses.append(value)
    return losses, batch_stats, model.apply({"params": params, "batch_stats": batch_stats}, X, training=False)


@guide
def an_ensemble(nn):
    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.tanh(nn.Dense(5)(x)))

    by_jax = jax.vmap(MLP().init, in_axes=(0, None))(jax.random.split(KEY, 3), X)
    outputs = jax.vmap(MLP().apply, in_axes=(0, None))(by_jax, X)
    lifted = nn.vmap(
        MLP, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, out_axes=0, axis_size=3
    )()
    return by_jax, outputs, lifted.init(KEY, X), lifted.apply(by_jax, X)


@guide
def examples_one_at_a_time(nn):
    class One(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(3)(x)
            return nn.BatchNorm(use_running_average=not train, axis_name="batch")(x)

    model = One()
    variables = model.init(KEY, X[0], train=False)

    @functools.partial(jax.vmap, in_axes=(None, 0), out_axes=(0, None), axis_name="batch")
    def apply(variables, x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    return variables, apply(variables, X)


@guide
def intermediate_values(nn):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(5)(x)
            self.sow("intermediates", "features", h)
            self.sow("norms", "total", jnp.sum(h**2), init_fn=lambda: 0.0, reduce_fn=lambda a, b: a + b)
            h = self.perturb("hidden", nn.relu(h))
            return nn.Dense(3)(h)

    model = Net()
    variables = model.init(KEY, X)
    perturbations = variables["perturbations"]
    params = {"params": variables["params"]}
    y, sown = model.apply(params, X, mutable=["intermediates", "norms"])
    _, all_calls = model.apply(params, X, capture_intermediates=True, mutable=["intermediates"])
    only_dense = lambda module, name: isinstance(module, nn.Dense) and name == "__call__"  # noqa: E731
    _, dense_calls = model.apply(params, X, capture_intermediates=only_dense)

    def loss(params, perturbations):
        return jnp.mean((model.apply({"params": params, "perturbations": perturbations}, X) - Y) ** 2)

    return y, sown, all_calls, dense_calls, jax.grad(loss, argnums=1)(variables["params"], perturbations)


@guide
def transfer_learning(nn):
    class Backbone(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.relu(nn.Dense(6, name="body")(x))

    class Classifier(nn.Module):
        classes: int
        backbone: nn.Module

        @nn.compact
        def __call__(self, x):
            return nn.Dense(self.classes, name="head")(self.backbone(x))

    trained = {"params": Backbone().init(jax.random.key(7), X)["params"]}
    body, body_variables = (
        nn.Sequential([Backbone(), nn.Dense(2)])
        .bind(
            {"params": {"layers_0": trained["params"], "layers_1": nn.Dense(2).init(KEY, jnp.ones((1, 6)))["params"]}}
        )
        .layers[0]
        .unbind()
    )
    model = Classifier(3, body)
    params = dict(model.init(KEY, X)["params"])
    params["backbone"] = body_variables["params"]
    labels = jax.tree_util.tree_map_with_path(lambda path, _: "frozen" if path[0].key == "backbone" else "free", params)
    optimizer = optax.multi_transform({"free": optax.adam(0.1), "frozen": optax.set_to_zero()}, labels)
    state = optimizer.init(params)
    grads = jax.grad(lambda params: jnp.mean((model.apply({"params": params}, X) - Y) ** 2))(params)
    updates, state = optimizer.update(grads, state, params)
    moved = optax.apply_updates(params, updates)
    assert_same_tree(dict(moved["backbone"]), dict(trained["params"]))
    return moved, model.apply({"params": moved}, X)


@guide
def random_numbers(nn):
    class Noise(nn.Module):
        @nn.compact
        def __call__(self, x):
            first = jax.random.normal(self.make_rng("noise"), ())
            return first, jax.random.normal(self.make_rng("noise"), ()), jax.random.normal(self.make_rng(), ()), x

    class Model(nn.Module):
        def setup(self):
            self.a, self.b = Noise(), Noise()

        def __call__(self, x):
            return self.a(x), self.b(x), self.a(x), jax.random.uniform(self.make_rng("other"), (2,))

    rngs = {"params": jax.random.key(0), "noise": jax.random.key(1)}
    return Model().apply({}, X[0], rngs=rngs), Model().init_with_output(jax.random.key(3), X[0])


@guide
def deep_and_compact_with_scan(nn):
    class Block(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x, mask):
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(h, h, mask=mask)
            return x + nn.Dense(self.width)(nn.gelu(nn.Dense(2 * self.width)(nn.LayerNorm()(x)))), None

    class Transformer(nn.Module):
        depth: int = 3

        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(10, 4)(tokens)
            mask = nn.make_causal_mask(tokens)
            layers = nn.scan(
                nn.remat(Block, prevent_cse=False),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=self.depth,
            )
            x, _ = layers(width=4, name="layers")(x, mask)
            return nn.Dense(10, use_bias=False)(nn.LayerNorm()(x))

    tokens = TOKENS
    model = Transformer()
    variables = jax.jit(model.init)(KEY, tokens)

    def loss(variables):
        logits = model.apply(variables, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return variables, jax.jit(jax.value_and_grad(loss))(variables)


@guide
def a_recurrent_network(nn):
    class Cell(nn.Module):
        width: int

        @functools.partial(
            nn.transforms.scan, variable_broadcast="params", in_axes=1, out_axes=1, split_rngs={"params": False}
        )
        @nn.compact
        def __call__(self, state, x):
            gates = nn.sigmoid(nn.Dense(self.width, name="gate")(jnp.concatenate([state, x], -1)))
            new = nn.tanh(nn.Dense(self.width, name="new")(jnp.concatenate([gates * state, x], -1)))
            state = gates * state + (1 - gates) * new
            return state, state

    class Tagger(nn.Module):
        @nn.compact
        def __call__(self, x):
            forward, states = Cell(5)(jnp.zeros((x.shape[0], 5)), x)
            backward, others = Cell(5, name="back")(jnp.zeros((x.shape[0], 5)), x[:, ::-1])
            return nn.Dense(3)(jnp.concatenate([states, others[:, ::-1]], -1)), forward, backward

    x = X.reshape(2, 4, 4)
    variables = Tagger().init(KEY, x)
    return variables, Tagger().apply(variables, x)


@guide
def tied_weights_by_mapping(nn):
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, x):
            def transpose(variables):
                return jax.tree.map(lambda kernel: kernel.T, variables)

            class Coder(nn.Module):
                def setup(self):
                    self.encoder = nn.Dense(3, use_bias=False)

                def encode(self, x):
                    return self.encoder(x)

                def decode(self, z):
                    return z @ self.encoder.variables["params"]["kernel"].T

            coder = Coder(name="coder")
            untied = nn.map_variables(nn.Dense, "params", transpose, transpose, init=True)
            return coder.decode(coder.encode(x)), untied(6, use_bias=False, name="turned")(x)

    variables = Tied().init(KEY, X)
    assert jnp.shape(variables["params"]["turned"]["kernel"]) == (6, 4)
    return variables, Tied().apply(variables, X)


@guide
def adapters_by_intercepting(nn):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.relu(nn.Dense(5)(x)))

    class LowRank(nn.Module):
        rank: int

        @nn.compact
        def __call__(self, x, features):
            x = nn.Dense(self.rank, use_bias=False, name="down")(x)
            return nn.Dense(features, use_bias=False, name="up", kernel_init=nn.initializers.ones)(x)

    class Adapted(nn.Module):
        net: nn.Module

        @nn.compact
        def __call__(self, x):
            def interceptor(next_method, args, kwargs, context):
                y = next_method(*args, **kwargs)
                if isinstance(context.module, nn.Dense) and context.module.path[0] == "net":
                    y = y + LowRank(2, parent=self, name=f"at_{context.module.name}")(*args, context.module.features)
                return y

            with nn.intercept_methods(interceptor):
                return self.net(x)

    model = Adapted(Net())
    variables = model.init(KEY, X)
    assert set(variables["params"]) == {"net", "at_Dense_0", "at_Dense_1"}
    return variables, model.apply(variables, X)


@guide
def sharding_annotations(nn):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            init = nn.with_partitioning(nn.initializers.xavier_normal(), (None, "model"))
            h = nn.Dense(8, kernel_init=init, use_bias=False)(x)
            out = self.param("out", nn.with_partitioning(nn.initializers.xavier_normal(), ("model", None)), (8, 4))
            return nn.relu(h) @ out, None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                Layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
                metadata_params={nn.PARTITION_NAME: "stages"},
            )
            return layers()(x, None)[0]

    shapes = jax.eval_shape(Model().init, KEY, X)
    specs = jax.tree.leaves(nn.get_partition_spec(shapes), is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
    assert [tuple(spec) for spec in specs] == [("stages", None, "model"), ("stages", "model", None)]
    variables = nn.meta.unbox(Model().init(KEY, X))
    return variables, Model().apply(variables, X)


@guide
def a_variational_autoencoder(nn):
    class Encoder(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(6, name="fc1")(x))
            return nn.Dense(2, name="mean")(x), nn.Dense(2, name="logvar")(x)

    class VAE(nn.Module):
        def setup(self):
            self.encoder = Encoder()
            self.decoder = nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(4)])

        def __call__(self, x, key):
            mean, logvar = self.encoder(x)
            z = mean + jnp.exp(logvar / 2) * jax.random.normal(key, logvar.shape)
            return self.decoder(z), mean, logvar

        def generate(self, z):
            return nn.sigmoid(self.decoder(z))

    variables = VAE().init(KEY, X, jax.random.key(0))

    def loss(variables):
        y, mean, logvar = VAE().apply(variables, X, jax.random.key(1))
        divergence = -0.5 * jnp.sum(1 + logvar - mean**2 - jnp.exp(logvar))
        return jnp.sum((y - X) ** 2) + divergence

    bound = VAE().bind(variables)
    return variables, jax.grad(loss)(variables), bound.generate(jnp.ones((1, 2))), bound.encoder(X)


def plain(tree):
    """Frozen dicts as dicts."""
    if hasattr(tree, "unfreeze"):
        tree = tree.unfreeze()
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    return tuple(map(plain, tree)) if isinstance(tree, list | tuple) else tree


@pytest.mark.parametrize("program", GUIDES, ids=lambda program: program.__name__)
def test_guides_run_the_same_under_both_imports(flax_nn, program):
    assert_same_tree(plain(program(nn)), plain(program(flax_nn)), rtol=1e-5)
