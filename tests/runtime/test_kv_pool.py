import copy

import pytest

from distaff.runtime.kv_pool import CacheCleared, KVPool, KVPoolError, PageRemoved, PageStored, PageTable
from distaff.runtime.page_hash import CacheKeys, LoRAKey, MediaKey

PS = 4


def tokens(count, first=0):
    return list(range(first, first + count))


def admit(pool, token_ids, reserve=0, **keys):
    """A request whose tokens are all computed; None if it does not fit."""
    table = PageTable(CacheKeys(**keys))
    prefix = pool.find_prefix(table, token_ids)
    if not pool.allocate(table, len(token_ids), prefix, reserve):
        return None
    pool.publish(table, token_ids, len(token_ids))
    return table


def hit(pool, token_ids, **keys):
    return len(pool.find_prefix(PageTable(CacheKeys(**keys)), token_ids))


def evict(pool, page):
    """What handing out and freeing a cached page does, for a page of the test's choice."""
    del pool._cached[page]
    pool._forget(page)
    pool._blank.append(page)


def books(pool):
    return copy.deepcopy((pool._references, pool._hashes, pool._by_hash, pool._blank, list(pool._cached), pool._events))


@pytest.mark.smoke
def test_b01_a_partial_tail_never_hits():
    pool = KVPool(20, PS)
    pool.free(admit(pool, tokens(7)))
    assert hit(pool, tokens(20)) == 1
    assert hit(pool, tokens(7)) == 1


def test_b02_a_page_hits_only_behind_the_same_tokens():
    pool = KVPool(20, PS)
    admit(pool, tokens(12))
    assert hit(pool, [99, *tokens(12)[1:], 0]) == 0
    assert hit(pool, [*tokens(4), 99, *tokens(12)[5:], 0]) == 1


def test_b03_a_hit_leaves_at_least_one_token_to_compute():
    pool = KVPool(20, PS)
    admit(pool, tokens(12))
    assert hit(pool, tokens(12)) == 2
    assert hit(pool, tokens(13)) == 3


def test_b04_hits_share_pages_in_use_and_revive_free_ones():
    pool = KVPool(20, PS)
    first = admit(pool, tokens(9))
    free = pool.num_free_pages
    second = admit(pool, tokens(9))
    assert second.page_ids[:2] == first.page_ids[:2]
    assert pool.num_free_pages == free - 1
    pool.check_integrity([first, second])
    pool.free(first)
    pool.free(second)
    assert pool.num_free_pages == 19
    third = admit(pool, tokens(9))
    assert pool.num_free_pages == 16
    pool.check_integrity([third])


def test_b05_freed_tail_is_reused_first():
    pool = KVPool(6, PS)
    table = admit(pool, tokens(20))
    pages = list(table.page_ids)
    pool.free(table)
    other = admit(pool, tokens(12, first=100))
    assert other.page_ids == pages[:1:-1]
    assert hit(pool, tokens(21)) == 2


def test_b05_freed_tail_is_reused_first_without_hashes():
    pool = KVPool(6, PS, enable_prefix_caching=False)
    table = admit(pool, tokens(20))
    pages = list(table.page_ids)
    pool.free(table)
    assert admit(pool, tokens(20)).page_ids == pages[::-1]


def test_b06_blank_pages_go_before_cached_ones_and_those_by_least_recent_use():
    pool = KVPool(8, PS)
    old, new = admit(pool, tokens(4)), admit(pool, tokens(4, 50))
    partial = admit(pool, tokens(3, 90))
    old_page, new_page, partial_page = old.page_ids[0], new.page_ids[0], partial.page_ids[0]
    for table in (old, new, partial):
        pool.free(table)
    got = admit(pool, tokens(27, 200)).page_ids
    assert got[0] == partial_page
    assert set(got[:5]).isdisjoint({old_page, new_page})
    assert got[5:] == [old_page, new_page]


