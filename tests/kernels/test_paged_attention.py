"""Paged attention on random ragged batches against attention written out in float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from attention_cases import LAYER, LAYERS, Inputs, check_result, ragged_batch, random_inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import export

from distaff.kernels import native
from distaff.kernels.paged_attention import AttentionSpec, Rotary, StepBatch, batch_shapes, paged_attention, xla
from distaff.kernels.paged_attention.reference import attention as reference
from distaff.kernels.registry import choose

SMALL = xla.Blocks(decode_rows=2, decode_chunk=8, prefill_queries=3, prefill_chunk=12, folded_heads=4)

many = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def same_block(q, k):
    return q // 6 == k // 6


def up_to_itself(q, k):
    return k <= q


def even_distance(q, k):
    return (q - k) % 2 == 1


CASES = {
    # name: spec, H, KV, D, Dv, sinks
    "grouped": (AttentionSpec(0.35), 6, 3, 8, 8, False),
    "one-kv-head": (AttentionSpec(0.3), 4, 1, 8, 6, False),
    "window": (AttentionSpec(0.4, window=5), 4, 2, 8, 8, False),
    "softcap-alibi": (AttentionSpec(0.5, softcap=2.0, slopes=(0.5, 0.25, 0.1)), 3, 3, 8, 4, False),
    "local-blocks": (AttentionSpec(0.4, mask=same_block), 4, 2, 8, 8, False),
    "own-causality": (AttentionSpec(0.4, causal=False, window=7, mask=up_to_itself), 4, 2, 8, 8, False),
    "not-causal": (AttentionSpec(0.4, causal=False), 4, 4, 8, 8, True),
    "sinks": (AttentionSpec(0.4, window=3), 10, 2, 8, 5, True),
    "rotary-half": (AttentionSpec(0.4, rotary=Rotary("half", 6)), 4, 2, 8, 8, False),
    "rotary-interleaved": (AttentionSpec(0.4, rotary=Rotary("interleaved", 8)), 4, 4, 8, 6, False),
    "sees-nothing": (AttentionSpec(0.4, window=2, mask=even_distance), 2, 1, 4, 4, False),
}
IMPLEMENTATIONS = {"xla": functools.partial(xla.attention, blocks=SMALL), "reference": reference}


@functools.cache
def compiled(case: str, implementation: str):
    spec = CASES[case][0]
    return jax.jit(functools.partial(IMPLEMENTATIONS[implementation], spec))


def arrays(rng: np.random.Generator, case: str, tokens: int, num_pages: int, page: int = 4):
    """Inputs, sinks and rotary tables of a case."""
    spec, heads, kv_heads, size, value_size, has_sinks = CASES[case]
    inputs = random_inputs(rng, (heads, kv_heads), (size, value_size), tokens, (num_pages, page))
    sinks = rng.normal(size=heads).astype(np.float32) if has_sinks else None
    rotary = None if spec.rotary is None else tuple(rng.normal(size=(2, 28, spec.rotary.size)).astype(np.float32))
    return inputs, sinks, rotary


def check(case: str, implementation: str, seed: int, tokens: int, requests: int, **shape: bool) -> None:
    rng = np.random.default_rng(seed)
    batch, num_pages = ragged_batch(rng, tokens, requests, width=7, page=4, **shape)
    inputs, sinks, rotary = arrays(rng, case, tokens, num_pages)
    result = compiled(case, implementation)(*inputs, LAYER, batch, sinks, rotary)
    check_result(result, CASES[case][0], inputs, batch, sinks, rotary)


seeds = st.integers(0, 2**32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
@many
@given(seed=seeds)
def test_mixed_batches(case, implementation, seed):
    check(case, implementation, seed, tokens=17, requests=5)


@pytest.mark.parametrize("case", CASES)
@many
@given(seed=seeds)
def test_decode_programs(case, seed):
    check(case, "xla", seed, tokens=5, requests=5, one_each=True)


@pytest.mark.smoke
@pytest.mark.parametrize(("tokens", "requests"), [(1, 1), (96, 3), (40, 12)])
def test_blocks_as_shipped(tokens, requests):
    """The default block sizes, contexts of several chunks, through the public function."""
    spec = AttentionSpec(0.125, window=150)
    rng = np.random.default_rng(tokens)
    attend = jax.jit(functools.partial(paged_attention, spec))
    for _ in range(3):
        batch, num_pages = ragged_batch(rng, tokens, requests, width=21, page=16, one_each=tokens == requests)
        inputs = random_inputs(rng, (9, 3), (64, 64), tokens, (num_pages, 16))
        check_result(attend(*inputs, LAYER, batch), spec, inputs, batch)


def test_decode_program_counts_tokens_itself():
    """With T == R a row of one token is served whether or not the engine calls it a decode."""
    rng = np.random.default_rng(0)
    batch, num_pages = ragged_batch(rng, 5, 5, 7, 4, one_each=True)
    assert batch.starts[-1] > 0
    inputs, _, _ = arrays(rng, "grouped", 5, num_pages)
    result = compiled("grouped", "xla")(*inputs, LAYER, batch._replace(decodes=np.int32(0)), None, None)
    check_result(result, CASES["grouped"][0], inputs, batch)


def test_fewer_tokens_than_rows():
    rng = np.random.default_rng(3)
    batch, num_pages = ragged_batch(rng, 4, 4, 7, 4, one_each=True)
    wide = batch._replace(
        starts=np.append(batch.starts, [batch.starts[-1]] * 3),
        contexts=np.append(batch.contexts, [0] * 3).astype(np.int32),
        tables=np.pad(batch.tables, ((0, 3), (0, 0))),
    )
    inputs, _, _ = arrays(rng, "grouped", 4, num_pages)
    check_result(compiled("grouped", "xla")(*inputs, LAYER, wide, None, None), CASES["grouped"][0], inputs, batch)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_bits_in_the_pool(implementation):
    rng = np.random.default_rng(1)
    batch, num_pages = ragged_batch(rng, 17, 5, 7, 4)
    inputs = Inputs(*(a.astype(ml_dtypes.bfloat16) for a in arrays(rng, "grouped", 17, num_pages)[0]))
    bits = [a.view(np.uint16) for a in (inputs.k_pages, inputs.v_pages)]
    result = compiled("grouped", implementation)(*inputs[:3], *bits, LAYER, batch, None, None)
    output, *pools = (np.asarray(array) for array in result)
    assert output.dtype == jnp.bfloat16
    pools = [pool.view(ml_dtypes.bfloat16) for pool in pools]
    check_result((output, *pools), CASES["grouped"][0], inputs, batch, atol=0.02)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keys_and_values_in_one_array_under_a_traced_layer(implementation):
    rng = np.random.default_rng(2)
    batch, num_pages = ragged_batch(rng, 17, 5, 7, 4)
    inputs, _, _ = arrays(rng, "grouped", 17, num_pages)
    output, pool, none = compiled("grouped", implementation)(
        *inputs[:2], None, inputs.k_pages, None, jnp.int32(LAYER), batch, None, None
    )
    assert none is None
    shared = inputs._replace(v=inputs.k, v_pages=inputs.k_pages)
    check_result((output, pool, pool), CASES["grouped"][0], shared, batch)


def test_one_array_for_both_pools_is_returned_as_one():
    rng = np.random.default_rng(2)
    batch, num_pages = ragged_batch(rng, 17, 5, 7, 4)
    inputs, _, _ = arrays(rng, "grouped", 17, num_pages)
    pool = jnp.asarray(inputs.k_pages)
    result = paged_attention(CASES["grouped"][0], *inputs[:2], inputs.q, pool, pool, LAYER, batch)
    assert result[1] is result[2]
    check_result(result, CASES["grouped"][0], inputs._replace(v=inputs.k, v_pages=inputs.k_pages), batch)


def test_number_of_pages_may_be_symbolic():
    rng = np.random.default_rng(4)
    batch, num_pages = ragged_batch(rng, 17, 5, 7, 4)
    inputs, _, _ = arrays(rng, "grouped", 17, num_pages)
    spec = CASES["grouped"][0]
    pool = jax.ShapeDtypeStruct((LAYERS, export.symbolic_shape("n")[0], *inputs.k_pages.shape[2:]), jnp.float32)
    function = jax.jit(lambda *arrays: xla.attention(spec, *arrays[:5], LAYER, arrays[5], None, None))
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in native.register()]
    shapes = StepBatch(*batch_shapes(17, 5, 1, 7))
    exported = export.export(function, disabled_checks=checks)(*inputs[:3], pool, pool, shapes)
    check_result(exported.call(*inputs, batch), spec, inputs, batch)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (17, 7, 8)}, "not a multiple"),
        ({"q": (17, 6, 4)}, "as wide as queries"),
        ({"q": (16, 6, 8)}, "batch has 17 tokens"),
        ({"q": (17, 48)}, r"must be q\[T, H, D\]"),
        ({"k": (17, 2, 8)}, r"must be \[17, 3, 8\]"),
        ({"v": (16, 3, 8)}, "must be as k"),
        ({"spec": AttentionSpec(1.0, rotary=Rotary("half", 4))}, "has no tables"),
        ({"spec": AttentionSpec(1.0, rotary=Rotary("half", 10)), "rotary": (30, 10)}, "more than the 8 values"),
        ({"spec": AttentionSpec(1.0, rotary=Rotary("half", 4)), "rotary": (30, 8)}, r"both be \[P, 4\]"),
        ({"rotary": (30, 4)}, "spec.rotary is None"),
        ({"sinks": (3,)}, "one per query head"),
        ({"spec": AttentionSpec(1.0, slopes=(1.0,))}, "1 slopes for 6 query heads"),
    ],
)
def test_wrong_calls_are_refused(change, message):
    rows = (17, 3, 8)
    arguments = {"q": (17, 6, 8), "k": rows, "v": rows, "sinks": (6,), "spec": AttentionSpec(1.0)} | change
    pool = jax.ShapeDtypeStruct((LAYERS, 9, 4, 3, 8), jnp.float32)
    q, k, v, sinks = (jax.ShapeDtypeStruct(arguments[name], jnp.float32) for name in ("q", "k", "v", "sinks"))
    table = jax.ShapeDtypeStruct(arguments.get("rotary", (1, 1)), jnp.float32)

    def call(*arrays):
        *inputs, batch, sinks, table = arrays
        rotary = (table, table) if "rotary" in change else None
        return paged_attention(arguments["spec"], *inputs, 0, batch, sinks=sinks, rotary=rotary)

    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, q, k, v, pool, pool, StepBatch(*batch_shapes(17, 5, 1, 7)), sinks, table)


@pytest.mark.smoke
@pytest.mark.parametrize("wrong", [{"window": 0}, {"softcap": 0.0}, {"softcap": -1.0}])
def test_meaningless_specs_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AttentionSpec(1.0, **wrong)


@pytest.mark.smoke
@pytest.mark.parametrize(("kind", "size"), [("half", 3), ("interleaved", 0), ("quarter", 4)])
def test_meaningless_rotary_is_refused(kind, size):
    with pytest.raises(ValueError, match=r"(size|kind) is"):
        Rotary(kind, size)


@pytest.mark.smoke
@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_every_platform_has_the_xla_form(platform):
    attributes = {"spec": AttentionSpec(1.0, causal=False)}
    assert choose("paged_attention", platform, attributes).function is xla.attention
