"""Arguments of Orbax checkpointers, made from a target tree; the names are those of ``flax.training.orbax_utils``."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding


def is_multi_device_array(value: Any) -> bool:
    """Whether ``value`` is an array in pieces on several devices."""
    return isinstance(value, jax.Array) and not value.is_fully_replicated


def save_args_from_target(target: Any) -> Any:
    """Default arguments for saving each leaf."""
    return jax.tree.map(lambda _: ocp.SaveArgs(), target)


def maybe_construct_transformations(target: Any, transforms: dict[str, Any] | None) -> dict[str, Any]:
    """The given transformations; by default those that keep the target's None wherever it has one."""
    if transforms is not None:
        return transforms
    flat = ocp.utils.to_flat_dict(target, sep="/", keep_empty_nodes=True)
    return {path: ocp.Transform(use_fallback=True) for path, value in flat.items() if value is None}


def restore_args_from_target(target: Any, mesh: Mesh | None = None) -> Any:
    """Arguments to restore each leaf as ``target`` has it: with its sharding and dtype, or as numpy arrays.

    Args:
        target: the tree; arrays or ``jax.ShapeDtypeStruct`` with the shardings to restore to, which may be those of
            another mesh than the checkpoint was saved on.
        mesh: deprecated: use the target's partition specs on this mesh.
    """
    shardings = jax.tree.map(lambda x: getattr(x, "sharding", None), target)
    if not jax.tree.leaves(shardings):
        return jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    if mesh is not None:
        warnings.warn("Give the target the shardings of the new mesh instead.", DeprecationWarning, stacklevel=2)
        shardings = jax.tree.map(lambda s: NamedSharding(mesh, s.spec), shardings)
    return ocp.checkpoint_utils.construct_restore_args(target, shardings, set_global_shape=False)