def test_b06_a_hit_makes_a_page_recent():
    pool = KVPool(3, PS)
    for first in (0, 50):
        pool.free(admit(pool, tokens(4, first)))
    again = PageTable()
    assert pool.allocate(again, 4, pool.find_prefix(again, tokens(5)))
    pool.free(again)
    admit(pool, tokens(3, 90))
    assert hit(pool, tokens(5)) == 1
    assert hit(pool, tokens(5, 50)) == 0


def test_b07_a_cached_page_is_findable_until_it_is_handed_out():
    pool = KVPool(3, PS)
    pool.free(admit(pool, tokens(8)))
    assert hit(pool, tokens(9)) == 2
    table = PageTable()
    assert pool.allocate(table, 1)
    assert hit(pool, tokens(9)) == 1
    assert pool.allocate(table, 5)
    assert hit(pool, tokens(9)) == 0
    pool.check_integrity([table])


def test_b08_pages_hit_by_an_allocation_are_not_evicted_for_it():
    pool = KVPool(5, PS)
    pool.free(admit(pool, tokens(8)))  # the oldest free pages
    pool.free(admit(pool, tokens(8, 50)))
    table = PageTable()
    prefix = pool.find_prefix(table, tokens(16))
    assert len(prefix) == 2
    assert pool.allocate(table, 16, prefix)
    assert table.page_ids[:2] == prefix
    assert len(set(table.page_ids)) == 4
    pool.check_integrity([table])


def test_b09_an_allocation_that_does_not_fit_changes_nothing():
    pool = KVPool(6, PS, enable_events=True)
    held = admit(pool, tokens(8))
    pool.free(admit(pool, tokens(8, 50)))
    before = books(pool)
    table = PageTable()
    prefix = pool.find_prefix(table, tokens(17, 50))
    assert len(prefix) == 2  # both free: with 3 new ones that is 5 of 3
    assert not pool.allocate(table, 17, prefix)
    assert not pool.allocate(held, 21)
    assert pool.allocate(table, 8, prefix, reserve=2) is False
    assert books(pool) == before
    assert table.page_ids == [] and len(held.page_ids) == 2
    assert pool.allocate(table, 8, prefix, reserve=1)


def test_b10_growing_inside_a_page_takes_none_and_a_full_page_is_cached_at_once():
    pool = KVPool(6, PS)
    table, known = PageTable(), tokens(6)
    assert pool.allocate(table, 6)
    pool.publish(table, known, 6)
    free = pool.num_free_pages
    assert pool.allocate(table, 8)
    assert pool.num_free_pages == free
    assert hit(pool, tokens(9)) == 1
    pool.publish(table, tokens(8), 8)
    assert hit(pool, tokens(9)) == 2
    assert pool.allocate(table, 9)
    assert pool.num_free_pages == free - 1


def test_b11_equal_contents_computed_twice_stay_findable_until_both_are_gone():
    pool = KVPool(3, PS, enable_events=True)
    first, second = PageTable(), PageTable()
    for table in (first, second):
        assert pool.allocate(table, 4)
    for table in (first, second):
        pool.publish(table, tokens(4), 4)
    pool.check_integrity([first, second])
    pool.free(first)
    taken = PageTable()
    assert pool.allocate(taken, 1)  # evicts the first one's page
    assert pool.find_prefix(PageTable(), tokens(5)) == second.page_ids
    pool.free(second)
    assert pool.allocate(taken, 5)
    assert hit(pool, tokens(5)) == 0
    assert [type(event) for event in pool.take_events()] == [PageStored, PageRemoved]


def test_b12_reusing_a_cached_page_as_a_partial_one_clears_its_hash():
    pool = KVPool(2, PS)
    pool.free(admit(pool, tokens(4)))
    table = admit(pool, tokens(2, 50))
    assert hit(pool, tokens(5)) == 0
    pool.free(table)
    assert hit(pool, tokens(5)) == 0
    pool.check_integrity([])


def test_b13_with_caching_off_nothing_hits():
    pool = KVPool(10, PS, enable_prefix_caching=False, enable_events=True)
    table = admit(pool, tokens(9))
    assert hit(pool, tokens(9)) == 0
    assert table.hashes == []
    pool.free(table)
    assert hit(pool, tokens(9)) == 0
    assert pool.take_events() == []
    pool.check_integrity([])


