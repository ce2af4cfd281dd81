"""The examples on digits, with few epochs."""

import re

import pytest
from example_scripts import run_example

pytest.importorskip("sklearn")


def test_cnn():
    said = run_example("digits_cnn", "--epochs", "2")
    accuracies = [float(x) for x in re.findall(r"accuracy (?:of the averaged parameters: )?(\d\.\d+)", said)]
    assert len(accuracies) == 3 and accuracies[1] > 0.8 and accuracies[2] > 0.75


def test_lstm():
    said = run_example("digits_lstm", "--epochs", "30", "--patience", "0", "--rate", "0.02")
    accuracies = [float(x) for x in re.findall(r"accuracy (\d\.\d+)", said)]
    assert len(accuracies) > 2 and accuracies[-1] > 0.8
    assert ("stopped" in said) == (len(accuracies) < 30)


@pytest.mark.parametrize("name", ["language_model", "digits_cnn", "digits_lstm"])
def test_help(name):
    said = run_example(name, "--help")
    assert "Trains" in said and "--help" in said and f"python docs/examples/{name}.py" in said
