"""Checkpoints: what is kept, what Flax reads and writes too, and that a killed process loses nothing."""

import importlib
import itertools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tree_equality import assert_trees_equal

from distaff.frontend import core, errors, serialization
from distaff.frontend.training import checkpoint_files, checkpoints
from distaff.frontend.training.train_state import TrainState

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided", "ignore:Flax Checkpointing")


@pytest.fixture(scope="session")
def flax_checkpoints():
    return pytest.importorskip("flax.training.checkpoints")


def use_orbax_in_flax(patch, yes):
    patch.setitem(importlib.import_module("flax").config._values, "flax_use_orbax_checkpointing", yes)


def train_state(seed=0):
    params = {"dense": {"kernel": jax.random.normal(jax.random.key(seed), (3, 2)), "bias": jnp.zeros(2, jnp.bfloat16)}}
    return TrainState.create(apply_fn=max, params=params, tx=optax.adam(0.1)).replace(step=seed)


def value_tree(value):
    return {"x": jnp.full(4, value), "n": value}


def steps(folder, step_type=int):
    return checkpoints.available_steps(folder, step_type=step_type)


@pytest.mark.parametrize("file_format", ["orbax", "msgpack"])
def test_state_comes_back_whole(tmp_path, file_format):
    state = train_state(3)
    path = checkpoints.save_checkpoint(tmp_path, state, 7, file_format=file_format)
    assert path == str(tmp_path / "checkpoint_7") == checkpoints.latest_checkpoint(tmp_path)
    assert os.path.isdir(path) == (file_format == "orbax")
    for place in (tmp_path, path):
        restored = checkpoints.restore_checkpoint(place, train_state())
        assert_trees_equal(jax.device_get(restored.params), jax.device_get(state.params))
        assert_trees_equal(jax.device_get(restored.opt_state), jax.device_get(state.opt_state))
        assert restored.step == 3 and restored.apply_fn is max
    as_dict = checkpoints.restore_checkpoint(tmp_path, None, step=7)
    np.testing.assert_array_equal(as_dict["params"]["dense"]["kernel"], state.params["dense"]["kernel"])
    assert as_dict["opt_state"]["0"]["count"] == 0


@pytest.mark.parametrize("file_format", ["orbax", "msgpack"])
def test_keys_and_other_leaves_come_back(tmp_path, file_format):
    tree = {
        "key": jax.random.key(5),
        "keys": jax.random.split(jax.random.key(6, impl="rbg"), 3),
        "none": None,
        "frozen": core.freeze({"a": jnp.ones(1)}),
        "complex": jnp.array([1j]),
        "flag": True,
    }
    checkpoints.save_checkpoint(tmp_path, tree, 0, file_format=file_format)
    for target in (tree, None):
        restored = checkpoints.restore_checkpoint(tmp_path, target)
        for name in ("key", "keys"):
            assert_trees_equal(restored[name], tree[name])
        assert restored["none"] is None and restored["flag"] is True and restored["complex"][0] == 1j
    assert type(checkpoints.restore_checkpoint(tmp_path, tree)["frozen"]) is core.FrozenDict


@pytest.mark.parametrize("file_format", ["orbax", "msgpack"])
def test_flax_and_we_read_each_others_checkpoints(tmp_path, flax_checkpoints, file_format, monkeypatch):
    use_orbax_in_flax(monkeypatch, file_format == "orbax")
    state = serialization.to_state_dict(train_state(2))
    mine = checkpoints.save_checkpoint(tmp_path / "mine", state, 1, file_format=file_format)
    theirs = flax_checkpoints.save_checkpoint(str(tmp_path / "theirs"), state, 1)
    assert os.path.isdir(theirs) == os.path.isdir(mine)
    for path, target in itertools.product((mine, theirs), (None, state)):
        read = [library.restore_checkpoint(path, target) for library in (checkpoints, flax_checkpoints)]
        assert_trees_equal(*read)
        assert_trees_equal(jax.device_get(read[0]), jax.device_get(state))


