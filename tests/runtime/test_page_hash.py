import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distaff.runtime.page_hash import CacheKeys, LoRAKey, MediaKey


def hashes(token_ids, page_size=4, **keys):
    result = []
    CacheKeys(**keys).extend(result, token_ids, len(token_ids), page_size)
    return result


TOKENS = list(range(16))


@pytest.mark.smoke
def test_b01_only_full_pages_have_a_hash():
    assert len(hashes(TOKENS[:3])) == 0
    assert len(hashes(TOKENS[:4])) == 1
    assert len(hashes(TOKENS[:11])) == 2
    assert hashes(TOKENS)[:2] == hashes(TOKENS[:11])


def test_b02_hash_depends_on_all_tokens_before():
    changed = hashes([99, *TOKENS[1:]])
    assert all(a != b for a, b in zip(hashes(TOKENS), changed, strict=True))
    same_page = hashes([1, 1, 1, 1, 1, 1, 1, 1])
    assert same_page[0] != same_page[1]


def test_extending_bit_by_bit_gives_the_same_hashes():
    keys, result = CacheKeys(salt="s", media=(MediaKey("m", 3, 6),)), []
    for known in range(len(TOKENS) + 1):
        keys.extend(result, TOKENS, known, 4)
        assert len(result) == known // 4
    assert result == hashes(TOKENS, salt="s", media=(MediaKey("m", 3, 6),))


def test_b14_media_differ_from_the_first_page_they_touch():
    text = hashes(TOKENS)
    first = hashes(TOKENS, media=(MediaKey("cat", 5, 6),))  # pages 1 and 2
    second = hashes(TOKENS, media=(MediaKey("dog", 5, 6),))
    assert text[0] == first[0] == second[0]
    for page in (1, 2, 3):
        assert len({text[page], first[page], second[page]}) == 3


def test_b14_a_shifted_item_differs():
    assert hashes(TOKENS, media=(MediaKey("cat", 5, 2),))[1] != hashes(TOKENS, media=(MediaKey("cat", 6, 2),))[1]
    # The same tokens and item, but its middle instead of its start, lie in the page.
    long = hashes(TOKENS, media=(MediaKey("cat", 0, 8),))
    assert long[1] != hashes(TOKENS, media=(MediaKey("cat", 0, 4), MediaKey("cat", 4, 4)))[1]


def test_b15_salt_stands_at_the_root_and_reaches_all_pages():
    assert hashes(TOKENS, salt="a") == hashes(TOKENS, salt="a")
    assert not set(hashes(TOKENS, salt="a")) & set(hashes(TOKENS, salt="b"))
    assert not set(hashes(TOKENS, salt="a")) & set(hashes(TOKENS))
    # Beyond the root the salt is not looked at: the chain carries it.
    chain = hashes(TOKENS[:4], salt="a")
    CacheKeys(salt="b").extend(chain, TOKENS, 16, 4)
    assert chain == hashes(TOKENS, salt="a")


def test_b16_adapter_name_and_version_change_the_hash():
    kinds = [{}, {"lora": LoRAKey("a", "1")}, {"lora": LoRAKey("a", "2")}, {"lora": LoRAKey("b", "1")}]
    assert len({hashes(TOKENS, **kind)[0] for kind in kinds}) == len(kinds)


def test_b16_equal_spelling_in_different_places_does_not_collide():
    kinds = [
        {"salt": "a"},
        {"lora": LoRAKey("a", "")},
        {"lora": LoRAKey("", "a")},
        {"salt": "a", "lora": LoRAKey("a", "a")},
        {"salt": "('a', 'a')"},
        {"salt": "None"},
        {"salt": ""},
        {},
    ]
    assert len({hashes(TOKENS, **kind)[0] for kind in kinds}) == len(kinds)


def test_page_size_changes_the_hash_of_the_same_tokens():
    assert hashes(TOKENS[:8], page_size=8)[0] not in hashes(TOKENS[:8], page_size=4)


def drawn_contents():
    """Few tokens and short names, so that equal beginnings are common."""
    media = st.lists(st.builds(MediaKey, st.sampled_from("ab"), st.integers(0, 5), st.integers(1, 3)), max_size=2).map(
        lambda items: tuple(sorted(items, key=lambda item: item.offset))
    )
    keys = st.builds(
        CacheKeys,
        salt=st.sampled_from([None, "", "s"]),
        lora=st.sampled_from([None, LoRAKey("a", "1"), LoRAKey("a", "2")]),
        media=media,
    )
    return st.tuples(keys, st.lists(st.integers(0, 1), max_size=8))


@given(st.lists(drawn_contents(), min_size=2, max_size=6))
def test_pages_have_equal_hashes_where_all_that_decides_them_is_equal(drawn):
    """That is salt, adapter, the tokens up to the page's end, and which media lie where in each page up to it."""
    size, pages = 2, []
    for keys, token_ids in drawn:
        found = []
        keys.extend(found, token_ids, len(token_ids), size)
        media = [
            [(m.content_hash, m.offset) for m in keys.media if m.offset < at + size and at < m.offset + m.length]
            for at in range(0, len(token_ids), size)
        ]
        for index, page_hash in enumerate(found):
            decisive = (keys.salt, keys.lora, token_ids[: (index + 1) * size], media[: index + 1])
            pages.append((page_hash, decisive))
    for (a, left), (b, right) in itertools.combinations(pages, 2):
        assert (a == b) == (left == right)
