"""Random use of the pool, against naive models: what is cached, as a set, and what a listener hears."""

import copy

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from distaff.runtime.kv_pool import CacheCleared, KVPool, PageRemoved, PageStored, PageTable
from distaff.runtime.page_hash import CacheKeys

PS = 2


class Holder:
    def __init__(self, table, token_ids, computed):
        self.table, self.token_ids, self.computed = table, token_ids, computed


class PoolMachine(RuleBasedStateMachine):
    """Requests with few different tokens, so that prefixes are often shared."""

    @initialize(
        num_pages=st.integers(2, 14),
        caching=st.booleans(),
        windows=st.sampled_from([(), (None,), (1,), (3,), (4, 6), (5, None)]),
    )
    def make_pool(self, num_pages, caching, windows):
        self.pool = KVPool(num_pages, PS, caching, windows, enable_events=True)
        self.holders = []
        # Contents by hash, as a listener of events rebuilds them.
        self.heard = {}
        # The prompt up to and with a page, by its hash, once heard of.
        self.prefixes = {}

    def snapshot(self):
        pool = self.pool
        return copy.deepcopy(
            (pool._references, pool._hashes, pool._by_hash, pool._blank, list(pool._cached), pool._events)
        )

    def expected_hit(self, keys, token_ids):
        """The longest prefix whose pages within the window are all cached, page by page."""
        cached = set(self.heard.values())
        for count in range((len(token_ids) - 1) // PS, 0, -1):
            seen_from = 0 if self.pool.window is None else max(0, count * PS - self.pool.window + 1)
            first = min(seen_from // PS, count - 1)
            if all((keys.salt, tuple(token_ids[: (i + 1) * PS])) in cached for i in range(first, count)):
                return first, count
        return 0, 0

    @rule(token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=16), salt=st.sampled_from([None, "a"]),
          reserve=st.integers(0, 2))  # fmt: skip
    def admit(self, token_ids, salt, reserve):
        table = PageTable(CacheKeys(salt=salt))
        prefix = self.pool.find_prefix(table, token_ids)
        first, count = self.expected_hit(table.keys, token_ids)
        assert len(prefix) == count
        assert [page == 0 for page in prefix] == [i < first for i in range(count)]
        before, free = self.snapshot(), self.pool.num_free_pages
        needed = self.pool.num_pages_for(len(token_ids)) - sum(self.pool._references[p] > 0 or p == 0 for p in prefix)
        fits = self.pool.allocate(table, len(token_ids), prefix, reserve)
        assert fits == (needed + reserve <= free)
        if fits:
            assert self.pool.num_free_pages == free - needed
            self.holders.append(Holder(table, token_ids, count * PS))
        else:
            assert self.snapshot() == before

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), count=st.integers(1, 5))
    def compute(self, data, count):
        holder = data.draw(st.sampled_from(self.holders))
        holder.computed = min(len(holder.token_ids), holder.computed + count)
        keys, before = holder.table.keys, holder.table.num_published
        self.pool.publish(holder.table, holder.token_ids, holder.computed)
        self.hear(keys, holder.token_ids)
        if self.pool.enable_prefix_caching:
            assert holder.table.num_published == max(before, holder.computed // PS)
        self.pool.free_passed(holder.table, holder.computed)
        if self.pool.window is not None:
            passed = max(0, holder.computed - self.pool.window + 1) // PS
            assert all(page == 0 for page in holder.table.page_ids[:passed])
        assert 0 not in holder.table.page_ids[max(0, holder.computed - (self.pool.window or 10**6) + 1) // PS :]

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), new=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def grow(self, data, new):
        holder = data.draw(st.sampled_from(self.holders))
        before, free, length = self.snapshot(), self.pool.num_free_pages, len(holder.token_ids) + len(new)
        needed = self.pool.num_pages_for(length) - len(holder.table.page_ids)
        fits = self.pool.allocate(holder.table, length)
        assert fits == (needed <= free)
        if fits:
            holder.token_ids = holder.token_ids + new
        else:
            assert self.snapshot() == before

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def free(self, data):
        holder = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.free(holder.table)
        assert holder.table.page_ids == []

    @rule()
    def reset(self):
        in_use = any(page for holder in self.holders for page in holder.table.page_ids)
        assert self.pool.reset_prefix_cache() == (not in_use)

    def hear(self, keys=None, token_ids=()):
        """Rebuilds the index from events; ``keys`` are those of the only request that can have stored anything."""
        for event in self.pool.take_events():
            if isinstance(event, CacheCleared):
                self.heard.clear()
            elif isinstance(event, PageRemoved):
                del self.heard[event.page_hash]
            else:
                assert isinstance(event, PageStored) and event.page_hash not in self.heard
                content = () if event.parent_hash is None else self.prefixes[event.parent_hash]
                self.heard[event.page_hash] = (keys.salt, content + event.token_ids)
                self.prefixes[event.page_hash] = content + event.token_ids

    @invariant()
    def books_agree(self):
        if not hasattr(self, "pool"):
            return
        self.hear()
        self.pool.check_integrity([holder.table for holder in self.holders])
        # b22: the listener's index is the pool's.
        assert set(self.heard) == set(self.pool._by_hash)

    def teardown(self):
        if hasattr(self, "pool"):
            for holder in self.holders:
                self.pool.free(holder.table)
            self.pool.check_integrity([])
            assert self.pool.num_free_pages == self.pool.num_pages - 1


PoolMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase
