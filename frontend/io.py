"""File operations by the names of ``flax.io``, on the local file system.

There is no other backend: a path such as ``gs://…`` is not found. Checkpoints go through Orbax, which reads those.
"""

from __future__ import annotations

import contextlib
import enum
import glob as _glob
import os
import shutil
from collections.abc import Iterator
from typing import IO, Any

from distaff.frontend import errors

NotFoundError = FileNotFoundError


class BackendMode(enum.Enum):
    """What operations go through: Python, or TensorFlow, which is not offered."""

    DEFAULT = 0
    TF = 1


io_mode = BackendMode.DEFAULT


def set_mode(override: BackendMode) -> None:
    """Accept the mode that there is; NotImplementedError for ``TF``."""
    if override is not BackendMode.DEFAULT:
        raise NotImplementedError("Files of remote stores are read by Orbax; there is no TensorFlow backend here.")


@contextlib.contextmanager
def override_mode(override: BackendMode) -> Iterator[None]:
    """A block in that mode; as ``set_mode``."""
    set_mode(override)
    yield


def GFile(name: str | os.PathLike[str], mode: str) -> IO[Any]:
    """Open a file; text is UTF-8."""
    return open(name, mode, encoding=None if "b" in mode else "utf-8")


def listdir(path: str | os.PathLike[str]) -> list[str]:
    """The names in a folder."""
    return os.listdir(path)


def isdir(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a folder."""
    return os.path.isdir(path)


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is there."""
    return os.path.exists(path)


def copy(src: str | os.PathLike[str], dst: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Copy a file; AlreadyExistsError if ``dst`` exists and is not to be overwritten."""
    _check_free(dst, overwrite)
    shutil.copy(src, dst)


def rename(src: str | os.PathLike[str], dst: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Move a file or folder; AlreadyExistsError if ``dst`` exists and is not to be overwritten."""
    _check_free(dst, overwrite)
    os.replace(src, dst)


def _check_free(dst: str | os.PathLike[str], overwrite: bool) -> None:
    if not overwrite and os.path.exists(dst):
        raise errors.AlreadyExistsError(dst)


def makedirs(path: str | os.PathLike[str]) -> None:
    """Make a folder and those above it; it may exist."""
    os.makedirs(path, exist_ok=True)


def glob(pattern: str) -> list[str]:
    """The paths that a pattern matches, without trailing slashes."""
    return [path.rstrip("/") for path in _glob.glob(pattern)]


def remove(path: str | os.PathLike[str]) -> None:
    """Remove a file."""
    os.remove(path)


def rmtree(path: str | os.PathLike[str]) -> None:
    """Remove a folder with all that is in it."""
    shutil.rmtree(path)


def getsize(path: str | os.PathLike[str]) -> int:
    """The size of a file in bytes."""
    return os.path.getsize(path)
