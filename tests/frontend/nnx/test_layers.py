"""Layers: what differential tests over drawn configurations do not reach."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff.frontend import nnx


@pytest.fixture(scope="module", params=["distaff", "flax"])
def lib(request):
    return nnx if request.param == "distaff" else pytest.importorskip("flax.nnx")


X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, 5])
def test_embed(same_layer, dtype, rows):
    ids = jnp.asarray([[0, rows - 1, 0], [0, 0, rows]])[:, : 3 if rows > 1 else 2]

    def build(lib, rngs):
        return lib.Embed(rows, 4, dtype=dtype, rngs=rngs)

    same_layer(build, ids, call=lambda layer, ids: jnp.nan_to_num(layer(ids), nan=7.0))
    same_layer(build, X, call=lambda layer, x: layer.attend(x))


@pytest.mark.parametrize("options", [{}, {"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}])
def test_prelu(same_layer, options):
    same_layer(lambda lib, rngs: lib.PReLU(0.25, **options), X)


@pytest.mark.parametrize("options", [{}, {"broadcast_dims": (0, 2)}, {"rate": 1.0}, {"rate": 0.0}])
def test_dropout_draws_from_its_stream_and_counts_on(same_layer, options):
    options = {"rate": 0.4, **options}
    same_layer(lambda lib, rngs: lib.Dropout(rngs=rngs, **options), X, call=lambda layer, x: (layer(x), layer(x)))


def test_dropout_takes_streams_and_keys(lib):
    layer, x = lib.Dropout(0.5), jnp.ones((4, 8))
    by_stream = layer(x, rngs=lib.Rngs(dropout=1))
    np.testing.assert_array_equal(by_stream, layer(x, rngs=lib.Rngs(1)["dropout"]))
    np.testing.assert_array_equal(by_stream, layer(x, rngs=lib.Rngs(1)["dropout"]()))
    np.testing.assert_array_equal(layer(x, deterministic=True), x)


@pytest.mark.parametrize("deterministic", [False, True])
def test_attention_drops_weights(same_layer, deterministic):
    same_layer(
        lambda lib, rngs: lib.MultiHeadAttention(2, 4, dropout_rate=0.5, decode=False, rngs=rngs),
        X,
        call=lambda layer, x: (layer(x, deterministic=deterministic), layer(x, deterministic=deterministic)),
    )


def test_attention_without_a_stream_of_its_own(lib):
    options = {"dropout_rate": 0.5, "decode": False, "keep_rngs": False, "deterministic": False}
    layer = lib.MultiHeadAttention(2, 4, rngs=lib.Rngs(0), **options)
    with pytest.raises(ValueError, match="keep_rngs"):
        layer(X)
    np.testing.assert_array_equal(layer(X, rngs=lib.Rngs(1)), layer(X, rngs=lib.Rngs(dropout=1)["dropout"]))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_decoding_with_the_cache_is_causal_attention(kv_heads):
    layer = nnx.MultiHeadAttention(2, 4, num_kv_heads=kv_heads, decode=False, rngs=nnx.Rngs(0))
    whole = layer(X, is_causal=True)
    layer.init_cache(X.shape)

    @jax.jit
    def step(state, token):
        decoder = nnx.merge(graphdef, state)
        return decoder(token, decode=True), nnx.state(decoder)

    graphdef, state = nnx.split(layer)
    tokens = []
    for i in range(X.shape[1]):
        y, state = step(state, X[:, i : i + 1])
        tokens.append(y)
    np.testing.assert_allclose(jnp.concatenate(tokens, axis=1), whole, atol=1e-6)
    assert state["cache_index"][...] == X.shape[1]


def test_cache(same_layer):
    def build(lib, rngs):
        layer = lib.MultiHeadAttention(2, 4, num_kv_heads=1, decode=True, rngs=rngs)
        layer.init_cache((2, 5, 4))
        return layer

    same_layer(build, X, call=lambda layer, x: [layer(x[:, i : i + 1]) for i in range(3)])


def test_set_view_makes_a_cache():
    layer = nnx.MultiHeadAttention(2, 4, rngs=nnx.Rngs(0))
    view = nnx.view(layer, decode=True, batch_size=2, max_length=3, deterministic=True)
    assert view.decode and view.cached_key.shape == (2, 3, 2, 2) and layer.cached_key is None
    assert view(X[:, :1]).shape == (2, 1, 4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(3, 4, 2), (2, 3, 4, 2), (2, 2, 3, 4, 2)])
def test_attention_functions(flax_nnx, shape, causal):
    from flax.nnx.nn import attention as theirs

    from distaff.frontend.nnx.nn import attention as ours

    rng = np.random.default_rng(1)
    query, key, value = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(3))
    key, value = key[..., :2, :], value[..., :2, :]
    bias = jnp.asarray(rng.normal(size=(*shape[:-3], 4, 3, 3)), jnp.float32)
    mask = jnp.broadcast_to(jnp.asarray([[1, 1, 0], [1, 1, 1], [0, 1, 1]]), (*shape[:-3], 1, 3, 3)) > 0
    for options in ({}, {"bias": bias}, {"mask": mask}, {"dropout_rate": 0.3, "dropout_rng": jax.random.key(0)}):
        options = {**options, "is_causal": causal}
        mine = ours.dot_product_attention(query, key, value, **options)
        np.testing.assert_allclose(mine, theirs.dot_product_attention(query, key, value, **options), atol=1e-6)
        mine = ours.dot_product_attention_weights(query, key, **options)
        np.testing.assert_allclose(mine, theirs.dot_product_attention_weights(query, key, **options), atol=1e-6)
    # Values with a depth of their own, which only the explicit products have.
    wide = ours.dot_product_attention(query, key, jnp.concatenate([value, value], -1), mask=mask)
    narrow = ours.dot_product_attention(query, key, value, mask=mask)
    np.testing.assert_allclose(wide, jnp.concatenate([narrow, narrow], -1), atol=1e-6)


@pytest.mark.parametrize("layer", ["Linear", "Conv"])
@pytest.mark.parametrize("options", [{}, {"feature_axes": None}, {"use_scale": False}, {"epsilon": 0.1}])
def test_weight_norm(same_layer, layer, options):
    def build(lib, rngs):
        wrapped = lib.Linear(4, 5, rngs=rngs) if layer == "Linear" else lib.Conv(4, 5, (2,), rngs=rngs)
        return lib.WeightNorm(wrapped, rngs=rngs, **options)

    same_layer(build, X, call=lambda layer, x: (layer(x), layer(2 * x)))


@pytest.mark.parametrize("options", [{}, {"n_steps": 3}, {"update_stats": False}, {"n_steps": 0}])
def test_spectral_norm(same_layer, options):
    def build(lib, rngs):
        return lib.SpectralNorm(lib.Conv(4, 5, (2,), rngs=rngs), rngs=rngs, **options)

    same_layer(build, X, call=lambda layer, x: (layer(x), layer(2 * x)), rtol=1e-5)


def test_lora(same_layer):
    same_layer(lambda lib, rngs: lib.LoRALinear(4, 5, lora_rank=2, rngs=rngs), X)
    same_layer(lambda lib, rngs: lib.LoRA(4, 2, 5, rngs=rngs, dtype=jnp.bfloat16), X)
    same_layer(lambda lib, rngs: lib.LoRA(4, 2, 5, base_module=lib.Linear(4, 5, rngs=rngs), rngs=rngs), X)


def test_lora_parameters_are_found_by_their_type():
    layer = nnx.LoRALinear(4, 5, lora_rank=2, rngs=nnx.Rngs(0))
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(layer, nnx.LoRAParam))]
    assert paths == [("lora", "lora_a"), ("lora", "lora_b")]


def test_group_norm_over_channels_alone_keeps_places_apart():
    """Against float64; Flax repeats the statistics along another axis."""
    x = np.asarray(X, np.float64)
    layer = nnx.GroupNorm(4, num_groups=2, reduction_axes=-1, rngs=nnx.Rngs(0))
    grouped = x.reshape(2, 3, 2, 2)
    mean, var = grouped.mean(-1, keepdims=True), grouped.var(-1, keepdims=True)
    np.testing.assert_allclose(layer(X), ((grouped - mean) / np.sqrt(var + 1e-6)).reshape(x.shape), atol=1e-5)


def test_statistics_over_a_mapped_axis(lib):
    layer = lib.LayerNorm(4, axis_name="batch", rngs=lib.Rngs(0))
    mapped = jax.vmap(layer, axis_name="batch")(X)
    whole = lib.LayerNorm(4, reduction_axes=(0, -1), rngs=lib.Rngs(0))(X)
    np.testing.assert_allclose(mapped, whole, atol=1e-6)


def test_train_and_eval_and_views(lib):
    class Block(lib.Module):
        def __init__(self, rngs):
            self.norm = lib.BatchNorm(4, rngs=rngs)
            self.dropout = lib.Dropout(0.5, rngs=rngs)

    block = Block(lib.Rngs(0))
    block.eval()
    assert block.norm.use_running_average and block.dropout.deterministic
    block.train()
    assert not block.norm.use_running_average and not block.dropout.deterministic
    view = lib.view(block, deterministic=True, use_running_average=True)
    assert view.norm.use_running_average and view.dropout.deterministic and not block.dropout.deterministic
    assert view.norm.mean is block.norm.mean
    with pytest.raises(ValueError, match="Unused"):
        lib.view(block, colour="red")


def test_metadata_stays_with_parameters(lib):
    layer = lib.MultiHeadAttention(
        2,
        4,
        rngs=lib.Rngs(0),
        kernel_metadata={"tag": "k"},
        out_kernel_metadata={"tag": "o"},
        bias_metadata={"tag": "b"},
    )
    assert (layer.query.kernel.tag, layer.out.kernel.tag, layer.out.bias.tag) == ("k", "o", "b")


def test_initialisers_with_metadata(lib):
    init = lib.with_metadata(lib.initializers.ones, out_sharding=("in", "out"))
    layer = lib.LinearGeneral(4, (2, 3), kernel_init=init, kernel_metadata={"eager_sharding": False}, rngs=lib.Rngs(0))
    assert layer.kernel.shape == (4, 2, 3) and layer.kernel.out_sharding == ("in", "out")


def test_replaced_products(lib):
    calls = []

    def dot_general(*args, **kwargs):
        calls.append(kwargs)
        return jax.lax.dot_general(*args, **kwargs)

    lib.Linear(4, 5, dot_general=dot_general, rngs=lib.Rngs(0))(X)
    lib.LinearGeneral(4, 5, dot_general_cls=lambda: dot_general, rngs=lib.Rngs(0))(X)
    assert len(calls) == 2 and all(call["precision"] is None for call in calls)


BAD = [
    ("no decode", lambda lib, r: lib.MultiHeadAttention(2, 4, rngs=r)(X), ValueError),
    ("no cache", lambda lib, r: lib.MultiHeadAttention(2, 4, decode=True, rngs=r)(X), ValueError),
    ("heads", lambda lib, r: lib.MultiHeadAttention(3, 4, rngs=r), ValueError),
    ("kv heads", lambda lib, r: lib.MultiHeadAttention(4, 4, num_kv_heads=3, rngs=r), ValueError),
    ("features", lambda lib, r: lib.MultiHeadAttention(2, 8, decode=False, rngs=r)(X), ValueError),
    ("values alone", lambda lib, r: lib.MultiHeadAttention(2, 4, decode=False, rngs=r)(X, inputs_v=X), ValueError),
    ("batch_axis", lambda lib, r: lib.LinearGeneral(4, 4, batch_axis={1: 2}, rngs=r), ValueError),
    ("axis", lambda lib, r: lib.LinearGeneral((2, 4), 4, rngs=r), ValueError),
    ("no arrow", lambda lib, r: lib.Einsum("ab,bc", (2, 3), rngs=r), ValueError),
    ("operands", lambda lib, r: lib.Einsum("ab->ba", (2, 3), rngs=r), ValueError),
    ("floats", lambda lib, r: lib.Embed(3, 4, rngs=r)(X), ValueError),
    ("mask", lambda lib, r: lib.Conv(4, 4, 3, mask=jnp.ones((3, 4, 5)), rngs=r)(X), ValueError),
    ("padding", lambda lib, r: lib.Conv(4, 4, 3, padding=(1, 2, 3), rngs=r)(X), ValueError),
    ("causal", lambda lib, r: lib.Conv(4, 4, (3, 3), padding="CAUSAL", rngs=r)(X[None]), ValueError),
    ("groups", lambda lib, r: lib.GroupNorm(6, num_groups=4, rngs=r), ValueError),
    ("group size", lambda lib, r: lib.GroupNorm(6, group_size=3, rngs=r), ValueError),
    ("batch as feature", lambda lib, r: lib.InstanceNorm(2, feature_axes=0, rngs=r)(X), ValueError),
    ("no mode", lambda lib, r: lib.BatchNorm(4, use_running_average=None, rngs=r)(X), ValueError),
    ("no deterministic", lambda lib, r: lib.Dropout(0.5, deterministic=None, rngs=r)(X), ValueError),
    ("no rngs", lambda lib, r: lib.Dropout(0.5)(X), ValueError),
    ("a number for rngs", lambda lib, r: lib.Dropout(0.5, rngs=1), TypeError),
    ("a number to draw from", lambda lib, r: lib.Dropout(0.5)(X, rngs=1), TypeError),
    ("int dtype", lambda lib, r: lib.Linear(4, 4, dtype=jnp.int32, rngs=r)(X), ValueError),
    ("no carry rngs", lambda lib, r: lib.LSTMCell(4, 4, rngs=r).initialize_carry((2, 4)), ValueError),
    ("base module", lambda lib, r: lib.LoRA(4, 2, 4, base_module=lib.Module(), rngs=r)(X), ValueError),
    (
        "non-matrix",
        lambda lib, r: lib.SpectralNorm(lib.Conv(4, 4, (2,), rngs=r), error_on_non_matrix=True, rngs=r),
        ValueError,
    ),
    ("no stream", lambda lib, r: lib.Linear(4, 4, rngs=lib.Rngs(dropout=0)), AttributeError),
    ("abstract cell", lambda lib, r: lib.RNNCellBase().initialize_carry((2, 4)), NotImplementedError),
]


@pytest.mark.parametrize(("build", "error"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_misuse(lib, build, error):
    with pytest.raises(error):
        build(lib, lib.Rngs(0))


def test_convolutions_refuse_what_groups_or_axes_do_not_fit():
    with pytest.raises(ValueError, match="does not divide"):
        nnx.Conv(3, 4, 2, feature_group_count=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="spatial axes"):
        nnx.Conv(4, 4, (2, 2), rngs=nnx.Rngs(0))(X[0])


def test_sequential(lib):
    def split(x, *, rngs):
        return x + rngs.params.uniform(), 2.0

    chain = lib.Sequential(lib.Linear(4, 4, rngs=lib.Rngs(0)), split, lambda x, y: {"x": x, "y": y}, lambda x, y: x * y)
    expected = 2 * (chain.layers[0](X) + lib.Rngs(1).params.uniform())
    np.testing.assert_allclose(chain(X, rngs=lib.Rngs(1)), expected, atol=1e-6)
    assert lib.Sequential()(1) == 1 and lib.Sequential()(1, 2) == (1, 2) and lib.Sequential()(a=1) == {"a": 1}
    assert lib.Sequential()() is None
    with pytest.raises(TypeError):
        lib.Sequential(3)(X)


def test_out_sharding_on_a_mesh_with_explicit_axes(lib):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    rows = jax.P("x")
    with jax.sharding.set_mesh(mesh):
        rngs, x = lib.Rngs(0), jnp.ones((2, 4))
        embed = lib.Embed(5, 4, rngs=rngs)
        ids = jnp.zeros(2, jnp.int32)
        results = {
            "Linear": lib.Linear(4, 3, rngs=rngs)(x, out_sharding=rows),
            "LinearGeneral": lib.LinearGeneral(4, 3, rngs=rngs)(x, out_sharding=rows),
            "Einsum": lib.Einsum("ab,bc->ac", (4, 3), rngs=rngs)(x, out_sharding=rows),
            "Embed": embed(ids, out_sharding=rows),
            "attend": embed.attend(x, out_sharding=rows),
            "Dropout": lib.Dropout(0.5, rngs=rngs)(embed(ids, out_sharding=rows)),
        }
        for name, result in results.items():
            assert jax.typeof(result).sharding.spec[0] == "x", name
