"""The scripts of docs/examples, run in this process."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from click.testing import CliRunner

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


@functools.cache
def load_example(name: str) -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_example(name: str, *options: str) -> str:
    """What the script prints on standard output."""
    result = CliRunner().invoke(load_example(name).main, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout
