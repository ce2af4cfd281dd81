"""Interval analysis against evaluation: no value of a random expression may fall outside its bounds in any block."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, note, settings
from hypothesis import strategies as st
from region_bodies import body_of

from distaff.compiler.analysis import intervals
from distaff.compiler.analysis.blocks import Blocks
from distaff.compiler.analysis.interval_arithmetic import BOUND
from distaff.compiler.analysis.position_tables import PositionTable

N = 12
QUERY, KEY = np.meshgrid(np.arange(N), np.arange(N), indexing="ij")


def interval_of(body, blocks):
    """The interval of a body's output, by the rules of each node."""
    env = {id(v): intervals.ordinary_data(v.type.dtype) for v in body.inputs}
    for value in body.constants():
        known = intervals.constant(value)
        env[id(value)] = intervals.from_table(known, blocks) if isinstance(known, PositionTable) else known
    for node in body.nodes:
        results = intervals.transfer(node, [env[id(v)] for v in node.inputs], blocks)
        env.update((id(v), r) for v, r in zip(node.outputs, results, strict=True))
    return env[id(body.outputs[0])]


def cells_in(blocks, i):
    """Which cells of the grid lie in block ``i``."""
    rows = (blocks.q0[i] <= QUERY) & (blocks.q1[i] >= QUERY)
    return rows & (blocks.d0[i] <= QUERY - KEY) & (blocks.d1[i] >= QUERY - KEY)


def random_blocks(rng, count=40):
    q = np.sort(rng.integers(0, N, (2, count)), 0)
    d = np.sort(rng.integers(1 - N, N, (2, count)), 0)
    some = Blocks(*q, *d, N)
    whole = Blocks([0], [N - 1], [1 - N], [N - 1], N)
    cells = Blocks.cells(QUERY.ravel(), KEY.ravel(), N)
    return [some, whole, cells]


def assert_contained(table, interval, blocks, rounding=0.0):
    table = np.broadcast_to(np.asarray(table).astype(np.float64), (N, N))
    low, high = (np.broadcast_to(x, len(blocks)) for x in interval.bounds(blocks))
    for i in range(len(blocks)):
        values = table[cells_in(blocks, i)]
        values = values[~np.isnan(values)]
        slack = rounding * np.abs(np.nan_to_num(values))
        assert (low[i] <= values + slack).all() and (values - slack <= high[i]).all(), (low[i], high[i], values)


# -- the geometry of blocks


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_splitting_keeps_every_cell_once(seed, distances_only):
    blocks = Blocks([0], [N - 1], [1 - N], [N - 1], N)
    rng = np.random.default_rng(seed)
    kept = []
    while len(blocks):
        done = blocks.is_cell | (rng.random(len(blocks)) < 0.2)
        kept.append(blocks[done])
        blocks = blocks[~done].split(distances_only=distances_only)
    count = sum(cells_in(b, i).astype(int) for b in kept for i in range(len(b)))
    assert (count == 1).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_bounds_of_a_block_are_those_of_its_cells(seed):
    for blocks in random_blocks(np.random.default_rng(seed)):
        for i in range(len(blocks)):
            cells = cells_in(blocks, i)
            assert cells.any()
            for low, high, table in (
                (blocks.k0, blocks.k1, KEY),
                (blocks.q0, blocks.q1, QUERY),
                (blocks.d0, blocks.d1, QUERY - KEY),
            ):
                assert (low[i], high[i]) == (table[cells].min(), table[cells].max())
            query, key = blocks.nearest(i)
            assert cells[query, key] and abs(query - key) == abs(QUERY - KEY)[cells].min()


def test_spans_of_distances_are_exact_over_bands():
    bands = Blocks([0, 0, 5], [N - 1, N - 1, 9], [3, -6, -2], [3, -2, 4], N)
    low, high = bands.span(1.0, -1.0)
    assert low.tolist() == [3, -6, -2] and high.tolist() == [3, -2, 4]


# -- functions of positions