def test_b14_images_separate_pages():
    pool = KVPool(20, PS)
    admit(pool, tokens(12), media=(MediaKey("cat", 5, 2),))
    assert hit(pool, tokens(13), media=(MediaKey("cat", 5, 2),)) == 3
    assert hit(pool, tokens(13), media=(MediaKey("dog", 5, 2),)) == 1
    assert hit(pool, tokens(13), media=(MediaKey("cat", 6, 2),)) == 1
    assert hit(pool, tokens(13)) == 1


def test_b15_salts_separate_tenants():
    pool = KVPool(20, PS)
    admit(pool, tokens(12), salt="a")
    assert hit(pool, tokens(13), salt="a") == 3
    assert hit(pool, tokens(13), salt="b") == 0
    assert hit(pool, tokens(13)) == 0


def test_b16_adapters_separate_pages():
    pool = KVPool(20, PS)
    admit(pool, tokens(12), lora=LoRAKey("a", "1"))
    assert hit(pool, tokens(13), lora=LoRAKey("a", "1")) == 3
    assert hit(pool, tokens(13), lora=LoRAKey("a", "2")) == 0
    assert hit(pool, tokens(13), salt="a") == 0


def test_b19_draft_tokens_are_not_hashed_and_accepted_ones_are():
    pool = KVPool(10, PS)
    table, known = PageTable(), tokens(6)
    assert pool.allocate(table, 9)  # room for three drafts
    pool.publish(table, known, 6)
    known += [77]  # one accepted: position 7 holds a rejected draft's row
    pool.publish(table, known, 7)
    assert hit(pool, [*known, 0, 0]) == 1
    known += [78]
    pool.publish(table, known, 8)
    assert hit(pool, [*known, 0]) == 2


def test_b20_tokens_of_a_step_in_flight_are_not_findable():
    pool = KVPool(10, PS)
    table = PageTable()
    assert pool.allocate(table, 8)
    assert hit(pool, tokens(9)) == 0
    pool.publish(table, tokens(8), 4)
    assert hit(pool, tokens(9)) == 1


def test_b21_reset_needs_all_pages_free():
    pool = KVPool(10, PS, enable_events=True)
    table = admit(pool, tokens(9))
    before = books(pool)
    assert not pool.reset_prefix_cache()
    assert books(pool) == before
    pool.free(table)
    assert pool.reset_prefix_cache()
    assert hit(pool, tokens(9)) == 0
    assert pool.num_free_pages == 9
    pool.check_integrity([])
    assert 0 not in admit(pool, tokens(36)).page_ids
    assert CacheCleared() in pool.take_events()


def test_b22_events_name_contents_parents_and_tokens():
    pool = KVPool(3, PS, enable_events=True)
    table = admit(pool, tokens(8))
    first, second = table.hashes
    assert pool.take_events() == [
        PageStored(first, None, (0, 1, 2, 3)),
        PageStored(second, first, (4, 5, 6, 7)),
    ]
    assert pool.take_events() == []
    pool.free(table)
    assert pool.allocate(PageTable(), 8)
    assert pool.take_events() == [PageRemoved(second), PageRemoved(first)]


def test_b23_pages_behind_the_window_are_freed_while_running():
    pool = KVPool(20, PS, windows=(6,))
    table = PageTable()
    assert pool.allocate(table, 16)
    pages = list(table.page_ids)
    pool.publish(table, tokens(16), 16)
    pool.free_passed(table, 8)  # the next token, at 8, sees 3..8
    assert table.page_ids == pages
    pool.free_passed(table, 9)  # sees 4..9
    assert table.page_ids == [0, *pages[1:]]
    assert pool.num_free_pages == 16
    pool.free_passed(table, 9)
    pool.free_passed(table, 16)  # sees 11..16
    assert table.page_ids == [0, 0, *pages[2:]]
    pool.check_integrity([table])
    pool.free(table)
    assert pool.num_free_pages == 19
    pool.check_integrity([])


