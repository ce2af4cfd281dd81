"""Trees with the same structure, types of leaves, dtypes, shapes and values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def assert_trees_equal(mine: Any, other: Any, rtol: float = 0.0) -> None:
    """Exactly equal, or with ``rtol`` nearly, relative to the largest value of a leaf; of keys, their data."""
    assert jax.tree.structure(mine) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(mine), jax.tree.leaves(other), strict=True):
        where = jax.tree_util.keystr(path)
        if not hasattr(a, "dtype"):
            assert type(a) is type(b) and a == b, where
            continue
        assert a.dtype == b.dtype and a.shape == b.shape, where
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        wide = complex if np.iscomplexobj(a) else np.float64
        a, b = np.asarray(a).astype(wide), np.asarray(b).astype(wide)
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * float(np.max(np.abs(b), initial=0)), err_msg=where)