@settings(max_examples=25, deadline=None)
@given(
    saved=st.lists(st.integers(0, 12), min_size=1, max_size=8),
    keep=st.integers(1, 3),
    every=st.sampled_from([None, 3]),
    overwrite=st.booleans(),
)
def test_what_is_kept_is_what_flax_keeps(tmp_path_factory, flax_checkpoints, saved, keep, every, overwrite):
    """With files, for which Flax checks order too."""
    folders = [tmp_path_factory.mktemp("kept") for _ in range(2)]
    options = dict(keep=keep, keep_every_n_steps=every, overwrite=overwrite)
    with pytest.MonkeyPatch.context() as patch:
        use_orbax_in_flax(patch, False)
        for step in saved:
            refused = []
            for library, folder in zip((checkpoints, flax_checkpoints), folders, strict=True):
                own = {"file_format": "msgpack"} if library is checkpoints else {}
                try:
                    library.save_checkpoint(str(folder), {"n": step}, step, **options, **own)
                except Exception as error:
                    assert type(error).__name__ == "InvalidCheckpointError"
                    refused.append(library)
            assert len(refused) in (0, 2)
            kept = [sorted(os.listdir(folder)) for folder in folders]
            assert kept[0] == kept[1]
    assert steps(folders[0]) == flax_checkpoints.available_steps(str(folders[1]))
    assert checkpoints.restore_checkpoint(folders[0], None)["n"] == steps(folders[0])[-1]


def test_orbax_folders_are_kept_by_the_same_rules(tmp_path):
    for step in range(5):
        checkpoints.save_checkpoint(tmp_path, value_tree(step), step, keep=2, keep_every_n_steps=2)
    assert steps(tmp_path) == [1, 3, 4]
    with pytest.raises(errors.InvalidCheckpointError, match="overwrite=True"):
        checkpoints.save_checkpoint(tmp_path, value_tree(9), 3)
    checkpoints.save_checkpoint(tmp_path, value_tree(9), 3, keep=2, overwrite=True)
    assert steps(tmp_path) == [1, 3] and checkpoints.restore_checkpoint(tmp_path, None)["n"] == 9
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_1", "checkpoint_3"]


def test_numbers_of_any_kind_order_checkpoints(tmp_path, flax_checkpoints):
    for step in (-1.5, 0.01, 0.1, 2.0, 1e5):
        checkpoints.save_checkpoint(tmp_path, {"n": step}, step, keep=9, file_format="msgpack")
    assert steps(tmp_path, float) == [-1.5, 0.01, 0.1, 2.0, 1e5]
    names = ["f_10", "f_2", "f_-1", "g", "f_1e3", "f_0.5"]
    for signed in (True, False):
        assert checkpoints.natural_sort(names, signed) == flax_checkpoints.natural_sort(names, signed)
    for path in ("gs://a//b/../c", "./x//y", "/a/./b"):
        assert checkpoints.safe_normpath(path) == flax_checkpoints.safe_normpath(path)


def test_where_there_is_nothing(tmp_path):
    for place in (tmp_path, tmp_path / "missing"):
        assert checkpoints.latest_checkpoint(place) is None and steps(place) == []
        assert checkpoints.restore_checkpoint(place, "target") == "target"
    checkpoints.save_checkpoint(tmp_path, {"n": 1}, 4, file_format="msgpack")
    with pytest.raises(ValueError, match="There are the steps 4"):
        checkpoints.restore_checkpoint(tmp_path, None, step=5)
    assert checkpoints.restore_checkpoint(tmp_path, "target", prefix="other_") == "target"


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="leaf"):
        checkpoints.save_checkpoint(tmp_path, jnp.ones(2), 0)
    with pytest.raises(ValueError, match="file system"):
        checkpoints.save_checkpoint("gs://bucket/run", {"n": 1}, 0)
    with pytest.raises(ValueError, match="gda_manager"):
        checkpoints.save_checkpoint_multiprocess(tmp_path, {"n": 1}, 0, gda_manager=object())
    checkpoints.save_checkpoint(tmp_path, {"n": "//GDAPlaceholder:n"}, 0, file_format="msgpack")
    with pytest.raises(errors.MPACheckpointingRequiredError, match="_gda"):
        checkpoints.restore_checkpoint(tmp_path, None)
    (tmp_path / "checkpoint_1").write_bytes(b"\x81")
    with pytest.raises(ValueError):
        checkpoints.restore_checkpoint(tmp_path, None)


