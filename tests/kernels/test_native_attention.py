"""The C++ kernel of paged attention against attention in float64, at every level that the processor has."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from attention_cases import (
    LAYER,
    LAYERS,
    Inputs,
    check_result,
    dense,
    dequantised,
    quantised,
    ragged_batch,
    random_inputs,
    turned,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

from distaff.kernels import native
from distaff.kernels.paged_attention import (
    AttentionSpec,
    Rotary,
    StepBatch,
    batch_shapes,
    cpu,
    paged_attention,
    pool_shape,
)
from distaff.kernels.registry import choose, explain

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels are not built")

BF16 = ml_dtypes.bfloat16
# Weights and queries are rounded to 8 bits where the processor multiplies bfloat16; values are about 1.
BF16_BOUND = 0.03


def check(spec: AttentionSpec, inputs: Inputs, batch: StepBatch, sinks=None, rotary=None, *, traced=False) -> None:
    """Float32 pools to float32's precision, bfloat16 pools to its own."""
    layer = jnp.int32(LAYER) if traced else LAYER
    check_result(cpu.attention(spec, *inputs, layer, batch, sinks, rotary), spec, inputs, batch, sinks, rotary)
    for kept in KEPT:
        check_kept(kept, spec, inputs, batch, sinks, rotary, layer)


class Kept(NamedTuple):
    """How a pool keeps values, what they are then, and how exact a row that the kernel wrote must be."""

    pool: Callable[[np.ndarray], np.ndarray]
    values: Callable[[np.ndarray], np.ndarray]
    written: float  # of the largest value of a row


# A turned key may differ in the last bit of float32, and so by one step of what is kept.
KEPT = (
    Kept(lambda rows: rows.astype(BF16).view(np.uint16), lambda pool: pool.view(BF16).astype(np.float32), 2**-8),
    Kept(quantised, dequantised, 1.01 / 127),
)


def check_kept(kept: Kept, spec, inputs: Inputs, batch: StepBatch, sinks, rotary, layer) -> None:
    """The call on pools that keep less than float32: what they hold is known exactly, so the reference starts there."""
    before = [kept.pool(pool) for pool in inputs[3:]]
    output, *pools = map(np.asarray, cpu.attention(spec, *inputs[:3], *before, layer, batch, sinks, rotary))
    q, k = (turned(spec, rows, batch.positions, rotary).astype(np.float32) for rows in inputs[:2])
    rounded = [kept.values(kept.pool(rows)) for rows in (k, *inputs[2:])]
    wanted = dense(dataclasses.replace(spec, rotary=None), Inputs(q, *rounded), batch, sinks)
    np.testing.assert_allclose(output[: len(wanted)], wanted, atol=BF16_BOUND)
    assert np.isfinite(output).all()
    slots = batch.slots[: len(wanted)]
    for pool, old, rows in zip(pools, before, (k, inputs.v), strict=True):
        flat = pool[LAYER].reshape(-1, *pool.shape[3:])
        got, rows = kept.values(flat[slots]), rows[: len(wanted)]
        assert (np.abs(got - rows) <= kept.written * np.abs(rows).max(-1, keepdims=True, initial=0) + 1e-6).all()
        others = np.setdiff1d(np.arange(1, len(flat)), slots)
        np.testing.assert_array_equal(flat[others], old[LAYER].reshape(flat.shape)[others])
        np.testing.assert_array_equal(pool[1 - LAYER], old[1 - LAYER])