LITERALS = st.one_of(st.integers(-9, 9), st.sampled_from([0.5, -0.3, 1.7, 3.0, 100, 127]))
UNARY = st.sampled_from(
    [
        lambda a: -a,
        jnp.abs,
        jnp.sign,
        jnp.square,
        lambda a: a**3,
        lambda a: (a * 1.0) ** -2,
        lambda a: jnp.exp(a * 1.0),
        lambda a: jnp.exp2(a * 1.0),
        lambda a: jax.nn.sigmoid(a * 1.0),
        lambda a: jnp.log(a * 1.0),
        lambda a: jnp.log1p(abs(a) * 1.0),
        lambda a: jnp.sqrt(a * 1.0),
        lambda a: jax.lax.rsqrt(a * 1.0),
        lambda a: jnp.tanh(a * 0.1),
        lambda a: jnp.sin(a * 1.0),
        lambda a: jnp.floor(a * 0.7),
        lambda a: jnp.ceil(a * 0.7),
        lambda a: jnp.round(a * 0.5),
        lambda a: a.astype(jnp.int8) if a.dtype == jnp.int32 else a,
        lambda a: a.astype(jnp.int32) if a.dtype != jnp.bool_ and jnp.issubdtype(a.dtype, jnp.integer) else a,
        lambda a: a.astype(jnp.bfloat16),
        lambda a: a.astype(jnp.float16) * 300,
        lambda a: a.astype(jnp.float32),
        lambda a: a.astype(jnp.bool_),
        lambda a: 1 - a.astype(jnp.float32),
        lambda a: jnp.where(a > 2, a, 5 - a),
        lambda a: jnp.clip(a, -3, 4),
        lambda a: jnp.isfinite(a * 1.0),
        lambda a: jax.lax.erf(a * 1.0),
        lambda a: jax.lax.reduce_precision(a * 1.0, 8, 3),
    ]
)
BINARY = st.sampled_from(
    [
        lambda a, b: a + b,
        lambda a, b: a - b,
        lambda a, b: a * b,
        lambda a, b: a / b,
        lambda a, b: a // b,
        lambda a, b: a % b,
        jnp.maximum,
        jnp.minimum,
        jnp.fmod,
        lambda a, b: a < b,
        lambda a, b: a <= b,
        lambda a, b: a > b,
        lambda a, b: a >= b,
        lambda a, b: a == b,
        lambda a, b: a != b,
        lambda a, b: jnp.where(a > b, a, b + 1),
        lambda a, b: (abs(a) + 0.1) ** (b * 1.0),
        lambda a, b: a.astype(jnp.int32) & b.astype(jnp.int32),
        lambda a, b: a.astype(jnp.int32) | b.astype(jnp.int32),
        lambda a, b: a.astype(jnp.int32) ^ b.astype(jnp.int32),
        lambda a, b: a.astype(jnp.int32) << jnp.clip(b, 0, 3).astype(jnp.int32),
        lambda a, b: a.astype(jnp.int32) >> jnp.clip(b, 0, 3).astype(jnp.int32),
        lambda a, b: a.astype(bool) & b.astype(bool),
        lambda a, b: a.astype(bool) | ~b.astype(bool),
        lambda a, b: a.astype(bool) ^ b.astype(bool),
    ]
)


def number(a):
    """Booleans as integers, so that every operation takes them."""
    return a.astype(jnp.int32) if a.dtype == jnp.bool_ else a


def compose(f, *parts):
    return lambda i, j: f(*(number(p(i, j)) for p in parts))


