"""The folder that checkpoints lie in: names, order, and which to delete.

Invariant: at any moment, even if the process is killed, the folder holds the last checkpoint that was complete. A new
one appears by an atomic rename; one that is to be replaced first steps aside (``checkpoint_5.previous``), and counts
until its successor is there; old ones are deleted last.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from distaff.frontend import errors

SIGNED_FLOAT_RE = re.compile(r"([-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)")
UNSIGNED_FLOAT_RE = re.compile(r"[-+]?((?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)")
_SCHEME_RE = re.compile(r"[a-z][a-z0-9.+-]+://", re.IGNORECASE)

_PREVIOUS = ".previous"
_UNFINISHED = ".orbax-checkpoint-tmp"  # what Orbax appends to the name of a folder that it is writing
_PROCESS_ARRAYS = "_gda"  # arrays of several processes that Flax once wrote beside a msgpack file


def natural_sort(file_list: Iterable[str], signed: bool = True) -> list[str]:
    """Sort names with their numbers in order of size: ``file_2`` before ``file_10``, ``file_-1`` before ``file_0.5``.

    With ``signed`` False a leading sign is a part of the text.
    """
    numbers = SIGNED_FLOAT_RE if signed else UNSIGNED_FLOAT_RE

    def key(name: str) -> list[str | float]:
        return [float(part) if numbers.match(part) else part for part in numbers.split(name)]

    return sorted(file_list, key=key)


def safe_normpath(path: str) -> str:
    """``os.path.normpath`` that leaves a scheme such as ``gs://`` alone."""
    scheme = _SCHEME_RE.match(path)
    start = scheme.end() if scheme else 0
    return path[:start] + os.path.normpath(path[start:])


def local_folder(folder: str | os.PathLike[str]) -> str:
    """The normalised path of a folder on a file system.

    Raises:
        ValueError: it is in an object store.
    """
    path = safe_normpath(os.fspath(folder))
    if _SCHEME_RE.match(path):
        raise ValueError(
            f"{path} is not on a file system; for object stores use orbax.checkpoint.CheckpointManager directly."
        )
    return path


@dataclasses.dataclass(frozen=True)
class CheckpointFolder:
    """The checkpoints in ``folder`` whose names are ``prefix`` and a number, their step."""

    folder: str
    prefix: str

    def path(self, step: object) -> str:
        """Where the checkpoint of a step belongs."""
        return os.path.join(self.folder, f"{self.prefix}{step}")

    def find(self, step: object) -> str | None:
        """The complete checkpoint of a step, which may have stepped aside."""
        path = self.path(step)
        return next((p for p in (path, path + _PREVIOUS) if os.path.exists(p)), None)

    def complete(self) -> list[str]:
        """The complete checkpoints, in order of their steps."""
        listed: list[str] | None = None
        while True:
            names = sorted(name for name in self._names() if not self._is_unfinished(name))
            replaced = {name.removesuffix(_PREVIOUS) for name in names}
            found = [self.find(name.removeprefix(self.prefix)) for name in natural_sort(replaced)]
            present = [path for path in found if path is not None]
            # One that is gone since it was listed was pruned, and so its successor has come: look again.
            if len(present) == len(found) or names == listed:
                return present
            listed = names

    def _names(self) -> list[str]:
        if not os.path.isdir(self.folder):
            return []
        return [name for name in os.listdir(self.folder) if name.startswith(self.prefix)]

    def _is_unfinished(self, name: str) -> bool:
        return name == f"{self.prefix}tmp" or _UNFINISHED in name or name.endswith(_PROCESS_ARRAYS)

    def step_text(self, path: str) -> str:
        """The step in a checkpoint's name."""
        return os.path.basename(path).removeprefix(self.prefix).removesuffix(_PREVIOUS)

    def check_newest(self, step: object) -> None:
        """Raise `InvalidCheckpointError` if there is a checkpoint of this step or a later one."""
        path = self.path(step)
        others = [self.path(self.step_text(other)) for other in self.complete()]
        if path in others or natural_sort([*others, path])[-1] != path:
            raise errors.InvalidCheckpointError(path, step)

    def make_room(self, step: object) -> None:
        """Before a save: let a checkpoint of this step step aside, and delete what killed processes left unfinished.

        Nobody else may be saving here.
        """
        self._remove_unfinished()
        path = self.path(step)
        if os.path.exists(path):
            remove(path + _PREVIOUS)
            os.rename(path, path + _PREVIOUS)

    def _remove_unfinished(self) -> None:
        for name in self._names():
            if _UNFINISHED in name:
                remove(os.path.join(self.folder, name))

    def write(self, step: object, content: bytes) -> None:
        """Save a checkpoint that is one file."""
        path, temporary = self.path(step), self.path("tmp")
        os.makedirs(self.folder, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if os.path.isdir(path):  # from Orbax; a folder cannot be replaced by a file
            self.make_room(step)
        os.replace(temporary, path)
        self._remove_unfinished()

    def prune(self, newest: object, keep: int, overwrite: bool, keep_every_n_steps: int | None) -> None:
        """Delete old checkpoints: all but the last ``keep``, and with ``overwrite`` those after the step ``newest``.

        With ``keep_every_n_steps`` old ones stay that are at least so many steps after the last one that stayed. A
        checkpoint that is still being written does not count, so that as many complete ones stay.
        """
        for name in self._names():
            if name.endswith(_PREVIOUS) and name.removesuffix(_PREVIOUS) in self._names():
                remove(os.path.join(self.folder, name))
        complete = self.complete()
        if overwrite and self.path(newest) in complete:
            after = complete.index(self.path(newest)) + 1
            complete, later = complete[:after], complete[after:]
            for path in later:
                remove(path)
        last_kept = -float("inf")
        for path in complete[:-keep]:
            number = SIGNED_FLOAT_RE.search(self.step_text(path))
            step = float(number[0]) if number else 0.0
            if keep_every_n_steps and step and step - last_kept >= keep_every_n_steps:
                last_kept = step
            else:
                remove(path)


def remove(path: str) -> None:
    """Delete a file or a folder, if it is there; a folder that is half deleted has the name of an unfinished one."""
    if os.path.isdir(path):
        doomed = path if _UNFINISHED in path else f"{path}{_UNFINISHED}-deleted"
        os.replace(path, doomed)
        shutil.rmtree(doomed)
    else:
        Path(path).unlink(missing_ok=True)
