"""Checkpoints by step: ``save_checkpoint`` and ``restore_checkpoint``; the names are those of ``flax.training``.

Orbax writes them (sharded arrays, any mesh on restoring, PRNG keys, in the background if asked to). The older msgpack
files of Flax can be written and read too. A process that is killed while it saves never loses the last checkpoint.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from jax.experimental.multihost_utils import sync_global_devices

from distaff.frontend import errors, serialization
from distaff.frontend.configurations import config
from distaff.frontend.core.frozen_dict import FrozenDict, freeze
from distaff.frontend.training import orbax_utils
from distaff.frontend.training.checkpoint_files import CheckpointFolder, local_folder
from distaff.frontend.training.checkpoint_files import natural_sort as natural_sort
from distaff.frontend.training.checkpoint_files import safe_normpath as safe_normpath

_ORBAX_FILES = ("checkpoint", "_METADATA", "manifest.ocdbt")
# Where Flax kept arrays of several processes beside a msgpack file.
_PROCESS_ARRAY = "//GDAPlaceholder:"
_NUMBERED_MODULE = re.compile(r"(.*)_\d+$")


class AsyncManager:
    """Saves in the background, one checkpoint at a time.

    >>> manager = AsyncManager()
    >>> save_checkpoint(folder, state, step, async_manager=manager)
    >>> manager.wait_previous_save()
    """

    def __init__(self, max_workers: int = 1) -> None:
        self.executor = ThreadPoolExecutor(max_workers=max_workers)
        self.save_future: Future[Any] | None = None
        self._checkpointer: ocp.AsyncCheckpointer | None = None

    def wait_previous_save(self) -> None:
        """Wait until the checkpoint in progress is complete; raise what went wrong with it."""
        future, self.save_future = self.save_future, None
        if future is not None:
            future.result()

    def save_async(self, task: Callable[[], Any]) -> None:
        """Run ``task`` in the background, after the one before."""
        self.wait_previous_save()
        self.save_future = self.executor.submit(task)

    def checkpointer(self) -> ocp.AsyncCheckpointer:
        """What saves trees for this manager: it copies arrays to the host, and writes in the background."""
        if self._checkpointer is None:
            self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        return self._checkpointer


def save_checkpoint(
    ckpt_dir: str | os.PathLike[str],
    target: Any,
    step: int | float,
    prefix: str = "checkpoint_",
    keep: int = 1,
    overwrite: bool = False,
    keep_every_n_steps: int | None = None,
    async_manager: AsyncManager | None = None,
    orbax_checkpointer: Any = None,
    *,
    file_format: Literal["orbax", "msgpack"] | None = None,
) -> str:
    """Save a checkpoint, then delete older ones.

    With ``async_manager`` or an ``orbax.checkpoint.AsyncCheckpointer`` this returns when the arrays are copied to the
    host; with the latter, older checkpoints are deleted at the next save.

    Args:
        ckpt_dir: the folder, on a file system.
        target: a tree of arrays, numbers and strings, such as a ``TrainState``.
        step: the step, or any number that orders checkpoints.
        prefix: what file names begin with.
        keep: how many checkpoints to keep.
        overwrite: replace a checkpoint of this step and delete those of later steps, instead of raising.
        keep_every_n_steps: keep, besides, old checkpoints at this distance.
        async_manager: saves in the background.
        orbax_checkpointer: the checkpointer to use, with a handler for trees.
        file_format: ``"msgpack"`` writes one file, ``serialization.to_bytes(target)``, as Flax did before Orbax. The
            default is ``"orbax"``, unless ``config.flax_use_orbax_checkpointing`` is off.

    Returns:
        The path of the checkpoint.

    Raises:
        InvalidCheckpointError: there is a checkpoint of this step or a later one, and ``overwrite`` is False.
        ValueError: ``target`` is a single leaf, which Orbax cannot save; or the folder is in an object store.
    """
    folder = CheckpointFolder(local_folder(ckpt_dir), prefix)
    prune = functools.partial(folder.prune, step, keep, overwrite, keep_every_n_steps)
    is_orbax = orbax_checkpointer is not None or config.flax_use_orbax_checkpointing
    if (file_format or ("orbax" if is_orbax else "msgpack")) == "msgpack":
        return _save_file(folder, target, step, overwrite, prune, async_manager)
    return _save_tree(folder, target, step, overwrite, prune, async_manager, orbax_checkpointer)


def save_checkpoint_multiprocess(
    ckpt_dir: str | os.PathLike[str],
    target: Any,
    step: int | float,
    prefix: str = "checkpoint_",
    keep: int = 1,
    overwrite: bool = False,
    keep_every_n_steps: int | None = None,
    async_manager: AsyncManager | None = None,
    gda_manager: Any = None,
    orbax_checkpointer: Any = None,
) -> str:
    """As ``save_checkpoint``, called by all processes with a folder that they share; each writes its part.

    ``gda_manager``, which Flax used before Orbax, is not supported and raises ValueError.
    """
    if gda_manager is not None:
        raise ValueError("gda_manager is not supported: leave it out, and Orbax writes the arrays of all processes.")
    folder = CheckpointFolder(local_folder(ckpt_dir), prefix)
    return _save_tree(
        folder,
        target,
        step,
        overwrite,
        functools.partial(folder.prune, step, keep, overwrite, keep_every_n_steps),
        async_manager,
        orbax_checkpointer,
        is_main=jax.process_index() == 0,
        barrier=lambda: sync_global_devices("distaff:save_checkpoint"),
    )


def _save_file(
    folder: CheckpointFolder,
    target: Any,
    step: int | float,
    overwrite: bool,
    prune: Callable[[], None],
    async_manager: AsyncManager | None,
) -> str:
    """Save a msgpack file."""
    if async_manager is not None:
        async_manager.wait_previous_save()
    if not overwrite:
        folder.check_newest(step)
    content = serialization.to_bytes(target)

    def write() -> None:
        folder.write(step, content)
        prune()

    if async_manager is not None:
        async_manager.save_async(write)
    else:
        write()
    return folder.path(step)


def _save_tree(
    folder: CheckpointFolder,
    target: Any,
    step: int | float,
    overwrite: bool,
    prune: Callable[[], None],
    async_manager: AsyncManager | None,
    checkpointer: Any,
    is_main: bool = True,
    barrier: Callable[[], None] = lambda: None,
) -> str:
    """Save with Orbax. Only the main process changes the folder, between the barriers and at the end."""
    if async_manager is not None:
        async_manager.wait_previous_save()
        checkpointer = checkpointer or async_manager.checkpointer()
    checkpointer = checkpointer or ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    _finish(checkpointer)
    if jax.tree_util.all_leaves([target]):
        raise ValueError(
            f"Orbax saves trees, and this is a leaf: {type(target)}. Save a dict with it, or use file_format='msgpack'."
        )
    if not overwrite:
        folder.check_newest(step)
    barrier()
    if is_main:
        folder.make_room(step)
    barrier()
    checkpointer.save(os.path.abspath(folder.path(step)), target)

    def complete() -> None:
        _finish(checkpointer)
        if is_main:
            prune()

    if async_manager is not None:
        async_manager.save_async(complete)
    elif not isinstance(checkpointer, ocp.AsyncCheckpointer):
        complete()
    elif is_main:
        prune()
    return folder.path(step)


def _finish(checkpointer: Any) -> None:
    if isinstance(checkpointer, ocp.AsyncCheckpointer):
        checkpointer.wait_until_finished()


def latest_checkpoint(ckpt_dir: str | os.PathLike[str], prefix: str = "checkpoint_") -> str | None:
    """The path of the complete checkpoint with the highest step, or None."""
    complete = CheckpointFolder(os.fspath(ckpt_dir), prefix).complete()
    return complete[-1] if complete else None


def available_steps(
    ckpt_dir: str | os.PathLike[str], prefix: str = "checkpoint_", step_type: type[int] | type[float] = int
) -> list[int | float]:
    """The steps of all complete checkpoints, in order; ``step_type`` float for names such as ``checkpoint_0.5``."""
    folder = CheckpointFolder(os.fspath(ckpt_dir), prefix)
    return [step_type(folder.step_text(path)) for path in folder.complete()]


def restore_checkpoint(
    ckpt_dir: str | os.PathLike[str],
    target: Any,
    step: int | float | None = None,
    prefix: str = "checkpoint_",
    parallel: bool = True,
    gda_manager: Any = None,
    allow_partial_mpa_restoration: bool = False,
    orbax_checkpointer: Any = None,
    orbax_transforms: dict[str, Any] | None = None,
) -> Any:
    """Restore the checkpoint of ``step``, or the one with the highest step.

    Args:
        ckpt_dir: a folder of checkpoints, or the path of one.
        target: what has the structure that was saved. Arrays (or ``jax.ShapeDtypeStruct``) come back with the
            target's sharding, whatever mesh they were saved on. None restores nested dicts.
        step: the step; ``ckpt_dir`` is then a folder.
        prefix: what file names begin with.
        parallel: accepted for compatibility; Orbax always reads in parallel.
        gda_manager: accepted for compatibility.
        allow_partial_mpa_restoration: accepted for compatibility.
        orbax_checkpointer: the checkpointer to use.
        orbax_transforms: how to restore a tree that has changed; see ``orbax.checkpoint.Transform``.

    Returns:
        The restored tree; ``target`` itself if there is no checkpoint and no ``step`` was given.

    Raises:
        ValueError: there is no checkpoint of ``step``, or it belongs to a tree of another structure.
        MPACheckpointingRequiredError: a msgpack checkpoint keeps arrays of several processes elsewhere.
    """
    _finish(orbax_checkpointer)
    path = _find(local_folder(ckpt_dir), step, prefix)
    if path is None:
        return target
    if _is_orbax(path):
        return _restore_orbax(path, target, orbax_checkpointer, orbax_transforms)
    with open(path, "rb") as file:
        state = serialization.msgpack_restore(file.read())
    if any(isinstance(leaf, str) and leaf.startswith(_PROCESS_ARRAY) for leaf in jax.tree.leaves(state)):
        raise errors.MPACheckpointingRequiredError(path, step)
    return state if target is None else serialization.from_state_dict(target, state)


def _find(ckpt_dir: str, step: int | float | None, prefix: str) -> str | None:
    """The path of the checkpoint to restore."""
    folder = CheckpointFolder(ckpt_dir, prefix)
    if step is not None:
        found = folder.find(step)
        if found is None:
            raise ValueError(
                f"No checkpoint at {folder.path(step)}. There are the steps "
                f"{', '.join(map(folder.step_text, folder.complete())) or '(none)'}."
            )
        return found
    if not os.path.isdir(ckpt_dir) or _is_orbax(ckpt_dir):
        return ckpt_dir if os.path.exists(ckpt_dir) else None
    return latest_checkpoint(ckpt_dir, prefix)


def _is_orbax(path: str) -> bool:
    return any(os.path.exists(os.path.join(path, name)) for name in _ORBAX_FILES)


def _restore_orbax(path: str, target: Any, checkpointer: Any, transforms: dict[str, Any] | None) -> Any:
    checkpointer = checkpointer or ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    if target is None:
        return serialization.to_state_dict(checkpointer.restore(os.path.abspath(path)))
    options = {"restore_args": orbax_utils.restore_args_from_target(target)}
    if isinstance(checkpointer._handler, ocp.PyTreeCheckpointHandler):
        options["transforms"] = orbax_utils.maybe_construct_transformations(target, transforms)
    restored = checkpointer.restore(os.path.abspath(path), item=target, **options)
    return serialization.from_state_dict(target, serialization.to_state_dict(restored))


def convert_pre_linen(params: Any) -> Any:
    """Rename submodules that were numbered across classes (``Conv_0``, ``Dense_1``) to Linen's numbers of each class.

    Other names, and parameters that are numbered in Linen's way, stay as they are.
    """
    if not isinstance(params, dict | FrozenDict):
        return params
    renamed: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for name in natural_sort(params):
        match = _NUMBERED_MODULE.match(name)
        new_name = name
        if match:
            count = counts.get(match[1], 0)
            new_name, counts[match[1]] = f"{match[1]}_{count}", count + 1
        renamed[new_name] = convert_pre_linen(params[name])
    return freeze(renamed) if isinstance(params, FrozenDict) else renamed
