"""Pages of one kind: free, held by sequences, or kept for whoever brings the same content again.

A kept page bears the key of its content. While nobody holds it, it is spare: it goes, least recently used first, when
free pages run out. Pure bookkeeping; the pages themselves lie in a cache on a device.
"""

from collections import OrderedDict


class PagePool:
    def __init__(self, count: int):
        self.count = count
        self._free = list(range(count))[::-1]
        self._holders = [0] * count
        self._keys: dict[int, bytes] = {}
        self._pages: dict[bytes, int] = {}
        self._spare: OrderedDict[int, None] = OrderedDict()  # kept, held by nobody, least recently used first

    @property
    def available(self) -> int:
        """Pages that can be taken now."""
        return len(self._free) + len(self._spare)

    @property
    def held(self) -> int:
        return self.count - self.available

    def take(self) -> int:
        """A page with nothing in it, held once."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._spare.popitem(last=False)
            del self._pages[self._keys.pop(page)]
        self._holders[page] = 1
        return page

    def find(self, key: bytes) -> int | None:
        return self._pages.get(key)

    def holds(self, key: bytes) -> bool:
        """Whether somebody holds the page of this content: one holder more takes nothing from what is available."""
        page = self._pages.get(key)
        return page is not None and self._holders[page] > 0

    def hold(self, page: int) -> None:
        """One holder more of a page that is kept or held."""
        assert self._holders[page] or page in self._spare, f"page {page} is free and cannot be held"
        self._spare.pop(page, None)
        self._holders[page] += 1

    def drop(self, page: int, *, first_to_go: bool = False) -> None:
        """One holder less. The last one leaves a kept page spare, and any other free. `first_to_go`: as if it had not
        been used for longer than all others."""
        assert self._holders[page] > 0, f"page {page} was dropped more often than held"
        self._holders[page] -= 1
        if self._holders[page] == 0:
            if page in self._keys:
                self._spare[page] = None
                if first_to_go:
                    self._spare.move_to_end(page, last=False)
            else:
                self._free.append(page)

    def keep(self, page: int, key: bytes) -> None:
        """The page is complete, and may be found under its key. Of equal pages the first one is kept."""
        if key not in self._pages and page not in self._keys:
            self._keys[page], self._pages[key] = key, page

    def check(self) -> None:
        """Every page is in one state, and the two directions of the keys agree."""
        free, spare = set(self._free), set(self._spare)
        held = {page for page, holders in enumerate(self._holders) if holders}
        assert len(free) == len(self._free), "a page is free twice"
        assert not (free & spare or free & held or spare & held), "a page is in two states"
        assert len(free) + len(spare) + len(held) == self.count, "a page was lost"
        assert {key: page for page, key in self._keys.items()} == self._pages, "keys and pages disagree"
        assert spare <= self._keys.keys(), "a spare page without content"
        assert not free & self._keys.keys(), "a free page with content"
