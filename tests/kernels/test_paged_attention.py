"""Paged attention on random ragged batches against attention written out in float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import export

from distaff.kernels.paged_attention import AttentionSpec, StepBatch, batch_shapes, paged_attention, xla
from distaff.kernels.paged_attention.reference import attention as reference
from distaff.kernels.registry import choose

SMALL = xla.Blocks(decode_rows=2, decode_chunk=8, prefill_queries=3, prefill_chunk=12, folded_heads=4)
LAYERS, LAYER = 2, 1

many = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def ragged_batch(
    rng: np.random.Generator, tokens: int, requests: int, width: int, page: int, *, one_each: bool = False
) -> tuple[StepBatch, int]:
    """A random step over scattered pages, as numpy arrays, and the size of the pool that it needs."""
    live = int(rng.integers(0, requests + 1))
    decodes = int(rng.integers(0, live + 1))
    lengths = np.ones(live, int)
    if one_each:
        decodes = live
    elif live > decodes:
        lengths[decodes:] += rng.multinomial(
            rng.integers(0, tokens - live + 1), np.ones(live - decodes) / (live - decodes)
        )
    lengths = np.minimum(lengths, width * page)
    contexts = np.zeros(requests, np.int32)
    contexts[:live] = [rng.integers(n, width * page + 1) for n in lengths]
    starts = np.zeros(requests + 1, np.int32)
    starts[1 : live + 1] = np.cumsum(lengths)
    starts[live + 1 :] = lengths.sum()
    num_pages = 1 + requests * width
    scattered = rng.permutation(np.arange(1, num_pages)).reshape(requests, width)
    tables = np.where(np.arange(width) * page < contexts[:, None], scattered, 0).astype(np.int32)
    rows = np.full(tokens, requests - 1, np.int32)
    positions, slots = np.zeros(tokens, np.int32), np.zeros(tokens, np.int32)
    for row, length in enumerate(lengths):
        span = slice(starts[row], starts[row + 1])
        rows[span] = row
        positions[span] = np.arange(contexts[row] - length, contexts[row])
        slots[span] = tables[row, positions[span] // page] * page + positions[span] % page
    zeros = np.zeros(tokens, np.int32)
    batch = StepBatch(zeros, positions, slots, rows, starts, contexts, tables, np.int32(decodes), zeros[:1])
    return batch, num_pages


def dense(spec: AttentionSpec, q, k_pages, v_pages, batch: StepBatch, sinks=None) -> np.ndarray:
    """The live tokens' outputs ``[batch.starts[-1], H, Dv]``, one softmax at a time."""
    outputs = []
    for token in range(batch.starts[-1]):
        row, i = batch.rows[token], batch.positions[token]
        keys, values = (
            pages[LAYER, batch.tables[row]].reshape(-1, *pages.shape[3:])[: batch.contexts[row]].astype(np.float64)
            for pages in (k_pages, v_pages)
        )
        j = np.arange(len(keys))
        seen = np.ones(len(keys), bool)
        if spec.causal:
            seen &= j <= i
        if spec.window:
            seen &= j > i - spec.window
        if spec.mask:
            seen &= np.asarray(spec.mask(np.int32(i), j))
        for head in range(q.shape[1]):
            kv = head * keys.shape[1] // q.shape[1]
            scores = keys[:, kv] @ q[token, head].astype(np.float64) * spec.scale
            if spec.softcap:
                scores = np.tanh(scores / spec.softcap) * spec.softcap
            if spec.slopes:
                scores = scores - spec.slopes[head] * (i - j)
            weights = np.exp(scores) * seen
            total = weights.sum() + (0 if sinks is None else np.exp(float(sinks[head])))
            outputs.append(weights @ values[:, kv] / (total or 1))
    return np.reshape(outputs, (-1, q.shape[1], v_pages.shape[4]))


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
    "sees-nothing": (AttentionSpec(0.4, window=2, mask=even_distance), 2, 1, 4, 4, False),
}
IMPLEMENTATIONS = {"xla": functools.partial(xla.attention, blocks=SMALL), "reference": reference}


@functools.cache
def compiled(case: str, implementation: str):
    spec = CASES[case][0]
    return jax.jit(functools.partial(IMPLEMENTATIONS[implementation], spec))


def arrays(rng: np.random.Generator, case: str, tokens: int, num_pages: int, page: int):
    _, heads, kv_heads, size, value_size, has_sinks = CASES[case]
    pool = (LAYERS, num_pages, page, kv_heads)
    q = rng.normal(size=(tokens, heads, size)).astype(np.float32)
    k, v = (rng.normal(size=(*pool, n)).astype(np.float32) for n in (size, value_size))
    return q, k, v, rng.normal(size=heads).astype(np.float32) if has_sinks else None


def check(case: str, implementation: str, seed: int, tokens: int, requests: int, **shape: bool) -> None:
    rng = np.random.default_rng(seed)
    batch, num_pages = ragged_batch(rng, tokens, requests, width=7, page=4, **shape)
    q, k, v, sinks = arrays(rng, case, tokens, num_pages, 4)
    output = np.asarray(compiled(case, implementation)(q, k, v, LAYER, batch, sinks))
    assert np.isfinite(output).all()
    np.testing.assert_allclose(output[: batch.starts[-1]], dense(CASES[case][0], q, k, v, batch, sinks), atol=2e-5)


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
        q = rng.normal(size=(tokens, 9, 64)).astype(np.float32)
        k, v = rng.normal(size=(2, LAYERS, num_pages, 16, 3, 64)).astype(np.float32)
        output = np.asarray(attend(q, k, v, LAYER, batch))
        np.testing.assert_allclose(output[: batch.starts[-1]], dense(spec, q, k, v, batch), atol=2e-5)


