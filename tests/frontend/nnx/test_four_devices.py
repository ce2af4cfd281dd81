"""Runs the files *on_four_devices.py in processes of their own: the number of devices is fixed when JAX starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("script", ["on_four_devices.py", "sharding_on_four_devices.py"])
def test_on_four_devices(script):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(FOLDER / script)]
    run = subprocess.run(command, env=environment, cwd=FOLDER.parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
