import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff.runtime.executables import CompileForbiddenError, ExecutableCache, compilations

SHAPE = jax.ShapeDtypeStruct((5,), jnp.float32)
X = np.arange(5, dtype=np.float32)


def double():
    """A new jitted function each time, so that no cache but the tested one can answer."""
    return jax.jit(lambda x: (x * 2, {"sum": x.sum()}))


def check(executable) -> None:
    doubled, rest = executable(X)
    np.testing.assert_array_equal(doubled, X * 2)
    assert rest["sum"] == X.sum()


def stored(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


@pytest.mark.smoke
def test_compiles_once_then_loads(tmp_path):
    first, second = ExecutableCache(tmp_path), ExecutableCache(tmp_path)
    check(first.get("double", double(), SHAPE))
    before = compilations()
    check(second.get("double", double(), SHAPE))
    assert compilations() == before
    assert [record.compiled for record in first.records + second.records] == [True, False]
    assert second.records[0].bytes == first.records[0].bytes > 0


def test_a_given_program_hash_spares_the_trace(tmp_path):
    def untraceable(x):
        raise AssertionError("traced")

    ExecutableCache(tmp_path).get("f", double(), SHAPE, program="p")
    cache = ExecutableCache(tmp_path)
    assert cache.has("f", SHAPE, program="p")
    check(cache.get("f", jax.jit(untraceable), SHAPE, program="p"))


def test_what_is_computed_for_which_shapes_and_where_is_part_of_the_key(tmp_path, monkeypatch):
    cache = ExecutableCache(tmp_path)
    cache.get("f", double(), SHAPE)
    cache.get("f", jax.jit(lambda x: x * 3), SHAPE)
    cache.get("f", double(), jax.ShapeDtypeStruct((6,), jnp.float32))
    assert [record.compiled for record in cache.records] == [True] * 3
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    other = ExecutableCache(tmp_path)
    check(other.get("f", double(), SHAPE))
    assert other.records[0].compiled
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("damage", ["truncated", "flipped", "not a pickle", "empty"])
def test_damaged_files_are_compiled_again_and_replaced(tmp_path, damage, caplog):
    ExecutableCache(tmp_path).get("double", double(), SHAPE)
    file = stored(tmp_path)
    good = file.read_bytes()
    bad = {
        "truncated": good[:-10],
        "flipped": good[:-10] + bytes([good[-10] ^ 1]) + good[-9:],
        "not a pickle": good.partition(b"\n")[0] + b"\nhello",
        "empty": b"",
    }[damage]
    file.write_bytes(bad)
    cache = ExecutableCache(tmp_path)
    with caplog.at_level(logging.WARNING):
        check(cache.get("double", double(), SHAPE))
    assert "compiling again" in caplog.text
    assert cache.records[0].compiled
    again = ExecutableCache(tmp_path)
    check(again.get("double", double(), SHAPE))
    assert not again.records[0].compiled


def test_a_whole_file_that_xla_cannot_load_is_compiled_again(tmp_path, monkeypatch, caplog):
    ExecutableCache(tmp_path).get("double", double(), SHAPE)

    def refuse(*args, **kwargs):
        raise RuntimeError("no such CPU")

    cache = ExecutableCache(tmp_path)
    monkeypatch.setattr("jax.experimental.serialize_executable.deserialize_and_load", refuse)
    with caplog.at_level(logging.WARNING):
        check(cache.get("double", double(), SHAPE))
    assert "RuntimeError: no such CPU" in caplog.text
    assert cache.records[0].compiled


def test_compiling_can_be_forbidden(tmp_path):
    cache = ExecutableCache(tmp_path)
    cache.get("double", double(), SHAPE)
    cache.forbid_compiles = True
    check(cache.get("double", double(), SHAPE))
    with pytest.raises(CompileForbiddenError, match="triple"):
        cache.get("triple", jax.jit(lambda x: x * 3), SHAPE)


def test_a_folder_that_cannot_be_written_costs_only_the_cache(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = ExecutableCache(tmp_path / "file")
    with caplog.at_level(logging.WARNING):
        check(cache.get("double", double(), SHAPE))
    assert "next start will compile" in caplog.text


def test_donation_survives_storing(tmp_path):
    arguments = jax.ShapeDtypeStruct((1 << 16,), jnp.float32)
    for _ in range(2):
        step = ExecutableCache(tmp_path).get("add", jax.jit(lambda x: x + 1, donate_argnums=0), arguments)
        x = jnp.zeros(1 << 16)
        pointer = x.unsafe_buffer_pointer()
        y = step(x)
        assert x.is_deleted()
        assert y.unsafe_buffer_pointer() == pointer