@st.composite
def calls(draw):
    """A spec, the shapes of a call and a seed."""
    groups, kv_heads = draw(st.sampled_from([(1, 3), (2, 2), (3, 3), (4, 1), (5, 2), (7, 1), (10, 1)]))
    size = draw(st.sampled_from([4, 16, 17, 40, 64, 80, 128]))
    value_size = draw(st.sampled_from([size, size, 5, 24, 96]))
    rotary = draw(st.sampled_from([None, "half", "interleaved"]))
    slopes = tuple(draw(st.lists(st.floats(0.01, 0.5), min_size=groups * kv_heads, max_size=groups * kv_heads)))
    spec = AttentionSpec(
        size**-0.5,
        window=draw(st.sampled_from([None, None, 1, 9, 70])),
        softcap=draw(st.sampled_from([None, None, 2.0, 30.0])),
        slopes=draw(st.sampled_from([None, slopes])),
        rotary=None if rotary is None else Rotary(rotary, draw(st.sampled_from([2, size // 2 * 2]))),
    )
    page, width = draw(st.sampled_from([(1, 60), (4, 40), (7, 30), (16, 20)]))
    tokens, requests = draw(st.sampled_from([(1, 1), (6, 6), (20, 3), (130, 5)]))
    sinks = draw(st.booleans())
    return spec, (groups * kv_heads, kv_heads), (size, value_size), (page, width), (tokens, requests), sinks


@settings(max_examples=60, deadline=None)
@given(call=calls(), seed=st.integers(0, 2**32))
def test_any_call(call, seed):
    spec, heads, sizes, (page, width), (tokens, requests), has_sinks = call
    rng = np.random.default_rng(seed)
    batch, num_pages = ragged_batch(rng, tokens, requests, width, page, one_each=tokens == requests)
    inputs = random_inputs(rng, heads, sizes, tokens, (num_pages, page))
    sinks = rng.normal(size=heads[0]).astype(np.float32) if has_sinks else None
    rotary = None
    if spec.rotary is not None:
        angles = rng.normal(size=(width * page, spec.rotary.size)) * 3
        rotary = (np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
    check(spec, inputs, batch, sinks, rotary, traced=bool(seed % 2))


SHAPES = {
    # name: spec, heads, sizes, tokens, requests, pages per request
    "decode": (AttentionSpec(0.125), (9, 3), (64, 64), 5, 5, 40),
    "long-context": (AttentionSpec(0.125, window=900), (9, 3), (64, 64), 1, 1, 100),
    "chunk-of-a-long-context": (AttentionSpec(0.125), (3, 1), (64, 64), 6, 2, 150),
    "prompts": (AttentionSpec(0.1, softcap=20.0), (8, 2), (128, 128), 300, 4, 20),
    "one-kv-head": (AttentionSpec(0.15, window=33), (12, 1), (72, 40), 70, 7, 20),
    "alibi": (AttentionSpec(0.2, slopes=(0.5, 0.25, 0.1)), (3, 3), (17, 33), 90, 3, 20),
}


def check_shape(name: str, seed: int) -> None:
    spec, heads, sizes, tokens, requests, width = SHAPES[name]
    rng = np.random.default_rng(seed)
    batch, num_pages = ragged_batch(rng, tokens, requests, width, 16, one_each=tokens == requests)
    check(spec, random_inputs(rng, heads, sizes, tokens, (num_pages, 16)), batch)


LEVEL_SCRIPT = """
import sys
sys.path[:0] = sys.argv[2:]
import test_native_attention as tests
assert tests.native.features()[-1] == sys.argv[1], tests.native.features()
for name in tests.SHAPES:
    for seed in (1, 2, 3):
        tests.check_shape(name, seed)
"""


@pytest.mark.parametrize("level", native.features())
def test_every_level_of_the_processor(level):
    here = os.path.dirname(__file__)
    command = [sys.executable, "-c", LEVEL_SCRIPT, level, here, os.path.dirname(here)]
    done = subprocess.run(command, env={**os.environ, "DISTAFF_CPU_LEVEL": level}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_rows_of_bfloat16():
    rng = np.random.default_rng(5)
    batch, num_pages = ragged_batch(rng, 30, 4, 10, 4)
    inputs = random_inputs(rng, (6, 2), (64, 64), 30, (num_pages, 4))
    narrow = Inputs(*(rows.astype(BF16).astype(np.float32) for rows in inputs[:3]), *inputs[3:])
    q, k, v = (rows.astype(BF16) for rows in inputs[:3])
    output, *pools = cpu.attention(AttentionSpec(0.125), q, k, v, *inputs[3:], LAYER, batch, None, None)
    assert output.dtype == jnp.bfloat16
    check_result((output.astype(np.float32), *pools), AttentionSpec(0.125), narrow, batch, atol=0.01)


def test_keys_that_are_values_are_written_once():
    rng = np.random.default_rng(6)
    batch, num_pages = ragged_batch(rng, 30, 4, 10, 4)
    inputs = random_inputs(rng, (6, 2), (24, 24), 30, (num_pages, 4))
    pool = jnp.asarray(inputs.k_pages)
    spec = AttentionSpec(0.2)
    result = paged_attention(spec, *inputs[:3], pool, pool, LAYER, batch, platform="cpu")
    assert result[1] is result[2]
    check_result(result, spec, inputs._replace(v=inputs.k, v_pages=inputs.k_pages), batch)


@pytest.mark.parametrize("dtype", ["float32", "uint16", "int8"])
@pytest.mark.parametrize("looped", [False, True])
def test_pools_of_any_number_of_pages_stay_in_place(dtype, looped):
    """Exported with a symbolic number of pages: the compiled program copies nothing and returns the same memory."""
    layers, page, spec = 4, 16, AttentionSpec(0.125)
    batch, _ = ragged_batch(np.random.default_rng(7), 40, 4, 20, page)

    def step(k_pages, v_pages, q, batch):
        def layer(state, number):
            x, *pools = state
            output, *pools = paged_attention(spec, x, x[:, :3], x[:, :3] * 2, *pools, number, batch, platform="cpu")
            return (x + output, *pools), None

        state = (q, k_pages, v_pages)
        if looped:
            return jax.lax.scan(layer, state, jnp.arange(layers))[0]
        for number in range(layers):
            state, _ = layer(state, number)
        return state

    shape = jax.ShapeDtypeStruct((layers, export.symbolic_shape("n")[0], page, 3, *pool_shape((64,), dtype)), dtype)
    q = np.ones((40, 9, 64), np.float32)
    exported = export.export(
        jax.jit(step, donate_argnums=(0, 1)),
        disabled_checks=[export.DisabledSafetyCheck.custom_call("distaff_paged_attention")],
    )(shape, shape, jax.ShapeDtypeStruct(q.shape, q.dtype), StepBatch(*batch_shapes(40, 4, 1, 20)))
    pools = [jnp.zeros((layers, 512, page, 3, *pool_shape((64,), dtype)), dtype) for _ in range(2)]
    compiled = jax.jit(exported.call, donate_argnums=(0, 1)).lower(*pools, q, batch).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < pools[0].nbytes / 2
    assert not re.search(rf"\[{layers},512,\S* (copy|convert|transpose)\(", compiled.as_text())
    before = [pool.unsafe_buffer_pointer() for pool in pools]
    output, *pools = compiled(*pools, q, batch)
    assert [pool.unsafe_buffer_pointer() for pool in (pools[0], pools[1])] == before
    assert np.isfinite(output).all() and all(np.asarray(pool).any() for pool in pools)


ATTRIBUTES = {
    "spec": AttentionSpec(1.0), "pages_dtypes": ("uint16", "uint16"), "dtype": "float32",
    "rows_dtypes": ("float32", "bfloat16"), "key_size": 64, "value_size": 64,
}  # fmt: skip


def always(query, key):
    return query == query


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, "serves this call"),
        ({"spec": AttentionSpec(1.0, causal=False)}, "causal"),
        ({"spec": AttentionSpec(1.0, mask=always)}, "causal"),
        ({"pages_dtypes": ("float32", "float16")}, "not float16"),
        ({"dtype": "float64"}, "not float64"),
        ({"value_size": 2048}, "at most 1024"),
        ({"pages_dtypes": ("int8", "uint16")}, "both in int8 or neither"),
    ],
)
def test_what_it_serves_and_why_not(change, reason):
    first, *_ = explain("paged_attention", "cpu", ATTRIBUTES | change)
    assert first.implementation.name == "native" and reason in first.reason
    assert (choose("paged_attention", "cpu", ATTRIBUTES | change).name == "native") == (not change)
    assert choose("paged_attention", "cuda", ATTRIBUTES | change).name == "xla"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("slots", 10**6, "a slot is outside of the pool"),
        ("positions", 10**6, "a position is past the tables"),
        ("tables", -1, "a page is outside of the pool"),
        ("starts", 1, "starts do not begin at 0"),
    ],
)
def test_batches_that_point_elsewhere_are_errors(field, value, message):
    rng = np.random.default_rng(8)
    batch, num_pages = ragged_batch(rng, 5, 5, 7, 4, one_each=True)
    inputs = random_inputs(rng, (6, 2), (16, 16), 5, (num_pages, 4))
    assert batch.starts[-1] > 0
    wrong = np.array(getattr(batch, field))
    wrong[0] = value
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(
            cpu.attention(AttentionSpec(1.0), *inputs, LAYER, batch._replace(**{field: wrong}), None, None)
        )


def test_layers_outside_of_the_pool_are_errors():
    batch, num_pages = ragged_batch(np.random.default_rng(9), 5, 5, 7, 4, one_each=True)
    inputs = random_inputs(np.random.default_rng(9), (6, 2), (16, 16), 5, (num_pages, 4))
    with pytest.raises(jax.errors.JaxRuntimeError, match="layer 2 of 2"):
        jax.block_until_ready(cpu.attention(AttentionSpec(1.0), *inputs, LAYERS, batch, None, None))
