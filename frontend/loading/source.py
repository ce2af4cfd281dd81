"""Finding a model: on disk, on the Hugging Face hub, or as the packaged demo model."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from distaff.frontend.loading.demo_model import DEMO_MODEL, find_demo_model
from distaff.frontend.loading.errors import DownloadError, MissingDependencyError, SourceNotFoundError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]
_HUB_DUPLICATES = ["consolidated*", "original/*", "onnx/*"]


@dataclasses.dataclass(frozen=True)
class Located:
    """A model on disk: the ``name`` to call it by, and its folder or GGUF file."""

    name: str
    path: Path


def locate(source: str | Path) -> Located:
    """Where ``source`` is, fetching it first if it is a name; see `load_model`.

    Raises `SourceNotFoundError`, `DownloadError` or `MissingDependencyError`.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise SourceNotFoundError(f"{path} is not a .gguf file; for a Hugging Face checkpoint pass its folder")
        return Located(path.stem, path)
    if path.is_dir():
        return Located(path.resolve().name, _model_folder(path))
    if str(source) == DEMO_MODEL:
        return Located(DEMO_MODEL, find_demo_model())
    if isinstance(source, str) and path.suffix.lower() != ".gguf" and _HUB_NAME.fullmatch(source):
        return Located(source, _download(source))
    raise SourceNotFoundError(
        f"{str(source)!r} is neither a folder nor a .gguf file here, nor a hub name such as 'org/name', "
        f"nor {DEMO_MODEL!r}"
    )


def _model_folder(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    files = sorted(file.name for file in path.glob("*.gguf"))
    hint = f", but {', '.join(files)}: pass one of these files" if files else ""
    raise SourceNotFoundError(f"{path} holds no config.json{hint}")


def _download(name: str) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise MissingDependencyError("huggingface_hub", "hub", f"fetching {name}") from None
    try:
        folder = huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_DUPLICATES)
    except GatedRepoError as error:
        raise DownloadError(
            f"{name} is only given to those who accepted its licence on the hub: do that, then `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        raise DownloadError(
            f"{name} is not in the local cache, and the hub cannot be reached; fetch it where there is a network and "
            f"pass its folder"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise DownloadError(f"{name} could not be fetched from the Hugging Face hub: {error}") from error
    return _model_folder(Path(folder))
