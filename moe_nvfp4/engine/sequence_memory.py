"""The memory of sequences: pages of each geometry, states at chunk boundaries, and what can be reused of a prompt.

Content is named by a chain of hashes: the key of a page covers every token before it, so equal keys mean equal keys
and values. Tokens come from users, hence a cryptographic hash: nobody can make another's prompt match. To go on from
a reused prefix a sequence needs all its pages in full attention, those of the last window elsewhere, and, where layers
are recurrent, a snapshot of their states at just that place. Pages may be shared within the step that fills them:
every layer writes its keys and values before it reads any. A snapshot is written by a step or copied after it, and is
restored before one, so it can be found only from the next step on. An answer takes one at the end of each of its pages.
"""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from moe_nvfp4.engine.pages import PagePool


class PageGroup(NamedTuple):
    """Pages of the layers of one geometry, and how many tokens these layers see; 0: all."""

    pages: int
    window: int = 0


class TableChange(NamedTuple):
    """Logical page `index` of a sequence's group lies in `page` from the next step on."""

    group: int
    index: int  # type: ignore[assignment]  # shadows a method of tuples that nobody needs here
    page: int


@dataclass(slots=True)
class Memory:
    """What one sequence holds. `tables[group][index]` is a page, or -1 behind the window."""

    tables: list[list[int]]
    keys: list[bytes] = field(default_factory=list)  # of the leading pages whose tokens are known
    kept: int = 0  # leading pages that were offered for reuse
    dropped: list[int] = field(default_factory=list)  # leading pages of each group that lie behind its window
    changes: list[TableChange] = field(default_factory=list)  # since the last step
    line: int | None = None  # with the states after the `line_pages` leading pages, copied while the answer came
    line_pages: int = 0

    def take_changes(self) -> list[TableChange]:
        changes, self.changes = self.changes, []
        return changes


class Beginning(NamedTuple):
    memory: Memory
    reused: int  # tokens
    snapshot: int | None  # line with the states after them
    matched: int  # tokens whose keys and values are there in full attention; states may be missing