@pytest.mark.parametrize("kind", ["manager", "manager, msgpack", "checkpointer"])
def test_saving_in_the_background(tmp_path, kind):
    manager = checkpoints.AsyncManager() if "manager" in kind else None
    checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler()) if manager is None else None
    options = {"file_format": "msgpack"} if "msgpack" in kind else {}
    for step in range(4):
        state = value_tree(step)
        checkpoints.save_checkpoint(
            tmp_path, state, step, async_manager=manager, orbax_checkpointer=checkpointer, **options
        )
        state["x"].delete()  # as donation to the next step would
        assert set(steps(tmp_path)) & {step - 1, step} or step == 0
    if manager is not None:
        manager.wait_previous_save()
        assert sorted(os.listdir(tmp_path)) == ["checkpoint_3"]
    restored = checkpoints.restore_checkpoint(tmp_path, value_tree(0), orbax_checkpointer=checkpointer)
    assert_trees_equal(jax.device_get(restored), jax.device_get(value_tree(3)))
    assert steps(tmp_path)[-1] == 3 and len(steps(tmp_path)) <= 2


def test_a_reader_sees_the_successor_of_what_is_pruned_meanwhile(tmp_path, monkeypatch):
    checkpoints.save_checkpoint(tmp_path, {"n": 1}, 1, file_format="msgpack")
    listdir = os.listdir
    seen = []

    def slow(folder):
        names = listdir(folder)
        seen.append(names)
        if len(seen) == 1:  # a save in another process, between the reader's listing and its look at the files
            (tmp_path / "checkpoint_1").rename(tmp_path / "checkpoint_2")
        return names

    monkeypatch.setattr(os, "listdir", slow)
    assert steps(tmp_path) == [2] and len(seen) == 2
    (tmp_path / "checkpoint_3").symlink_to(tmp_path / "nowhere")
    assert steps(tmp_path) == [2]  # what never exists does not hold it up


def test_errors_in_the_background_are_raised(tmp_path, monkeypatch):
    manager = checkpoints.AsyncManager()

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint_files.CheckpointFolder, "write", broken)
    checkpoints.save_checkpoint(tmp_path, {"n": 1}, 0, async_manager=manager, file_format="msgpack")
    with pytest.raises(OSError, match="disk full"):
        manager.wait_previous_save()
    manager.wait_previous_save()


class Killed(BaseException):
    """Stands for kill -9 between two operations on files."""


OPERATIONS = [(os, "rename"), (os, "replace"), (shutil, "rmtree"), (pathlib.Path, "unlink"), (ocp.Checkpointer, "save")]


def with_death_at(operation, patch):
    """Let operation number ``operation`` on files kill, before or half-way; returns the count of operations."""
    count = itertools.count()

    def deadly(original, name):
        def run(*args, **kwargs):
            if next(count) == operation:
                if name == "rmtree":  # half deleted
                    for child in list(pathlib.Path(args[0]).iterdir())[:1]:
                        original(child) if child.is_dir() else child.unlink()
                raise Killed
            return original(*args, **kwargs)

        return run

    for owner, name in OPERATIONS:
        patch.setattr(owner, name, deadly(getattr(owner, name), name))
    return count


