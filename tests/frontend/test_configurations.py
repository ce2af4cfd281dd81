"""The switches of ``config``: what they change, and that tests and users can set them for a while."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from distaff.frontend import config, core
from distaff.frontend import linen as nn
from distaff.frontend.configurations import Config, FlagHolder, bool_flag, flax_profile, int_flag

KEY, X = jax.random.key(0), jnp.ones((1, 2))


def test_switches_are_set_by_name_and_by_holder_and_come_back():
    assert config.flax_return_frozendict is False and flax_profile.value is True
    with config.temp_flip_flag("return_frozendict", True):
        assert isinstance(nn.Dense(2).init(KEY, X), core.FrozenDict)
    assert type(nn.Dense(2).init(KEY, X)) is dict
    config.update(flax_profile, False)
    try:
        assert config.flax_profile is False and "flax_profile=False" in repr(config)
    finally:
        config.update("flax_profile", True)


def test_adopted_modules_keep_their_names_on_request():
    model = nn.Sequential([nn.Dense(2, name="mine")])
    assert set(model.init(KEY, X)["params"]) == {"layers_0"}
    with config.temp_flip_flag("preserve_adopted_names", True):
        assert set(model.init(KEY, X)["params"]) == {"mine"}


def test_paths_of_random_keys_can_be_told_apart():
    def key(*path):
        return jax.random.key_data(core.scope.LazyRng(KEY, path).as_jax_rng()).tolist()

    assert key("ab", "c") == key("a", "bc")  # as Flax folds them in by default
    with config.temp_flip_flag("fix_rng_separator", True):
        assert key("ab", "c") != key("a", "bc")
        flax = pytest.importorskip("flax")
        with flax.config.temp_flip_flag("fix_rng_separator", True):
            theirs = flax.core.scope.LazyRng(KEY, ("ab", "c", 3)).as_jax_rng()
        assert key("ab", "c", 3) == jax.random.key_data(theirs).tolist()


def test_the_environment_sets_them():
    code = "from distaff.frontend import config; print(config.flax_profile)"
    for value, printed in (("off", "False"), ("1", "True")):
        env = {**os.environ, "FLAX_PROFILE": value}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == printed


def test_misuse_is_explained(monkeypatch):
    monkeypatch.setattr(config, "_values", {})
    monkeypatch.setenv("FLAX_TEST_DEPTH", "3")
    assert int_flag("flax_test_depth", default=None, help="").value == 3
    holder = bool_flag("flax_test", default=True, help="A test.")
    assert isinstance(holder, FlagHolder) and isinstance(config, Config) and holder.__doc__ == "A test."
    with pytest.raises(RuntimeError, match="already defined"):
        bool_flag("flax_test", default=True, help="")
    with pytest.raises(LookupError, match="Unrecognized config option: unknown"):
        config.update("unknown", 1)
    with pytest.raises(AttributeError, match="unknown"):
        config.unknown  # noqa: B018
    with pytest.raises(TypeError, match=r"test\.value"):
        bool(holder)
    monkeypatch.setenv("FLAX_TEST_WORD", "perhaps")
    with pytest.raises(ValueError, match="FLAX_TEST_WORD has the value 'perhaps'"):
        bool_flag("flax_test_word", default=True, help="")