class SequenceMemory:
    """All pages and snapshots of one model. `snapshots`: lines for states, None where no layer is recurrent. `stride`:
    tokens after whose multiples a sequence may go on from what others left there; default: a page."""

    def __init__(
        self,
        groups: Sequence[PageGroup],
        page: int,
        snapshots: int | None = None,
        *,
        reuse: bool = True,
        stride: int | None = None,
    ):
        self.page, self.reuse = page, reuse
        assert (stride or page) % page == 0, f"a stride of {stride} tokens is no number of pages of {page}"
        self._stride = (stride or page) // page
        self.groups = list(groups)
        self.pools = [PagePool(group.pages) for group in groups]
        self.snapshots = None if snapshots is None else PagePool(snapshots)
        # Lines that the step being planned will write, and whether only in passing.
        self._planned: dict[bytes, tuple[int, bool]] = {}

    @property
    def takes_snapshots(self) -> bool:
        return self.reuse and self.snapshots is not None and self.snapshots.count > 0

    def longest(self, chunk: int) -> int | None:
        """Tokens of the longest sequence that can run alone, computed in chunks; None: any."""
        bounded = [g for g in self.groups if not g.window or self._window_pages(g, chunk) > g.pages]
        return min((group.pages * self.page for group in bounded), default=None)

    def empty(self, keys: list[bytes] | None = None) -> Memory:
        return Memory([[] for _ in self.groups], [] if keys is None else keys, dropped=[0] * len(self.groups))

    def begin(self, tokens: Sequence[int], keys: list[bytes] | None = None, searchable: int | None = None) -> Beginning:
        """Pages of the longest reusable prefix that leaves at least one token to compute, of all or of so many
        `searchable` ones. `keys`: those of the tokens, as far as they are known; the sequence's memory extends them."""
        memory = self.empty(keys)
        matched, count = self._reusable(memory.keys, tokens, searchable)
        for group, pool in zip(range(len(self.groups)), self.pools, strict=True):
            first = self._first_page(group, count * self.page)
            for index in range(count):
                page = pool.find(memory.keys[index]) if index >= first else None
                memory.tables[group].append(-1 if page is None else page)
                if page is not None:
                    pool.hold(page)
                    memory.changes.append(TableChange(group, index, page))
        memory.kept = count
        line = None
        if self.snapshots is not None and count:
            line = self.snapshots.find(memory.keys[count - 1])
            assert line is not None
            self.snapshots.hold(line)  # used just now
            self.snapshots.drop(line)
        return Beginning(memory, count * self.page, line, matched * self.page)

    def has_room(
        self,
        tokens: Sequence[int],
        keys: list[bytes],
        chunk: int,
        reserved: Sequence[int],
        searchable: int | None = None,
    ) -> bool:
        """Whether a sequence can begin and get one token: `reserved` pages are promised to others. Pages that it would
        share with those who run are not counted."""
        needed = self.pages_for(len(tokens) + 1, chunk)
        free = [pool.available - promised for pool, promised in zip(self.pools, reserved, strict=True)]
        if all(pages <= there for pages, there in zip(needed, free, strict=True)):
            return True
        _, count = self._reusable(keys, tokens, searchable)
        for group, pool in enumerate(self.pools):
            if not self.groups[group].window:
                needed[group] -= sum(pool.holds(key) for key in keys[:count])
        return all(pages <= there for pages, there in zip(needed, free, strict=True))

    def better_soon(self, tokens: Sequence[int], keys: list[bytes], searchable: int | None = None) -> bool:
        """Whether this step leaves a snapshot that reaches further into these tokens than what can be reused now."""
        if not self._planned:
            return False
        _, count = self._reusable(keys, tokens, searchable)
        most = ((len(tokens) if searchable is None else searchable) - 1) // self.page
        return any(key in self._planned for key in keys[count:most])

    def grow(self, memory: Memory, first_row: int, length: int) -> bool:
        """Pages for rows `first_row` to `length`, and none that they do not see. False, and no page taken, if there
        are too few."""
        needed, wanted = -(-length // self.page), []
        for group, table in enumerate(memory.tables):
            first = self._first_page(group, first_row)
            for index in range(memory.dropped[group], min(first, len(table))):
                self._drop(memory, group, index)
                memory.dropped[group] = index + 1
            wanted.append(sum(1 for index in range(len(table), needed) if index >= first))
        if any(pool.available < count for pool, count in zip(self.pools, wanted, strict=True)):
            return False
        for group, (table, pool) in enumerate(zip(memory.tables, self.pools, strict=True)):
            first = self._first_page(group, first_row)
            for index in range(len(table), needed):
                table.append(pool.take() if index >= first else -1)
                if table[index] >= 0:
                    memory.changes.append(TableChange(group, index, table[index]))
        return True

    def offer(self, memory: Memory, tokens: Sequence[int], computed: int) -> None:
        """Pages whose `computed` tokens are all known and written may be found by others from now on."""
        complete = min(computed, len(tokens)) // self.page
        if self.reuse and complete > memory.kept:
            self._extend_keys(memory.keys, tokens, complete)
            for index in range(memory.kept, complete):
                for table, pool in zip(memory.tables, self.pools, strict=True):
                    if table[index] >= 0:
                        pool.keep(table[index], memory.keys[index])
            memory.kept = complete
        if self.snapshots is not None and memory.line is not None and memory.line_pages <= memory.kept:
            self.snapshots.keep(memory.line, memory.keys[memory.line_pages - 1])

    def snapshot(self, memory: Memory, tokens: Sequence[int], position: int, *, passing: bool = False) -> int | None:
        """A line for the states after `position` tokens, a multiple of a page, which it holds when the step is over;
        None if they are there already or there is no place. `passing`: the next one of the same prompt may replace it,
        so that a long prompt does not push out everybody's."""
        pool = self.snapshots
        if not self.takes_snapshots or pool is None or position == 0 or position % self.page or not pool.available:
            return None
        self._extend_keys(memory.keys, tokens, position // self.page)
        key = memory.keys[position // self.page - 1]
        if key in self._planned or pool.find(key) is not None:
            return None
        line = pool.take()
        self._planned[key] = line, passing
        return line

    def snapshot_answer(self, memory: Memory, position: int) -> int | None:
        """The same for an answer, whose last tokens may not be known yet: the line can be found once they are. It stays
        with the answer, and the last one is left for the next turn of a conversation. They hold half of
        all lines at most, or the only one."""
        pool = self.snapshots
        if not self.takes_snapshots or pool is None:
            return None
        if memory.line is not None:
            pool.drop(memory.line, first_to_go=True)
            memory.line = None
        if not pool.available or pool.held >= max(1, pool.count // 2):
            return None
        memory.line, memory.line_pages = pool.take(), position // self.page
        return memory.line

    def publish(self) -> None:
        """The step is planned: its snapshots may be found from now on."""
        if self._planned and self.snapshots is not None:
            for key, (line, passing) in self._planned.items():
                self.snapshots.keep(line, key)
                self.snapshots.drop(line, first_to_go=passing)
            self._planned.clear()

    def end(self, memory: Memory) -> None:
        for group, table in enumerate(memory.tables):
            # Last pages first: of a prefix its beginning is the likeliest to be asked for again.
            for index in reversed(range(len(table))):
                self._drop(memory, group, index)
            table.clear()
        memory.changes.clear()
        if self.snapshots is not None and memory.line is not None:
            self.snapshots.drop(memory.line)
            memory.line = None

    def pages_for(self, length: int, chunk: int) -> list[int]:
        """Pages of each group that a sequence of `length` tokens holds at most, computed in chunks."""
        total = -(-length // self.page)
        return [min(total, self._window_pages(g, chunk)) if g.window else total for g in self.groups]

    def check(self) -> None:
        for pool in (*self.pools, *([self.snapshots] if self.snapshots else [])):
            pool.check()
        assert not self._planned, "a step's snapshots were not published"

    def _reusable(self, keys: list[bytes], tokens: Sequence[int], searchable: int | None) -> tuple[int, int]:
        """Leading pages that are there in full attention, and how many of them a sequence can go on after."""
        if not self.reuse or (self.snapshots is not None and not self.takes_snapshots):
            return 0, 0
        # At least one token is left to compute.
        most = ((len(tokens) if searchable is None else searchable) - 1) // self.page
        self._extend_keys(keys, tokens, most)
        full = [pool for pool, group in zip(self.pools, self.groups, strict=True) if not group.window]
        matched = 0
        while matched < most and all(pool.find(keys[matched]) is not None for pool in full):
            matched += 1
        count = matched // self._stride * self._stride
        while count and (shorter := self._shortened(keys, count)) != count:
            count = shorter // self._stride * self._stride
        return matched, count

    def _shortened(self, keys: Sequence[bytes], count: int) -> int:
        """`count`, if states and windows are there to go on after so many pages; or else the next one to try."""
        if self.snapshots is not None and self.snapshots.find(keys[count - 1]) is None:
            return count - 1
        for group, pool in enumerate(self.pools):
            if self.groups[group].window:
                for index in range(count - 1, self._first_page(group, count * self.page) - 1, -1):
                    if pool.find(keys[index]) is None:
                        return index  # every count above it needs this page
        return count

    def _window_pages(self, group: PageGroup, chunk: int) -> int:
        """That the rows of a chunk see, wherever in a page it begins."""
        return -(-(group.window + chunk) // self.page) + 1

    def _first_page(self, group: int, row: int) -> int:
        """The first page that a row of a sequence sees."""
        window = self.groups[group].window
        return max(0, row - window + 1) // self.page if window else 0

    def _drop(self, memory: Memory, group: int, index: int) -> None:
        table = memory.tables[group]
        if table[index] >= 0:
            self.pools[group].drop(table[index])
            table[index] = -1

    def _extend_keys(self, keys: list[bytes], tokens: Sequence[int], count: int) -> None:
        for index in range(len(keys), count):
            parent = keys[-1] if keys else b""
            content = array("q", tokens[index * self.page : (index + 1) * self.page]).tobytes()
            keys.append(hashlib.blake2b(parent + content, digest_size=16).digest())
