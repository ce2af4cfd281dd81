"""The pool of KV pages: who holds which page, which contents can be found again, and what is evicted first.

All caches of a model share one block table: a page id addresses the same place in every layer of every cache. A page
is in use (referenced by tables), *cached* (free, but its contents can still be found by hash) or *blank* (free and
forgotten). Blank pages are handed out first, then cached ones, the least recently used first. Page 0 is the null
page: padding writes there, tables point there where no attention window reaches any more, and nobody ever holds it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from distaff.runtime.page_hash import CacheKeys

NULL_PAGE = 0


class KVPoolError(RuntimeError):
    """The pool's books do not agree, or pages leaked: a bug, never a caller's mistake."""


@dataclasses.dataclass(frozen=True, slots=True)
class PageStored:
    """The contents ``page_hash`` can be found from now on; ``parent_hash`` is None for a first page."""

    page_hash: bytes
    parent_hash: bytes | None
    token_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class PageRemoved:
    """The contents ``page_hash`` can no longer be found."""

    page_hash: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class CacheCleared:
    """Nothing can be found any more."""


CacheEvent: TypeAlias = PageStored | PageRemoved | CacheCleared


@dataclasses.dataclass(eq=False, slots=True)
class PageTable:
    """The pages of one request, in order of its tokens. The pool changes it; others read ``page_ids``."""

    keys: CacheKeys = dataclasses.field(default_factory=CacheKeys)
    page_ids: list[int] = dataclasses.field(default_factory=list)
    # Hash of each full page of known tokens, computed when first needed; they outlive the pages.
    hashes: list[bytes] = dataclasses.field(default_factory=list)
    # Leading pages that need no publishing any more, and that the window has passed.
    num_published: int = 0
    num_passed: int = 0


class KVPool:
    """Pages ``1 .. num_pages - 1`` of ``page_size`` tokens.

    ``windows`` are those of the model's caches (None: attention sees everything). Pages behind the largest window are
    given back while a request runs, which needs every cache to have one.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        enable_prefix_caching: bool = True,
        windows: Sequence[int | None] = (),
        enable_events: bool = False,
    ) -> None:
        if num_pages < 2 or page_size < 1:
            raise ValueError(
                f"a pool of {num_pages} pages of {page_size} tokens holds nothing; page 0 is the null page"
            )
        self.num_pages = num_pages
        self.page_size = page_size
        self.enable_prefix_caching = enable_prefix_caching
        bounded = [window for window in windows if window is not None]
        self.window = max(bounded) if bounded and len(bounded) == len(windows) else None
        self._references = [0] * num_pages
        self._hashes: list[bytes | None] = [None] * num_pages
        # Pages with the same contents, computed at the same time, in order of publishing.
        self._by_hash: dict[bytes, dict[int, None]] = {}
        self._blank = list(range(num_pages - 1, NULL_PAGE, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._events: list[CacheEvent] | None = [] if enable_events else None

    @property
    def num_free_pages(self) -> int:
        """Pages that can be handed out, cached ones included."""
        return len(self._blank) + len(self._cached)

    @property
    def usage(self) -> float:
        """Share of pages in use, 0..1."""
        return 1 - self.num_free_pages / (self.num_pages - 1)

    def num_pages_for(self, num_tokens: int) -> int:
        """Pages that ``num_tokens`` tokens take."""
        return -(-num_tokens // self.page_size)

    def peak_pages(self, num_tokens: int, step_tokens: int) -> int:
        """The most pages that a request holds at a time on its way to ``num_tokens``, at ``step_tokens`` a step."""
        pages = self.num_pages_for(num_tokens)
        if self.window is None:
            return pages
        # Rows of one step and of the window before it, which need not begin at the border of a page.
        return min(pages, self.num_pages_for(self.window - 1 + step_tokens) + 1)

    def find_prefix(self, table: PageTable, token_ids: Sequence[int]) -> list[int]:
        """Pages of the longest cached prefix, to be passed to `allocate` before anything else happens to the pool.

        At least one token is left to compute. Pages that no window reaches from there on are the null page.
        """
        if not self.enable_prefix_caching:
            return []
        table.keys.extend(table.hashes, token_ids, len(token_ids), self.page_size)
        hashes = table.hashes[: (len(token_ids) - 1) // self.page_size]
        return self._find_all(hashes) if self.window is None else self._find_window(hashes, self.window)

    def _find_all(self, hashes: Sequence[bytes]) -> list[int]:
        found = []
        for page_hash in hashes:
            pages = self._by_hash.get(page_hash)
            if pages is None:
                break
            found.append(next(iter(pages)))
        return found

    def _find_window(self, hashes: Sequence[bytes], window: int) -> list[int]:
        """The longest prefix whose last pages, as many as the window reaches, are cached without a gap."""
        found = [NULL_PAGE] * len(hashes)
        end = len(hashes)
        for index in range(len(hashes) - 1, -1, -1):
            pages = self._by_hash.get(hashes[index])
            if pages is None:
                end = index
                continue
            found[index] = next(iter(pages))
            if index <= self._num_passed(end * self.page_size, window):
                return [NULL_PAGE] * index + found[index:end]
        return []

    def _num_passed(self, num_tokens: int, window: int) -> int:
        """Leading pages that the token at position ``num_tokens`` and those after it cannot see."""
        return max(0, num_tokens - window + 1) // self.page_size

    def allocate(self, table: PageTable, num_tokens: int, prefix: Sequence[int] = (), reserve: int = 0) -> bool:
        """Gives ``table`` pages for its first ``num_tokens`` tokens, ``prefix`` being the first of an empty table.

        Returns False, and changes nothing, where fewer than ``reserve`` pages would stay free.
        """
        page_ids = table.page_ids
        num_new = -(-num_tokens // self.page_size) - len(page_ids) - len(prefix)
        if num_new <= 0 and not prefix:
            return True
        if prefix and page_ids:
            raise KVPoolError("a cached prefix can only begin a table, and this one has pages")
        references = self._references
        revived = [page for page in prefix if references[page] == 0 and page != NULL_PAGE]
        if num_new + len(revived) + reserve > self.num_free_pages:
            return False
        for page in revived:
            del self._cached[page]
        for page in prefix:
            if page != NULL_PAGE:
                references[page] += 1
        if prefix:
            page_ids.extend(prefix)
            table.num_published = len(prefix)
        page_ids.extend(self._take() for _ in range(num_new))
        return True

    def _take(self) -> int:
        if self._blank:
            page = self._blank.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            self._forget(page)
        self._references[page] = 1
        return page

    def publish(self, table: PageTable, token_ids: Sequence[int], num_tokens: int) -> None:
        """Makes pages that are filled by the first ``num_tokens`` tokens, all computed, findable."""
        num_full = num_tokens // self.page_size
        if num_full <= table.num_published or not self.enable_prefix_caching:
            return
        hashes = table.hashes
        table.keys.extend(hashes, token_ids, num_tokens, self.page_size)
        for index in range(table.num_published, num_full):
            page, page_hash = table.page_ids[index], hashes[index]
            self._hashes[page] = page_hash
            same = self._by_hash.setdefault(page_hash, {})
            same[page] = None
            if self._events is not None and len(same) == 1:
                parent = hashes[index - 1] if index else None
                tokens = tuple(token_ids[index * self.page_size : (index + 1) * self.page_size])
                self._events.append(PageStored(page_hash, parent, tokens))
        table.num_published = num_full

    def free_passed(self, table: PageTable, num_tokens: int) -> None:
        """Gives back pages that no window reaches once the first ``num_tokens`` tokens are computed."""
        if self.window is None:
            return
        num_passed = self._num_passed(num_tokens, self.window)
        if num_passed > table.num_passed:
            passed = slice(table.num_passed, num_passed)
            self._release(table.page_ids[passed])
            table.page_ids[passed] = [NULL_PAGE] * (num_passed - table.num_passed)
            table.num_passed = num_passed

    def free(self, table: PageTable) -> None:
        """Gives back all pages; the table is as new but keeps its hashes."""
        self._release(table.page_ids)
        table.page_ids.clear()
        table.num_published = table.num_passed = 0

    def _release(self, page_ids: Sequence[int]) -> None:
        """Drops one reference each. Later pages are reused before earlier ones: prefixes live longer than tails."""
        references, blank = self._references, []
        for page in reversed(page_ids):
            if page == NULL_PAGE:
                continue
            references[page] -= 1
            if references[page] == 0:
                if self._hashes[page] is None:
                    blank.append(page)
                else:
                    self._cached[page] = None
        self._blank.extend(reversed(blank))

    def _forget(self, page: int) -> None:
        page_hash = self._hashes[page]
        if page_hash is None:
            raise KVPoolError(f"page {page} is cached without a hash")
        self._hashes[page] = None
        same = self._by_hash[page_hash]
        del same[page]
        if not same:
            del self._by_hash[page_hash]
            if self._events is not None:
                self._events.append(PageRemoved(page_hash))

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached contents. Returns False, and changes nothing, while any page is in use."""
        if self.num_free_pages != self.num_pages - 1:
            return False
        for page in self._cached:
            self._hashes[page] = None
        self._blank.extend(reversed(self._cached))
        self._cached.clear()
        self._by_hash.clear()
        if self._events is not None:
            self._events.append(CacheCleared())
        return True

    def take_events(self) -> list[CacheEvent]:
        """What changed in the set of findable contents since the last call, in order."""
        if not self._events:
            return []
        events, self._events = self._events, []
        return events

    def check_integrity(self, tables: Iterable[PageTable]) -> None:
        """Raises `KVPoolError` unless ``tables`` account for every reference and all books agree; for tests, slow."""
        users = Counter(page for table in tables for page in table.page_ids if page != NULL_PAGE)
        hashed: dict[bytes, set[int]] = {}
        for page, page_hash in enumerate(self._hashes):
            if page_hash is not None:
                hashed.setdefault(page_hash, set()).add(page)
        free = {page for page in range(1, self.num_pages) if self._references[page] == 0}
        for holds, what in (
            (self._references == [users[page] for page in range(self.num_pages)], "reference counts differ from users"),
            (len(self._blank) + len(self._cached) == len(free), "the number of free pages is wrong"),
            ({*self._blank, *self._cached} == free, "free pages differ from pages without references"),
            (all(self._hashes[page] is None for page in self._blank), "a blank page has a hash"),
            (all(self._hashes[page] is not None for page in self._cached), "a cached page has no hash"),
            ({key: set(pages) for key, pages in self._by_hash.items()} == hashed, "the hash map differs from pages"),
            (self._hashes[NULL_PAGE] is None, "the null page has a hash"),
        ):
            if not holds:
                raise KVPoolError(f"KV pool: {what}")
