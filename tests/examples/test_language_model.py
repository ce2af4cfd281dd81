"""The round trip: trained on one device and on eight, interrupted, compiled, served."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from example_scripts import EXAMPLES, load_example, run_example

from distaff.runtime import LLM, SamplingParams

EXAMPLE = EXAMPLES / "language_model.py"
STEPS = 24
TINY = f"--steps {STEPS} --width 16 --layers 1 --heads 2 --vocab 300 --length 16 --batch 8 --rate 0.02 --save-every 4"

pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")


def start(output, *options):
    """The example in a process of its own."""
    command = [sys.executable, str(EXAMPLE), "--output", str(output), *TINY.split(), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return said


def losses(output):
    file = output / "losses.csv"
    rows = list(csv.reader(file.open())) if file.is_file() else []
    return [(int(step), float(loss)) for step, loss in rows[1:]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    output = tmp_path_factory.mktemp("one") / "device"
    return output, run_example("language_model", "--output", str(output), *TINY.split(), "--tokens", "12")


def test_it_learns_and_says_so(trained):
    output, said = trained
    curve = losses(output)
    assert [step for step, _ in curve] == list(range(STEPS))
    values = [loss for _, loss in curve]
    assert values[0] > np.log(300) - 0.2 and values[-1] < values[0] - 0.7
    assert f"{values[0]:.3f} -> {values[-1]:.3f}" in said and "mesh {'data': 1, 'model': 1}" in said
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert os.listdir(output / "checkpoints") == [f"checkpoint_{STEPS}"]


def test_the_served_text_is_the_argmax_of_the_trained_module(trained):
    output, said = trained
    assert "argmax of the training module's logits" in said
    # The same again, from the files alone.
    module = load_example("language_model")
    params = module.checkpoints.restore_checkpoint(output / "checkpoints", None)["params"]
    params = {"params": unboxed(params)}
    vocab = json.loads((output / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    model = module.LanguageModel(module.Sizes(len(vocab), 16, 1, 2))
    prompts = ["Alice was", "The Queen of Hearts"]
    answers = LLM(output / "artifact").generate(
        prompts, SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True), use_tqdm=False
    )
    for answer in answers:
        sequence = list(answer.prompt_token_ids)
        padded = np.zeros((1, 64), np.int32)
        for token in answer.outputs[0].token_ids:
            padded[0, : len(sequence)] = sequence
            logits = model.apply(params, jnp.asarray(padded))[0, len(sequence) - 1]
            assert token == int(jnp.argmax(logits))
            sequence.append(token)


def unboxed(tree):
    """Without the level that boxes of logical names have in a checkpoint read without a target."""
    if isinstance(tree, dict):
        return tree["value"] if tree.keys() == {"value"} else {name: unboxed(child) for name, child in tree.items()}
    return tree


def test_kill_9_resumes_to_the_same_losses(trained, tmp_path):
    process = start(tmp_path, "--no-serve")
    end = time.monotonic() + 240
    while len(losses(tmp_path)) < 10 and time.monotonic() < end:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = losses(tmp_path)
    assert 10 <= len(before) < STEPS
    saved = os.listdir(tmp_path / "checkpoints")
    assert saved and f"checkpoint_{STEPS}" not in saved
    said = finish(start(tmp_path, "--no-serve"))
    assert "training" in said
    expected = losses(trained[0])
    assert losses(tmp_path)[: len(before)] == before == expected[: len(before)]
    assert losses(tmp_path) == expected


def test_eight_devices_train_the_same_model(trained, tmp_path):
    said = finish(start(tmp_path, "--no-serve", "--devices", "8"))
    assert "mesh {'data': 4, 'model': 2}" in said
    one, eight = (np.array(losses(output)) for output in (trained[0], tmp_path))
    np.testing.assert_allclose(eight[:8], one[:8], rtol=1e-4)
    np.testing.assert_allclose(eight, one, rtol=2e-2)
