"""What can go wrong between a model's name and its weights in memory: one class an error."""

from __future__ import annotations

from collections.abc import Sequence

_SHOWN = 20


class CheckpointError(Exception):
    """Base of all errors of loading."""


class SourceNotFoundError(CheckpointError):
    """The model is at none of the places that its name could mean."""


class DownloadError(CheckpointError):
    """The model could not be fetched."""


class CheckpointFormatError(CheckpointError):
    """A file of the checkpoint is missing, damaged, or of a kind that cannot be read."""


class TokenizerFormatError(CheckpointError):
    """The checkpoint's tokenizer is of a kind that cannot be converted."""


class TensorMismatchError(CheckpointError):
    """The checkpoint's tensors are not those that the config describes.

    Attributes: ``missing`` and ``extra`` (names), ``misshapen`` ("name: has shape …, expected …").
    """

    def __init__(self, where: str, missing: Sequence[str], extra: Sequence[str], misshapen: Sequence[str]) -> None:
        self.missing, self.extra, self.misshapen = tuple(missing), tuple(extra), tuple(misshapen)
        parts = [
            _listing("missing", self.missing),
            _listing("not part of the model", self.extra),
            _listing("of another shape", self.misshapen),
        ]
        super().__init__(f"{where} does not hold the tensors that its config describes{''.join(parts)}")


class MissingDependencyError(CheckpointError):
    """An optional package is needed for this kind of source."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package}; install it with: pip install 'distaff[{extra}]'")


def _listing(title: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f"\n    … and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"\n  {title} ({len(names)}):" + "".join(f"\n    {name}" for name in names[:_SHOWN]) + more
