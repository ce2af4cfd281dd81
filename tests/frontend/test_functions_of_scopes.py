"""``core.nn``: layers as functions of a scope, against those of ``flax.core.nn``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff.frontend import core
from distaff.frontend.core import nn

from .conftest import assert_same_tree

KEYS = {"params": jax.random.key(1), "dropout": jax.random.key(2)}
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 6, 4)), jnp.float32)
LAYERS = {
    "dense": lambda nn, scope, x: nn.dense(scope, x, 3),
    "dense in bfloat16": lambda nn, scope, x: nn.dense(scope, x, 3, bias=False, dtype=jnp.bfloat16),
    "dense_general": lambda nn, scope, x: nn.dense_general(scope, x, (3, 2), axis=(2, 3)),
    "conv": lambda nn, scope, x: nn.conv(scope, x, 4, (3, 3), (2, 2), feature_group_count=2),
    "conv_transpose": lambda nn, scope, x: nn.conv_transpose(scope, x, 3, (3, 3), (2, 2)),
    "embedding, lookup": lambda nn, scope, x: nn.embedding(scope, 7, 3).lookup(jnp.arange(5)),
    "embedding, attend": lambda nn, scope, x: nn.embedding(scope, 7, 4).attend(x),
    "batch_norm": lambda nn, scope, x: nn.batch_norm(scope, x, momentum=0.9),
    "batch_norm, running": lambda nn, scope, x: nn.batch_norm(scope, x, use_running_average=True),
    "layer_norm": lambda nn, scope, x: nn.layer_norm(scope, x),
    "group_norm": lambda nn, scope, x: nn.group_norm(scope, x, 2),
    "group_norm by size": lambda nn, scope, x: nn.group_norm(scope, x, None, 1, bias=False),
    "dropout": lambda nn, scope, x: nn.dropout(scope, x, 0.3),
    "children": lambda nn, scope, x: scope.child(nn.dense, "out")(nn.relu(scope.child(nn.conv)(x, 3, (2, 2))), 4),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_that_of_flax(name):
    flax_core, flax_nn = pytest.importorskip("flax.core"), pytest.importorskip("flax.core.nn")
    results = []
    for library, functions in ((core, nn), (flax_core, flax_nn)):

        def model(scope, x, functions=functions):
            return LAYERS[name](functions, scope, x)

        output, variables = library.init(model)(KEYS, X)
        moved = jax.tree.map(lambda x: x + 0.25, library.unfreeze(variables))
        applied = library.apply(model, mutable=True)(moved, X, rngs={"dropout": jax.random.key(3)})
        results.append((output, variables, applied))
    assert_same_tree(*results, rtol=1e-5)


def test_misuse_is_explained():
    with pytest.raises(ValueError, match="must be an integer"):
        core.init(lambda scope, x: nn.embedding(scope, 7, 3).lookup(x))(KEYS, X)
    with pytest.raises(NotImplementedError, match="'averages'"):
        core.init(lambda scope, x: nn.batch_norm(scope, x, kind="averages"))(KEYS, X)