def test_b23_a_hit_needs_only_the_pages_of_the_window():
    pool = KVPool(20, PS, windows=(6,))
    table = PageTable()
    assert pool.allocate(table, 16)
    pool.publish(table, tokens(16), 16)
    pages = list(table.page_ids)
    pool.free(table)
    # The token at 16 sees 11..16: pages 2 and 3.
    for page in pages[:2]:
        evict(pool, page)
        assert hit(pool, tokens(17)) == 4
    evict(pool, pages[2])
    assert hit(pool, tokens(17)) == 0


def test_b23_the_hit_holds_null_pages_before_the_window():
    pool = KVPool(20, PS, windows=(6,))
    table = admit(pool, tokens(16))
    pages = list(table.page_ids)
    assert pool.find_prefix(PageTable(), tokens(17)) == [0, 0, *pages[2:]]
    again = admit(pool, tokens(17))
    assert again.page_ids[:4] == [0, 0, *pages[2:]]
    pool.check_integrity([table, again])
    pool.free_passed(again, 17)
    pool.free(again)
    pool.check_integrity([table])


def test_b23_a_gap_shortens_the_hit():
    pool = KVPool(20, PS, windows=(6,))
    table = admit(pool, tokens(24))
    gap = table.page_ids[4]
    pool.free(table)
    evict(pool, gap)
    # 24 needs pages 4, 5 and 20 needs 3, 4; 16 needs 2, 3.
    assert hit(pool, tokens(25)) == 4


def test_b24_the_largest_window_decides_and_none_sees_everything():
    assert KVPool(9, PS, windows=(6, 10)).window == 10
    assert KVPool(9, PS, windows=(6, None)).window is None
    assert KVPool(9, PS).window is None
    pool = KVPool(9, PS, windows=(4, None))
    table = admit(pool, tokens(16))
    pool.free_passed(table, 16)
    assert 0 not in table.page_ids


def test_b25_the_free_list_survives_drain_and_refill():
    pool = KVPool(50, PS)
    for _ in range(3):
        table = PageTable()
        assert pool.allocate(table, 49 * PS)
        assert not pool.allocate(PageTable(), 1)
        assert sorted(table.page_ids) == list(range(1, 50))
        assert pool.usage == 1
        pool.publish(table, tokens(100), 100)
        pool.free(table)
        assert pool.num_free_pages == 49 and pool.usage == 0
        pool.check_integrity([])


def test_b45_after_all_is_freed_nothing_is_in_use():
    pool = KVPool(30, PS)
    tables = [admit(pool, tokens(10 + i)) for i in range(4)]
    for table in tables:
        pool.free(table)
        pool.free(table)  # empty by now
    pool.check_integrity([])
    assert pool.num_free_pages == 29


def test_peak_pages_of_a_window():
    pool = KVPool(30, PS, windows=(6,))
    assert pool.peak_pages(5, 8) == 2
    assert pool.peak_pages(1000, 8) == 5  # 13 rows from the middle of a page on
    assert KVPool(30, PS).peak_pages(1000, 8) == 250


def test_integrity_check_sees_leaks_and_foreign_users():
    pool = KVPool(10, PS)
    table = admit(pool, tokens(9))
    with pytest.raises(KVPoolError, match="reference counts"):
        pool.check_integrity([])
    with pytest.raises(KVPoolError, match="reference counts"):
        pool.check_integrity([table, table])
    pool._hashes[table.page_ids[0]] = None
    with pytest.raises(KVPoolError, match="hash map"):
        pool.check_integrity([table])


def test_a_prefix_can_only_begin_a_table():
    pool = KVPool(10, PS)
    table = admit(pool, tokens(9))
    with pytest.raises(KVPoolError, match="begin"):
        pool.allocate(table, 12, table.page_ids[:1])


@pytest.mark.parametrize(("num_pages", "page_size"), [(1, 4), (0, 4), (4, 0)])
def test_a_pool_without_room_is_refused(num_pages, page_size):
    with pytest.raises(ValueError, match="null page"):
        KVPool(num_pages, page_size)
