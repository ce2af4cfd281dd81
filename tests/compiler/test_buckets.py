import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distaff.compiler.buckets import Bucket, BucketError, default_buckets, parse_buckets


def fits(bucket: Bucket, tokens: int, requests: int, samples: int) -> bool:
    kinds = bucket.tokens > bucket.requests or tokens == requests
    return kinds and bucket.tokens >= tokens and bucket.requests >= requests and bucket.samples >= samples


@pytest.mark.smoke
@given(st.integers(1, 300), st.integers(1, 9000), st.data())
def test_every_batch_within_the_limits_fits_a_default_program(max_batch, more, data):
    limit = max_batch + more
    buckets = default_buckets(max_batch, limit)
    assert max(b.requests for b in buckets) == max_batch
    assert max(b.tokens for b in buckets) == limit
    requests = data.draw(st.integers(1, max_batch))
    tokens = data.draw(st.integers(requests, limit))
    assert any(fits(b, tokens, requests, requests) for b in buckets)
    scored = min(tokens, max(b.samples for b in buckets))
    assert any(fits(b, tokens, requests, scored) for b in buckets)


@given(st.integers(1, 300), st.integers(1, 9000))
def test_kinds_keep_their_shapes(max_batch, more):
    for bucket in default_buckets(max_batch, max_batch + more):
        if bucket.kind == "decode":
            assert bucket.tokens == bucket.requests == bucket.samples
        else:
            assert bucket.tokens > bucket.requests
            assert (bucket.samples > bucket.requests) == (bucket.kind == "scoring")


def test_names_are_unique():
    names = [b.name for b in default_buckets(64, 512)]
    assert len(set(names)) == len(names)
    assert {"decode-1", "decode-64", "mixed-16x8", "mixed-512x64", "scoring-512x64"} <= set(names)


def test_a_step_must_have_room_beside_a_full_batch():
    with pytest.raises(BucketError, match="max_step_tokens is 64 and max_batch 64"):
        default_buckets(64, 64)
    with pytest.raises(BucketError, match="max_batch is 0"):
        default_buckets(0, 64)


def test_parse():
    assert parse_buckets("decode=1,8 mixed=128x8,32x4") == (
        Bucket(1, 1, 1),
        Bucket(8, 8, 8),
        Bucket(32, 4, 4),
        Bucket(128, 8, 8),
    )
    assert parse_buckets("mixed=20x2 scoring=20x2") == (Bucket(20, 2, 2), Bucket(20, 2, 20))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no programs are named"),
        ("prefill=8x1", "cannot read 'prefill=8x1'"),
        ("decode", "cannot read 'decode'"),
        ("decode=0 mixed=8x1", "at least 1, not '0'"),
        ("decode=1,x mixed=8x1", "at least 1, not 'x'"),
        ("mixed=8", "tokens x requests"),
        ("mixed=8x8", "more tokens than requests"),
        ("mixed=8x0", "at least 1 request"),
        ("decode=1,2", "add mixed=3x2"),
        ("decode=64 mixed=32x8", "add mixed=65x64"),
        ("mixed=128x8,64x16", "add mixed=128x16"),
        ("mixed=128x8 scoring=64x8", "add scoring=128x8"),
    ],
)
def test_refusals_say_what_to_write(text, message):
    with pytest.raises(BucketError, match=message):
        parse_buckets(text)


@given(st.text(alphabet="decodmixsrng=,x0123456789 ", max_size=40))
def test_any_text_is_read_or_refused(text):
    with contextlib.suppress(BucketError):
        assert parse_buckets(text)
