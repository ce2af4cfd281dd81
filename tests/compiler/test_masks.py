"""The causality prover against brute force: random masks in many spellings, attentions evaluated on small grids."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_attention import (
    HEAD,
    HEADS,
    LEAVES,
    STYLES,
    causal,
    positions,
    scores_of,
    softmax_attention,
    weigh,
    where_lowest,
    windowed,
)
from region_bodies import SIZES, body_of

from distaff.compiler.analysis.masks import prove_causal
from distaff.compiler.errors import NotCausalError

ATOMS = st.one_of(
    st.builds(lambda c: lambda i, j: j <= i + c, st.integers(-3, 3)),
    st.builds(lambda w: lambda i, j: i - j < w, st.integers(1, 12)),
    st.builds(lambda w: lambda i, j: abs(i - j) <= w, st.integers(0, 6)),
    st.builds(lambda p: lambda i, j: (j < p) & (i >= 0), st.integers(0, 8)),
    st.builds(lambda p: lambda i, j: (i >= p) | (j < 0), st.integers(0, 8)),
    st.builds(lambda c: lambda i, j: i // c == j // c, st.integers(1, 6)),
    st.builds(lambda c: lambda i, j: j // c < i // c, st.integers(1, 6)),
    st.builds(lambda c, r: lambda i, j: (i - j) % c == r % c, st.integers(1, 5), st.integers(0, 4)),
    st.builds(lambda c: lambda i, j: (i % c == 0) | (j % c == 0), st.integers(2, 5)),
    st.builds(
        lambda a, b, c: lambda i, j: a * i - b * j >= c, st.integers(-2, 3), st.integers(-2, 3), st.integers(-9, 9)
    ),
    st.builds(lambda c: lambda i, j: (i & c) == (j & c), st.sampled_from([1, 2, 4, 6])),
    st.builds(lambda c: lambda i, j: (i - j).astype(jnp.float32) * 0.5 <= c, st.integers(0, 5)),
    st.builds(lambda s: lambda i, j: (i >> s) == (j >> s), st.integers(0, 3)),
    st.just(lambda i, j: jnp.maximum(i, j) == i),
    st.just(lambda i, j: (i * j) % 3 != 1),
)
MASKS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.builds(lambda a, b: lambda i, j: a(i, j) & b(i, j), inner, inner),
        st.builds(lambda a, b: lambda i, j: a(i, j) | b(i, j), inner, inner),
        st.builds(lambda a: lambda i, j: ~a(i, j), inner),
        st.builds(lambda a, b, c: lambda i, j: jnp.where(a(i, j), b(i, j), c(i, j)), inner, inner, inner),
    ),
    max_leaves=4,
)
CAUSAL_MASKS = st.one_of(
    MASKS,
    st.builds(lambda a: lambda i, j: causal(i, j) & a(i, j), MASKS),
    st.builds(lambda a: lambda i, j: causal(i, j) & (a(i, j) | (i == j)), MASKS),
    st.builds(windowed, st.integers(1, 12)),
)


def grid_of(mask, n):
    return np.broadcast_to(np.asarray(mask(np.arange(n)[:, None], np.arange(n)[None, :])), (n, n))


def relation(grid):
    """Kind and window of a visible set that lies in the past."""
    n = len(grid)
    distance = np.arange(n)[:, None] - np.arange(n)[None, :]
    if (grid == (distance >= 0)).all():
        return "causal", None
    for w in range(1, n):
        if (grid == ((distance >= 0) & (distance < w))).all():
            return "window", w
    return "custom", None


def prove(attention, n, leaves=LEAVES, **kwargs):
    return prove_causal(body_of(attention, *leaves, **kwargs), n)


def changed_rows(attention, n, rng):
    """Queries whose output changes when keys and values after some position are replaced."""
    q, k, v = (rng.normal(size=(n, HEADS, HEAD)).astype(np.float32) for _ in range(3))
    before = np.asarray(attention(q, k, v), np.float32)
    rows = []
    for row in range(n - 1):
        other = [x.copy() for x in (k, v)]
        for x in other:
            x[row + 1 :] = rng.normal(size=x[row + 1 :].shape) * 3
        if not np.array_equal(before[row], np.asarray(attention(q, *other), np.float32)[row], equal_nan=True):
            rows.append(row)
    return rows


@settings(max_examples=120, deadline=None)
@given(CAUSAL_MASKS, st.sampled_from(sorted(STYLES)), st.sampled_from([6, 11]), st.integers(0, 99))
def test_verdict_and_visibility_are_those_of_brute_force(mask, style, n, seed):
    attention, needs_key = STYLES[style]
    grid = grid_of(mask, n)
    sees_later = bool(np.triu(grid, 1).any())
    empty_row = needs_key and not grid.any(1).all()
    model = functools.partial(attention, mask)
    if sees_later or empty_row:
        with pytest.raises(NotCausalError) as refused:
            prove(model, n)
        if sees_later:
            assert "can see key position" in refused.value.reason
    else:
        seen = prove(model, n)
        assert (seen.kind, seen.window) == relation(grid)
        assert not seen.data_dependent
        assert not changed_rows(model, n, np.random.default_rng(seed))


@pytest.mark.parametrize("style", sorted(STYLES))
def test_every_spelling_of_a_mask(style):
    attention, needs_key = STYLES[style]
    assert prove(functools.partial(attention, causal), 500).kind == "causal"
    seen = prove(functools.partial(attention, windowed(100)), 500)
    assert (seen.kind, seen.window) == ("window", 100)
    with pytest.raises(NotCausalError, match="query position 0 can see key position 1,"):
        prove(functools.partial(attention, lambda i, j: j <= i + 1), 500)
    strict = functools.partial(attention, lambda i, j: j < i)
    if needs_key:
        with pytest.raises(NotCausalError, match="visible to query position 0") as refused:
            prove(strict, 500)
        assert "-jnp.inf" in refused.value.fix
    else:
        assert prove(strict, 500).kind == "custom"


def test_brute_force_itself_sees_a_leak():
    model = functools.partial(STYLES["where lowest"][0], lambda i, j: (j <= i) | (j < 3))
    assert changed_rows(model, 6, np.random.default_rng(0)) == [0, 1]
    empty = functools.partial(STYLES["where lowest"][0], lambda i, j: (j <= i) & (i != 2))
    assert changed_rows(empty, 6, np.random.default_rng(0)) == [2]


LARGE = {
    "causal": (causal, "causal", None),
    "window": (windowed(4096), "window", 4096),
    "window of one": (windowed(1), "window", 1),
    "window as long as the sequence": (windowed(1 << 20), "causal", None),
    "chunked": (lambda i, j: (j <= i) & (i // 1000 == j // 1000), "custom", None),
    "dilated": (lambda i, j: (j <= i) & ((i - j) % 2 == 0), "custom", None),
    "strided": (lambda i, j: (j <= i) & ((i - j < 64) | (j % 64 == 63)), "custom", None),
    "documents": (lambda i, j: (j <= i) & ((i > 50000) == (j > 50000)), "custom", None),
    "sinks": (lambda i, j: (j <= i) & ((i - j < 1024) | (j < 4)), "custom", None),
    "blocks before": (lambda i, j: (j // 128 < i // 128) | (i == j), "custom", None),
    "hole in the past": (lambda i, j: (j <= i) & ~((i == 90001) & (j == 777)), "custom", None),
}


@pytest.mark.parametrize("name", LARGE)
def test_long_sequences(name):
    mask, kind, window = LARGE[name]
    seen = prove(functools.partial(where_lowest, mask), 131072)
    assert (seen.kind, seen.window) == (kind, window)
    assert seen.blocks < (50_000 if kind != "custom" else 3_000_000)


@pytest.mark.parametrize(
    ("mask", "query", "key"),
    [
        (lambda i, j: (j <= i) | (j < 1000), 0, 1),
        (lambda i, j: (j <= i) | ((i == 70000) & (j == 90000)), 70000, 90000),
        (lambda i, j: i // 4096 == j // 4096, 0, 1),
        (lambda i, j: i - j < 100, 0, 1),
    ],
)
def test_later_keys_are_found_anywhere(mask, query, key):
    with pytest.raises(NotCausalError, match=f"query position {query} can see key position {key},"):
        prove(functools.partial(where_lowest, mask), 131072)


def test_example_says_operation_and_line():
    with pytest.raises(NotCausalError) as refused:
        prove(functools.partial(where_lowest, lambda i, j: j >= 0), 64)
    assert refused.value.operation == "reduce_max"
    assert "masked_attention.py" in str(refused.value.location)


def with_tokens(style, q, k, v, tokens):
    i, j = positions(q, k)
    mask = (tokens != 0)[None, :] & (j <= i)
    return style(lambda *_: mask, q, k, v)


TOKENS = (("k",), np.int32)


def test_padding_masks():
    infinite = functools.partial(with_tokens, STYLES["where -inf"][0])
    seen = prove(infinite, 4096, (*LEAVES, TOKENS))
    assert (seen.kind, seen.data_dependent) == ("causal", True)
    with pytest.raises(NotCausalError, match="query position 0, and masked scores are finite"):
        prove(functools.partial(with_tokens, where_lowest), 4096, (*LEAVES, TOKENS))
    with pytest.raises(NotCausalError, match="query position 0 can see key position 1,"):
        prove(lambda q, k, v, t: where_lowest(lambda i, j: (t > 5)[None] | (j <= i), q, k, v), 64, (*LEAVES, TOKENS))


def test_padding_mask_that_keeps_the_diagonal():
    def attention(q, k, v, tokens):
        return where_lowest(lambda i, j: ((tokens != 0)[None, :] & (j <= i)) | (i == j), q, k, v)

    assert prove(attention, 4096, (*LEAVES, TOKENS)).data_dependent


def test_documents_by_token_data():
    def attention(q, k, v, mine, theirs):
        return where_lowest(lambda i, j: ((mine[:, None] == theirs[None, :]) & (j < i)) | (i == j), q, k, v)

    seen = prove(attention, 4096, (*LEAVES, (("q",), np.int32), TOKENS))
    assert (seen.kind, seen.data_dependent) == ("causal", True)


def test_hashed_tokens_are_not_taken_for_small_numbers():
    def attention(q, k, v, tokens):
        never = (tokens * 40_503 > 10_000_000) | (jax.lax.bitcast_convert_type(k[:, 0, 0], jnp.int32) > 10_000_000)
        return where_lowest(lambda i, j: (j <= i) | never[None, :], q, k, v)

    with pytest.raises(NotCausalError):
        prove(attention, 64, (*LEAVES, TOKENS))


def test_biases_that_do_not_mask():
    slopes = jnp.asarray([0.5, 0.0625])

    def alibi(q, k, v):
        i, j = positions(q, k)
        s = scores_of(q, k) - slopes[:, None, None] * (i - j).astype(jnp.float32)
        return weigh(jax.nn.softmax(s + jnp.triu(jnp.full(s.shape[1:], -1e9), 1)), v)

    def decay(q, k, v):
        i, j = positions(q, k)
        return weigh(scores_of(q, k) * jnp.where(j <= i, 0.999 ** (i - j).astype(jnp.float32), 0), v)

    def buckets(q, k, v):
        i, j = positions(q, k)
        table = jnp.asarray(np.random.default_rng(0).normal(size=(32, HEADS)), jnp.float32)
        bias = table[jnp.clip(i - j, 0, 31)].transpose(2, 0, 1)
        return weigh(jax.nn.softmax(jnp.where(j <= i, scores_of(q, k) + bias, -jnp.inf)), v)

    for attention in (alibi, decay, buckets):
        assert prove(attention, 2048).kind == "causal", attention


def test_decay_that_underflows_is_not_called_causal():
    def decay(q, k, v):
        i, j = positions(q, k)
        return weigh(scores_of(q, k) * jnp.where(j <= i, 0.5 ** (i - j).astype(jnp.float32), 0), v)

    assert prove(decay, 2048).kind == "custom"


def test_heads_with_masks_of_their_own():
    windows = jnp.asarray([4, 64])

    def attention(q, k, v):
        return where_lowest(lambda i, j: (j <= i) & (i - j < windows[:, None, None]), q, k, v)

    assert prove(attention, 512).kind == "custom"


def test_two_attentions_that_see_different_keys():
    def attention(q, k, v):
        return where_lowest(causal, q, k, v) - where_lowest(windowed(8), q, k, v)

    assert prove(attention, 512).kind == "custom"


def test_weak_masks_are_named():
    for hide in (lambda s, m: jnp.where(m, s, -1e4), lambda s, m: s + jnp.where(m, 0, -1e4)):
        with pytest.raises(NotCausalError) as refused:
            prove(functools.partial(softmax_attention, hide, causal), 64)
        assert "-10000" in refused.value.reason and "finfo" in refused.value.fix


def test_refused_ways_to_lose_a_mask():
    def maximum_before_mask(q, k, v):
        s = scores_of(q, k)
        p = jnp.exp(s - s.max(-1, keepdims=True)) * causal(*positions(q, k))
        return weigh(p / p.sum(-1, keepdims=True), v)

    def mask_before_softcap(q, k, v):
        s = jnp.where(causal(*positions(q, k)), scores_of(q, k), -1e30)
        return weigh(jax.nn.softmax(20 * jnp.tanh(s / 20)), v)

    def flipped(q, k, v):
        return weigh(jax.nn.softmax(-jnp.where(causal(*positions(q, k)), scores_of(q, k), -1e30)), v)

    def clamped(q, k, v):
        s = jnp.where(causal(*positions(q, k)), scores_of(q, k), -jnp.inf)
        return weigh(jax.nn.softmax(jnp.maximum(s, -50.0)), v)

    def positions_rounded(q, k, v):
        i, j = positions(q, k)
        mask = j.astype(jnp.bfloat16) <= i.astype(jnp.bfloat16)
        return weigh(jax.nn.softmax(jnp.where(mask, scores_of(q, k), -jnp.inf)), v)

    def positions_overflow(q, k, v):
        i, j = positions(q, k)
        return weigh(jax.nn.softmax(jnp.where(j.astype(jnp.int8) <= i.astype(jnp.int8), scores_of(q, k), -jnp.inf)), v)

    def hidden_twice(q, k, v):
        s = jnp.where(causal(*positions(q, k)), scores_of(q, k), -1e30)
        return weigh(jax.nn.softmax(s * s), v)

    for attention in (
        maximum_before_mask, mask_before_softcap, flipped, clamped, positions_rounded, positions_overflow, hidden_twice,
    ):  # fmt: skip
        with pytest.raises(NotCausalError):
            prove(attention, 600)
    assert prove(positions_rounded, 200).kind == "causal"  # whole numbers up to 256 are exact
    assert prove(positions_overflow, 100).kind == "causal"


def test_reductions_over_queries_are_refused():
    def attention(q, k, v):
        s = jnp.where(causal(*positions(q, k)), scores_of(q, k), -jnp.inf)
        return weigh(jax.nn.softmax(s, axis=1), v)

    with pytest.raises(NotCausalError, match="over the query axis"):
        prove(attention, 64)


def test_other_ways_to_combine_keys_are_refused():
    def attention(q, k, v):
        s = jnp.where(causal(*positions(q, k)), jnp.exp(scores_of(q, k)), 0)
        return weigh(jnp.cumsum(s, -1), v)

    with pytest.raises(NotCausalError, match="cannot be proved") as refused:
        prove(attention, 64)
    assert refused.value.operation == "cumsum"


def test_least_and_product_over_keys():
    def least(q, k, v):
        s = jnp.where(causal(*positions(q, k)), scores_of(q, k), jnp.inf)
        return weigh(jnp.where(s <= s.min(-1, keepdims=True), 1.0, 0.0) * causal(*positions(q, k)), v)

    def product(q, k, v):
        s = jnp.where(causal(*positions(q, k)), scores_of(q, k), 1)
        return s.prod(-1).T[..., None] * q

    def any_later(q, k, v):
        return jnp.any(scores_of(q, k) > 1, -1).T[..., None] * q

    assert prove(least, 256).data_dependent
    assert prove(product, 256).kind == "causal"
    with pytest.raises(NotCausalError) as refused:
        prove(any_later, 64)
    assert refused.value.operation == "reduce_or"


def table_attention(table, q, k, v):
    return where_lowest(lambda i, j: jnp.asarray(table), q, k, v)


def tables(make, n):
    """A function that closes over ``make`` at the traced sizes, and the table at length ``n``."""
    long = make(np.arange(n)[:, None], np.arange(n)[None, :])
    short = long[: SIZES["q"], : SIZES["k"]]
    return functools.partial(table_attention, short), [(short, long)]


def test_captured_masks():
    holes = np.random.default_rng(0).random((700, 700)) < 0.5
    cases = [
        (lambda i, j: j <= i, "causal", None),
        (lambda i, j: (j <= i) & (i - j < 33), "window", 33),
        (lambda i, j: (j <= i) & (holes | (i == j)), "custom", None),
    ]
    for make, kind, window in cases:
        attention, pairs = tables(make, 700)
        seen = prove(attention, 700, tables=pairs)
        assert (seen.kind, seen.window) == (kind, window)
    attention, pairs = tables(lambda i, j: (j <= i) | ((i == 300) & (j == 650)), 700)
    with pytest.raises(NotCausalError, match="query position 300 can see key position 650,"):
        prove(attention, 700, tables=pairs)
    assert prove(attention, 650, tables=pairs).kind == "causal"


def test_a_captured_mask_says_nothing_beyond_its_end():
    attention, pairs = tables(lambda i, j: j <= i, 700)
    with pytest.raises(NotCausalError, match="table of 700 positions") as refused:
        prove(attention, 701, tables=pairs)
    assert "jnp.arange" in refused.value.fix


def test_captured_positions_are_positions():
    def attention(q, k, v):
        rows, columns = jnp.asarray(np.arange(SIZES["q"])), jnp.asarray(np.arange(SIZES["k"]))
        return where_lowest(lambda *_: windowed(9)(rows[:, None], columns[None, :]), q, k, v)

    pairs = [(np.arange(SIZES[a]), np.arange(3000)) for a in ("q", "k")]
    seen = prove(attention, 3000, tables=pairs)
    assert (seen.kind, seen.window) == ("window", 9)


def test_slice_of_a_longer_constant():
    whole = np.tril(np.ones((1, 900, 900), bool))

    def attention(q, k, v):
        return where_lowest(lambda i, j: jax.lax.slice(whole, (0, 0, 0), (1, q.shape[0], k.shape[0])), q, k, v)

    assert prove(attention, 900).kind == "causal"
    with pytest.raises(NotCausalError, match="table of 900 positions"):
        prove(attention, 1000)


@pytest.mark.smoke
def test_smallest_lengths():
    for n in (1, 2, 3, 4):
        assert prove(functools.partial(where_lowest, causal), n).kind == "causal"
        with pytest.raises(NotCausalError):
            prove(functools.partial(where_lowest, lambda i, j: j <= i + 1), n + 1)


@pytest.mark.smoke
def test_jax_nn_attention():
    def attention(window, q, k, v):
        return jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True, local_window_size=window)[0]

    assert prove(functools.partial(attention, None), 8192).kind == "causal"
    with pytest.raises(NotCausalError):
        prove(lambda q, k, v: jax.nn.dot_product_attention(q[None], k[None], v[None])[0], 8192)


def test_a_body_that_looks_at_no_key():
    assert prove(lambda q: q * 2, 64, (("q", 4),)).kind == "custom"


def test_a_mask_that_needs_too_much_effort_is_refused_with_a_way_out():
    def mask(i, j):
        return (j <= i) | ((i * j % 4 == 2) & (i * j % 2 == 1))  # the second part never holds, but only cells tell

    assert prove(functools.partial(where_lowest, mask), 256).kind == "causal"
    with pytest.raises(NotCausalError, match="could not be proved for all 8192") as refused:
        prove(functools.partial(where_lowest, mask), 8192)
    assert "lower max_model_len" in refused.value.fix
