"""From a model's name to its weights in memory: Hugging Face folders and hub names, GGUF files, the demo model."""

from distaff.frontend.loading.checkpoint import TokenizerFiles
from distaff.frontend.loading.errors import (
    CheckpointError,
    CheckpointFormatError,
    DownloadError,
    MissingDependencyError,
    SourceNotFoundError,
    TensorMismatchError,
    TokenizerFormatError,
)
from distaff.frontend.loading.model import LoadedModel, load_model

__all__ = [
    "CheckpointError",
    "CheckpointFormatError",
    "DownloadError",
    "LoadedModel",
    "MissingDependencyError",
    "SourceNotFoundError",
    "TensorMismatchError",
    "TokenizerFiles",
    "TokenizerFormatError",
    "load_model",
]
