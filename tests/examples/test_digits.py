"""The examples on digits, with few epochs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from distaff.frontend import linen as nn

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
pytest.importorskip("sklearn")


def run(name, *options):
    command = [sys.executable, str(EXAMPLES / name), *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(not hasattr(nn, "Conv"), reason="needs nn.Conv")
def test_cnn():
    said = run("digits_cnn.py", "--epochs", "2")
    accuracies = [float(x) for x in re.findall(r"accuracy (?:of the averaged parameters: )?(\d\.\d+)", said)]
    assert len(accuracies) == 3 and accuracies[1] > 0.85 and accuracies[2] > 0.8


@pytest.mark.skipif(not hasattr(nn, "RNN"), reason="needs nn.RNN")
def test_lstm():
    said = run("digits_lstm.py", "--epochs", "30", "--patience", "0", "--rate", "0.02")
    accuracies = [float(x) for x in re.findall(r"accuracy (\d\.\d+)", said)]
    assert len(accuracies) > 2 and accuracies[-1] > 0.8
    assert ("stopped" in said) == (len(accuracies) < 30)


@pytest.mark.parametrize("name", ["language_model.py", "digits_cnn.py", "digits_lstm.py"])
def test_help(name):
    said = run(name, "--help")
    assert "Trains" in said and "--help" in said and f"python docs/examples/{name}" in said