SCENES = {
    "a later step": ("orbax", "orbax", 2, {}),
    "a later step, in a file": ("msgpack", "msgpack", 2, {}),
    "the same step": ("orbax", "orbax", 1, {"overwrite": True}),
    "the same step, in a file": ("msgpack", "msgpack", 1, {"overwrite": True}),
    "an earlier step": ("orbax", "orbax", 0, {"overwrite": True}),
    "an earlier step, in a file": ("msgpack", "msgpack", 0, {"overwrite": True}),
    "a file over a folder": ("orbax", "msgpack", 1, {"overwrite": True}),
    "a folder over a file": ("msgpack", "orbax", 1, {"overwrite": True}),
}


@pytest.mark.parametrize("scene", SCENES)
def test_death_at_any_operation_leaves_the_old_or_the_new_checkpoint(tmp_path, scene):
    before, after, step, options = SCENES[scene]
    died = []
    for operation in itertools.count():
        folder = tmp_path / str(operation)
        for old in (0, 1):
            checkpoints.save_checkpoint(folder, value_tree(10 * old), old, file_format=before, keep=2)
        with pytest.MonkeyPatch.context() as patch:
            with_death_at(operation, patch)
            try:
                checkpoints.save_checkpoint(folder, value_tree(20), step, file_format=after, **options)
            except Killed:
                died.append(operation)
        found = checkpoints.restore_checkpoint(folder, value_tree(0))
        assert_trees_equal(jax.device_get(found), jax.device_get(value_tree(found["n"])))
        assert found["n"] in (10, 20), "the last one before or the new one"
        # The next save works, and tidies up.
        checkpoints.save_checkpoint(folder, value_tree(30), 3, file_format=after)
        assert checkpoints.restore_checkpoint(folder, None)["n"] == 30
        assert [name for name in os.listdir(folder) if name != "checkpoint_tmp"] == ["checkpoint_3"]
        if operation not in died:
            assert found["n"] == 20
            break
    assert died


SAVING = """
import sys, jax, numpy as np
from distaff.frontend.training import checkpoints
folder, in_background = sys.argv[1], sys.argv[2] == "background"
manager = checkpoints.AsyncManager() if in_background else None
for step in range(1, 10**6):
    tree = {"x": np.full(1 << 18, step), "y": [np.full(1 << 16, step) for _ in range(8)]}
    checkpoints.save_checkpoint(folder, tree, step, async_manager=manager)
    print(step, flush=True)
"""


@pytest.mark.parametrize("mode", ["foreground", "background"])
def test_kill_9_while_saving(tmp_path, mode):
    process = subprocess.Popen([sys.executable, "-c", SAVING, str(tmp_path), mode], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) >= 3:
            break
    time.sleep(0.013)
    process.send_signal(signal.SIGKILL)
    reported = [int(line), *map(int, process.stdout.read().split())][-1]
    process.wait()
    restored = checkpoints.restore_checkpoint(tmp_path, None)
    step = int(restored["x"][0])
    assert step >= reported - (mode == "background")
    assert all((np.asarray(leaf) == step).all() for leaf in jax.tree.leaves(restored))
    checkpoints.save_checkpoint(tmp_path, value_tree(0), step + 1)
    assert os.listdir(tmp_path) == [f"checkpoint_{step + 1}"]


def test_names_from_before_linen(flax_checkpoints):
    params = {"Conv_0": {"w": 1}, "Dense_1": {"w": 2}, "Dense_10": {"Dense_3": {"w": 3}}, "own": {"w": 4}}
    assert checkpoints.convert_pre_linen(params) == flax_checkpoints.convert_pre_linen(params)
    converted = checkpoints.convert_pre_linen(core.freeze(params))
    assert type(converted) is core.FrozenDict and converted["Dense_1"]["Dense_0"]["w"] == 3
    assert checkpoints.convert_pre_linen(converted) == converted