POSITIONS = st.one_of(
    st.just(lambda i, j: i),
    st.just(lambda i, j: j),
    st.just(lambda i, j: i - j),
    st.builds(lambda c: lambda i, j: jnp.asarray(c), LITERALS),
)
EXPRESSIONS = st.recursive(
    POSITIONS,
    lambda inner: st.one_of(
        st.builds(lambda f, a: compose(f, a), UNARY, inner),
        st.builds(lambda f, a, b: compose(f, a, b), BINARY, inner, inner),
    ),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(EXPRESSIONS, st.integers(0, 10**6))
def test_functions_of_positions_stay_within_their_bounds(expression, seed):
    def table(q, k):
        i, j = jnp.arange(q.shape[0])[:, None], jnp.arange(k.shape[0])[None, :]
        return jnp.broadcast_to(expression(i, j), (q.shape[0], k.shape[0]))

    body = body_of(table, ("q",), ("k",))
    note(jax.make_jaxpr(table)(np.zeros(N), np.zeros(N)))
    actual = jax.jit(table)(np.zeros(N), np.zeros(N))
    for blocks in random_blocks(np.random.default_rng(seed)):
        assert_contained(actual, interval_of(body, blocks), blocks)


@pytest.mark.parametrize(
    "expression",
    [
        lambda i, j: i - j < 5,
        lambda i, j: (i // 3 == j // 3) & (j <= i),
        lambda i, j: jnp.where((i - j) % 4 == 1, i * j - 7, abs(i - 2 * j)),
        lambda i, j: (i & 5) ^ (j | 2),
        lambda i, j: (1 - (j <= i).astype(jnp.float32)) * -1e9,
        lambda i, j: (i - j).astype(jnp.float32) * 0.125 + 2,
        lambda i, j: jnp.floor(i / 4) + (j >> 2) + jnp.clip(i, 2, 5) // 2,
    ],
)
def test_single_cells_are_exact(expression):
    def table(q, k):
        return expression(jnp.arange(q.shape[0])[:, None], jnp.arange(k.shape[0])[None, :])

    cells = Blocks.cells(QUERY.ravel(), KEY.ravel(), N)
    low, high = interval_of(body_of(table, ("q",), ("k",)), cells).bounds(cells)
    assert (low == high).all()
    assert (low == np.asarray(table(np.zeros(N), np.zeros(N))).astype(np.float64).ravel()).all()


def test_comparisons_of_distances_are_decided_for_whole_bands():
    def mask(q, k):
        i, j = jnp.arange(q.shape[0])[:, None], jnp.arange(k.shape[0])[None, :]
        return (j <= i) & ((i + 3) - 1 < j + 102)

    n = 10**6
    bands = Blocks([0, 0, 0, 0], [n - 1] * 4, [1 - n, 0, 100, 90], [-1, 99, n - 1, 110], n)
    low, high = interval_of(body_of(mask, ("q",), ("k",)), bands).bounds(bands)
    assert low.tolist() == [0, 1, 0, 0] and high.tolist() == [0, 1, 0, 1]


def test_large_positions_round_in_small_floats():
    def mask(q, k, dtype):
        i, j = jnp.arange(q.shape[0])[:, None], jnp.arange(k.shape[0])[None, :]
        return j.astype(dtype) <= i.astype(dtype)

    for dtype, exact in ((jnp.bfloat16, 256), (jnp.float16, 2048), (jnp.float32, 2**24)):
        body = body_of(functools.partial(mask, dtype=dtype), ("q",), ("k",))
        for n, certain in ((exact, True), (4 * exact, False)):
            future = Blocks([0], [n - 1], [1 - n], [-1], n)
            assert (interval_of(body, future).bounds(future)[1][0] == 0) == certain


# -- data

BROKEN = []


def bounded(f):
    """``f``, noting where it makes extraordinary numbers or NaN of ordinary ones, which the analysis excludes."""

    def checked(*args):
        with np.errstate(all="ignore"):
            result = f(*args)
        if not isinstance(result, jax.core.Tracer):
            ordinary = functools.reduce(np.logical_and, [np.abs(a) <= BOUND for a in args])
            BROKEN.extend(result[ordinary & ~(np.abs(result) <= BOUND)])
        return result

    return checked


DATA_UNARY = st.sampled_from(
    [lambda a: -a, jnp.tanh, jnp.abs, jax.nn.sigmoid, jnp.sqrt, jnp.sign, lambda a: a * 0, lambda a: a - 1e9]
    + [bounded(f) for f in (jnp.square, jnp.exp, jnp.exp2, jnp.log1p, lambda a: 1 / a, lambda a: a**2, lambda a: a**-1)]
    + [lambda a: a * -1e9, lambda a: jnp.clip(a, -2, 3)]
    + [lambda a: jnp.where(a > 0, a, -1e30), lambda a: (a > 0.5).astype(jnp.float32)]
    + [lambda a: jnp.where(a < 0, -jnp.inf, a)]
)
DATA_BINARY = st.sampled_from(
    [bounded(f) for f in (lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b, lambda a, b: a / b)]
    + [lambda a, b: jnp.where(a < b, a, b), lambda a, b: (a == b) * 1.0, bounded(lambda a, b: (a <= b) * b)]
    + [jnp.maximum, jnp.minimum]
)
DATA = st.recursive(
    st.sampled_from(
        [
            lambda x, y, i, j: x + 0 * y,
            lambda x, y, i, j: y + 0 * x,
            lambda x, y, i, j: jnp.where(j <= i, x, -1e30) + 0 * y,
            lambda x, y, i, j: (i - j).astype(jnp.float32) + 0 * (x + y),
            lambda x, y, i, j: (j <= i) * y + 0 * x,
        ]
    ),
    lambda inner: st.one_of(
        st.builds(lambda f, a: lambda *z: f(a(*z)), DATA_UNARY, inner),
        st.builds(lambda f, a, b: lambda *z: f(a(*z), b(*z)), DATA_BINARY, inner, inner),
    ),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(DATA, st.integers(0, 10**6))
def test_data_stay_within_their_bounds(expression, seed):
    """Up to rounding, which scores do not need, and as long as what is ordinary stays ordinary."""

    def table(x, y):
        i, j = jnp.arange(x.shape[0])[:, None], jnp.arange(y.shape[0])[None, :]
        return expression(x[:, None], y[None, :], i, j)

    rng = np.random.default_rng(seed)
    BROKEN.clear()
    actual = table(*rng.normal(size=(2, N)).astype(np.float32))
    assume(not BROKEN)
    note(jax.make_jaxpr(table)(np.zeros(N), np.zeros(N)))
    body = body_of(table, ("q",), ("k",))
    for blocks in random_blocks(rng):
        assert_contained(actual, interval_of(body, blocks), blocks, rounding=1e-4)


def attention_scores(hide):
    def scores(q, k):
        i, j = jnp.arange(q.shape[0])[:, None], jnp.arange(k.shape[0])[None, :]
        return hide(jnp.einsum("qd,kd->qk", q, k), j <= i)

    return body_of(scores, ("q", 8), ("k", 8))


def states(body):
    """Of the past, the future and a block across both: bounds, and whether data are live in all of it."""
    blocks = Blocks([0, 0, 0], [N - 1] * 3, [0, 1 - N, 1 - N], [N - 1, -1, N - 1], N)
    result = interval_of(body, blocks)
    low, high = result.bounds(blocks)
    return low.tolist(), high.tolist(), np.broadcast_to(result.live, 3).tolist()


def test_masked_scores_are_hidden_live_or_undecided():
    low, high, live = states(attention_scores(lambda s, m: jnp.where(m, s, -1e30) / 8))
    assert live == [True, False, False]
    assert high[1] < -BOUND and low[2] < -BOUND and high[2] > 0
    low, high, live = states(attention_scores(lambda s, m: jnp.exp(jnp.where(m, s, -1e30) - 7)))
    assert (low[1], high[1]) == (0, 0) and live == [True, False, False]
    low, high, live = states(attention_scores(lambda s, m: jnp.exp(s) * m))
    assert (low[1], high[1]) == (0, 0) and live == [True, False, False]


# -- tables


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 3), st.sampled_from(["noise", "band", "slope", "rows"]))
def test_tables_over_pairs(seed, start, kind):
    rng = np.random.default_rng(seed)
    i, j = np.arange(N + 3)[:, None], np.arange(N + 2)[None, :]
    array = {
        "noise": rng.normal(size=(N + 3, N + 2)),
        "band": (i - j < 4) & (i >= j),
        "slope": (i - j) * 0.25,
        "rows": i * 2 + 0 * j,
    }[kind]
    array = np.stack([array, array + (kind == "noise")])
    starts = {"q": start, "k": min(start, 2)}
    table = PositionTable(array, {"q": 1, "k": 2}, starts)
    for blocks in random_blocks(rng):
        inside = (blocks.q1 < N + 3 - starts["q"]) & (blocks.k1 < N + 2 - starts["k"])
        interval = intervals.from_table(table, blocks)
        assert (np.isfinite(interval.lo) == inside).all() and (np.isfinite(interval.hi) == inside).all()
        part = array[:, starts["q"] :, starts["k"] :]
        exact = blocks.is_cell & inside
        for cell in np.flatnonzero(exact):
            values = part[:, int(blocks.q0[cell]), int(blocks.k0[cell])]
            assert (interval.lo[cell], interval.hi[cell]) == (values.min(), values.max())
        padded = np.full((2, N, N), np.nan)
        rows, columns = min(N, part.shape[1]), min(N, part.shape[2])
        padded[:, :rows, :columns] = part[:, :rows, :columns]
        for layer in padded:
            assert_contained(layer, interval, blocks)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["q", "k"]), st.booleans())
def test_tables_over_one_position(seed, axis, counts):
    rng = np.random.default_rng(seed)
    array = np.arange(2, 2 + 3 * N, 3) if counts else rng.normal(size=N)
    table = PositionTable(array, {axis: 0}, {axis: 0})
    for blocks in random_blocks(rng):
        interval = intervals.from_table(table, blocks)
        positions = QUERY if axis == "q" else KEY
        assert_contained(array[positions], interval, blocks)
        if counts:
            assert (interval.q, interval.k) == ((3.0, 0.0) if axis == "q" else (0.0, 3.0))
