"""Filling a module's parameters from a checkpoint, one tensor at a time, after checking that all are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.compiler.ir import StoredBlocks
from distaff.frontend import linen as nn
from distaff.frontend.loading.checkpoint import Checkpoint
from distaff.frontend.loading.errors import TensorMismatchError
from distaff.frontend.loading.tensor_names import Row, is_redundant, rows_by_path


def load_params(
    checkpoint: Checkpoint, module: nn.Module, dtype: str, advance: Callable[[int], None] = lambda nbytes: None
) -> dict[str, Any]:
    """The parameters of ``module`` (nested dicts of arrays of ``dtype``); ``advance`` is told the bytes read.

    Raises `TensorMismatchError` before anything is read if the tensors are not those that the module needs.
    """
    shapes = parameter_shapes(module)
    rows = rows_by_path(checkpoint.config)
    _check(checkpoint, shapes, rows)
    params: dict[str, Any] = {}
    for path, shape in shapes.items():
        row = rows[path]
        tensor = checkpoint.tensors[row.name]
        # A fresh array: the file may change later, and JAX may keep using the memory that it is given.
        value = np.array(row.layout.arrange(tensor.read(), shape), dtype=jnp.dtype(dtype), order="C")
        _insert(params, path, jnp.asarray(value))
        advance(tensor.nbytes)
    return params


def stored_blocks(checkpoint: Checkpoint, module: nn.Module) -> dict[str, StoredBlocks]:
    """What the checkpoint holds of the parameters that are quantised matrices, by path with dots between the keys."""
    rows = rows_by_path(checkpoint.config)
    found = {path: checkpoint.tensors[rows[path].name].blocks for path in parameter_shapes(module)}
    return {path.replace("/", "."): blocks for path, blocks in found.items() if blocks is not None}


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter by its path, keys joined by slashes."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    variables = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), tokens))
    leaves, _ = jax.tree_util.tree_flatten_with_path(variables["params"])
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}


def _check(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], rows: Mapping[str, Row]) -> None:
    wanted = {rows[path].name: rows[path].layout.stored_shape(shape) for path, shape in shapes.items()}
    found = checkpoint.tensors
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted and not is_redundant(name, checkpoint.config)]
    misshapen = [
        f"{name}: has shape {found[name].shape}, expected {shape}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
    ]
    if missing or extra or misshapen:
        raise TensorMismatchError(str(checkpoint.path), missing, extra, misshapen)


def _insert(tree: dict[str, Any], path: str, value: jax.Array) -> None:
    *parents, leaf = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[leaf] = value
