"""Runs on_four_devices.py in a process of its own, as the number of devices is fixed when JAX starts."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "on_four_devices.py"


def test_on_four_devices():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(SCRIPT)]
    run = subprocess.run(command, env=environment, cwd=SCRIPT.parents[3], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