def test_decode_program_counts_tokens_itself():
    """With T == R a row of one token is served whether or not the engine calls it a decode."""
    rng = np.random.default_rng(0)
    batch, num_pages = ragged_batch(rng, 5, 5, 7, 4, one_each=True)
    assert batch.starts[-1] > 0
    q, k, v, _ = arrays(rng, "grouped", 5, num_pages, 4)
    output = compiled("grouped", "xla")(q, k, v, LAYER, batch._replace(decodes=np.int32(0)), None)
    np.testing.assert_allclose(output[: batch.starts[-1]], dense(CASES["grouped"][0], q, k, v, batch), atol=2e-5)


def test_fewer_tokens_than_rows():
    rng = np.random.default_rng(3)
    batch, num_pages = ragged_batch(rng, 4, 4, 7, 4, one_each=True)
    wide = batch._replace(
        starts=np.append(batch.starts, [batch.starts[-1]] * 3),
        contexts=np.append(batch.contexts, [0] * 3).astype(np.int32),
        tables=np.pad(batch.tables, ((0, 3), (0, 0))),
    )
    q, k, v, _ = arrays(rng, "grouped", 4, num_pages, 4)
    output = compiled("grouped", "xla")(q, k, v, LAYER, wide, None)
    np.testing.assert_allclose(output[: batch.starts[-1]], dense(CASES["grouped"][0], q, k, v, batch), atol=2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_bits_in_the_pool(implementation):
    rng = np.random.default_rng(1)
    batch, num_pages = ragged_batch(rng, 17, 5, 7, 4)
    q, k, v, _ = (None if a is None else a.astype(ml_dtypes.bfloat16) for a in arrays(rng, "grouped", 17, num_pages, 4))
    output = compiled("grouped", implementation)(q, k.view(np.uint16), v.view(np.uint16), LAYER, batch, None)
    assert output.dtype == jnp.bfloat16
    wanted = dense(CASES["grouped"][0], q, k, v, batch)
    np.testing.assert_allclose(np.asarray(output, np.float64)[: len(wanted)], wanted, atol=0.02)


def test_keys_and_values_in_one_array_under_a_traced_layer():
    rng = np.random.default_rng(2)
    batch, num_pages = ragged_batch(rng, 17, 5, 7, 4)
    q, k, _, _ = arrays(rng, "grouped", 17, num_pages, 4)
    output = compiled("grouped", "xla")(q, k, k, jnp.int32(LAYER), batch, None)
    np.testing.assert_allclose(output[: batch.starts[-1]], dense(CASES["grouped"][0], q, k, k, batch), atol=2e-5)


def test_number_of_pages_may_be_symbolic():
    rng = np.random.default_rng(4)
    batch, num_pages = ragged_batch(rng, 17, 5, 7, 4)
    q, k, v, _ = arrays(rng, "grouped", 17, num_pages, 4)
    spec = CASES["grouped"][0]
    pool = jax.ShapeDtypeStruct((LAYERS, export.symbolic_shape("n")[0], *k.shape[2:]), k.dtype)
    exported = export.export(jax.jit(lambda q, k, v, batch: paged_attention(spec, q, k, v, LAYER, batch)))(
        q, pool, pool, StepBatch(*batch_shapes(17, 5, 1, 7))
    )
    output = exported.call(q, k, v, batch)
    np.testing.assert_allclose(output[: batch.starts[-1]], dense(spec, q, k, v, batch), atol=2e-5)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (17, 7, 8)}, "not a multiple"),
        ({"q": (17, 6, 4)}, "as wide as queries"),
        ({"q": (16, 6, 8)}, "batch has 17 tokens"),
        ({"q": (17, 48)}, r"must be q\[T, H, D\]"),
        ({"sinks": (3,)}, "one per query head"),
        ({"spec": AttentionSpec(1.0, slopes=(1.0,))}, "1 slopes for 6 query heads"),
    ],
)
def test_wrong_calls_are_refused(change, message):
    arguments = {"q": (17, 6, 8), "sinks": (6,), "spec": AttentionSpec(1.0)} | change
    pool = jax.ShapeDtypeStruct((LAYERS, 9, 4, 3, 8), jnp.float32)
    q, sinks = (jax.ShapeDtypeStruct(arguments[name], jnp.float32) for name in ("q", "sinks"))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda q, k, v, batch, sinks: paged_attention(arguments["spec"], q, k, v, 0, batch, sinks=sinks),
            q, pool, pool, StepBatch(*batch_shapes(17, 5, 1, 7)), sinks,
        )  # fmt: skip


@pytest.mark.smoke
@pytest.mark.parametrize("wrong", [{"window": 0}, {"softcap": 0.0}, {"softcap": -1.0}])
def test_meaningless_specs_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AttentionSpec(1.0, **wrong)


@pytest.mark.smoke
@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_every_platform_has_the_xla_form(platform):
    assert choose("paged_attention", platform, {}).function is xla.attention
