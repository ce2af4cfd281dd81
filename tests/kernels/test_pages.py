"""Writing and reading pages, and that the pool is never copied: a copy costs more than the rest of the step."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from distaff.kernels.paged_attention import (
    AttentionSpec,
    StepBatch,
    paged_attention,
    pool_shape,
    read_context,
    row_shape,
    write_pages,
)

LAYERS, PAGES, PAGE = 4, 512, 16
KV, SIZE, HEADS, WIDTH = 3, 64, 9, 8


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), tokens=st.sampled_from([1, 2, 9]), traced=st.booleans())
def test_rows_land_in_their_slots_and_are_read_back_in_order(seed, tokens, traced):
    rng = np.random.default_rng(seed)
    pool = rng.normal(size=(3, 7, 4, 2, 5)).astype(np.float32)
    slots = rng.permutation(28)[:tokens].astype(np.int32)
    padding = slots == 0
    values = rng.normal(size=(tokens, 2, 5)).astype(np.float32)
    layer = int(rng.integers(3))
    wanted = pool.copy()
    wanted[layer].reshape(28, 2, 5)[slots] = np.where(padding[:, None, None], 0, values)
    values[padding] = np.nan  # padding may hold anything
    written = jax.jit(write_pages, static_argnums=() if traced else 1)(pool, layer, slots, values)
    np.testing.assert_array_equal(written, wanted)
    table = rng.integers(0, 7, 5).astype(np.int32)
    np.testing.assert_array_equal(read_context(written, layer, table), wanted[layer, table].reshape(20, 2, 5))


@pytest.mark.smoke
def test_a_uint16_pool_keeps_bfloat16():
    pool = jnp.zeros((1, 2, 4, 3), jnp.uint16)
    values = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    read = read_context(write_pages(pool, 0, jnp.array([5, 2]), values), 0, jnp.array([1, 0]))
    assert read.dtype == jnp.bfloat16
    np.testing.assert_array_equal(read[1], values[0].astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(read[4 + 2], values[1].astype(ml_dtypes.bfloat16))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.sampled_from([1, 5, 64]), scale=st.sampled_from([1e-30, 1.0, 1e30]))
def test_an_int8_pool_keeps_each_row_within_half_a_step(seed, size, scale):
    rng = np.random.default_rng(seed)
    values = (rng.normal(size=(3, 2, size)) * scale).astype(np.float32)
    values[0, 0] = 0
    pool = jnp.zeros((1, 2, 4, *pool_shape((2, size), "int8")), jnp.int8)
    assert row_shape(pool) == (2, size)
    pool = write_pages(pool, 0, jnp.array([5, 2, 7]), values)
    read = read_context(pool, 0, jnp.array([1, 0]))
    assert read.dtype == jnp.float32 and read.shape == (8, 2, size)
    steps = np.abs(values).max(-1, keepdims=True) / 127
    assert (np.abs(read[jnp.array([1, 6, 3])] - values) <= steps * 0.501).all()


@pytest.mark.smoke
def test_values_are_cast_to_the_pool():
    pool = write_pages(jnp.zeros((1, 2, 4, 3), jnp.float16), 0, jnp.array([3]), np.ones((1, 3), np.float32))
    assert pool.dtype == jnp.float16
    np.testing.assert_array_equal(pool[0, 0, 3], 1)


def one_layer(layer, x, k_pages, v_pages, batch):
    k, v = x[:, :KV], 2 * x[:, :KV]
    output, *pools = paged_attention(AttentionSpec(0.1), x, k, v, k_pages, v_pages, layer, batch)
    return x + output, *pools


def unrolled(k_pages, v_pages, x, batch):
    for layer in range(LAYERS):
        x, k_pages, v_pages = one_layer(layer, x, k_pages, v_pages, batch)
    return x, k_pages, v_pages


def scanned(k_pages, v_pages, x, batch):
    def body(carry, layer):
        return one_layer(layer, *carry, batch), None

    return lax.scan(body, (x, k_pages, v_pages), jnp.arange(LAYERS))[0]


def tokens_of_one_request_each(tokens: int, requests: int) -> StepBatch:
    """A prompt of ``tokens`` in row 0, or with as many rows as tokens the first token of each."""
    numbers = np.arange(tokens, dtype=np.int32)
    tables = np.arange(1, 1 + requests, dtype=np.int32)[:, None] % PAGES * np.ones(WIDTH, np.int32)
    contexts, zeros = np.zeros(requests, np.int32), np.zeros(tokens, np.int32)
    if tokens == requests:
        rows, starts, contexts[:], positions = numbers, np.arange(requests + 1), 1, zeros
    else:
        rows, starts, contexts[0], positions = zeros, np.where(np.arange(requests + 1), tokens, 0), tokens, numbers
        tables[0] = 1 + np.arange(WIDTH)
    slots = tables[rows, positions // PAGE] * PAGE + positions % PAGE
    fields = (zeros, positions, slots, rows, starts, contexts, tables, 0, zeros[:1])
    return StepBatch(*(jnp.asarray(field, jnp.int32) for field in fields))


@pytest.mark.parametrize("dtype", ["float32", "uint16"])
@pytest.mark.parametrize("program", [unrolled, scanned])
@pytest.mark.parametrize(("tokens", "requests"), [(1, 1), (2, 2), (2, 1), (8, 8), (64, 2)])
def test_the_pool_stays_in_place(tokens, requests, program, dtype):
    batch = tokens_of_one_request_each(tokens, requests)
    pools = [jnp.zeros((LAYERS, PAGES, PAGE, KV, SIZE), dtype) for _ in range(2)]
    x = jnp.ones((tokens, HEADS, SIZE))
    compiled = jax.jit(program, donate_argnums=(0, 1)).lower(*pools, x, batch).compile()
    assert copies(compiled.as_text(), pools[0].size) == []
    # Nothing widens the pool either (bfloat16 would be): all scratch together is smaller than one.
    assert compiled.memory_analysis().temp_size_in_bytes < pools[0].nbytes / 2
    before = [pool.unsafe_buffer_pointer() for pool in pools]
    output, *pools = compiled(*pools, x, batch)
    assert [pool.unsafe_buffer_pointer() for pool in pools] == before
    assert np.isfinite(output).all()


def copies(text: str, size: int) -> list[str]:
    """The lines of a compiled program that copy or convert an array of ``size`` elements."""
    found = []
    for line in text.splitlines():
        match = re.search(r"= \(?\w+\[([\d,]+)\].* (copy|copy-start|convert|transpose)\(", line)
        if match and np.prod([int(n) for n in match[1].split(",")]) == size:
            found.append(line.strip())
    return found


def test_the_check_finds_a_copy():
    """A pool that is not donated must be copied, and `copies` must see it."""
    batch = tokens_of_one_request_each(8, 8)
    pools = [jnp.zeros((LAYERS, PAGES, PAGE, KV, SIZE)) for _ in range(2)]
    compiled = jax.jit(unrolled).lower(*pools, jnp.ones((8, HEADS, SIZE)), batch).compile()
    assert len(copies(compiled.as_text(), pools[0].size)) == 2
