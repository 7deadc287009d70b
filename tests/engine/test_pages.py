"""Pages: one state each, content found under its key as long as nobody else has the page, least recently used first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_nvfp4.engine.pages import PagePool


@given(st.integers(1, 6), st.lists(st.tuples(st.sampled_from(["take", "find", "drop", "keep"]), st.integers(0, 30))))
def test_random_use(count: int, operations: list[tuple[str, int]]) -> None:
    """Beside a plain list of holds and a map of what was written to each page."""
    pool, holds, content = PagePool(count), [], {}
    for operation, number in operations:
        key = bytes([number % 7])
        if operation == "take" and pool.available:
            page = pool.take()
            assert page not in holds
            content[page] = None
            holds.append(page)
        elif operation == "find" and (found := pool.find(key)) is not None:
            assert content[found] == key
            pool.hold(found)
            holds.append(found)
        elif operation == "drop" and holds:
            pool.drop(holds.pop(number % len(holds)), first_to_go=number % 2 == 0)
        elif operation == "keep" and holds and content[page := holds[number % len(holds)]] in (None, key):
            content[page] = key
            pool.keep(page, key)
        pool.check()
        assert pool.held == len(set(holds)) == count - pool.available
        for known in (bytes([n]) for n in range(7)):
            assert pool.holds(known) == (pool.find(known) in holds)


def kept(pool: PagePool, *keys: bytes) -> list[int]:
    pages = [pool.take() for _ in keys]
    for page, key in zip(pages, keys, strict=True):
        pool.keep(page, key)
    return pages


def test_the_least_recently_used_goes_first() -> None:
    pool = PagePool(3)
    for page in kept(pool, b"a", b"b", b"c"):
        pool.drop(page)
    first = pool.find(b"a")
    assert first is not None
    pool.hold(first)
    pool.drop(first)
    pool.take()
    assert [pool.find(key) is None for key in (b"a", b"b", b"c")] == [False, True, False]


def test_first_to_go() -> None:
    pool = PagePool(2)
    a, b = kept(pool, b"a", b"b")
    pool.drop(a)
    pool.drop(b, first_to_go=True)
    pool.take()
    assert pool.find(b"b") is None and pool.find(b"a") == a


def test_free_pages_are_taken_before_kept_ones() -> None:
    pool = PagePool(2)
    (page,) = kept(pool, b"a")
    pool.drop(page)
    assert pool.take() != page and pool.find(b"a") == page


def test_of_equal_pages_the_first_is_kept() -> None:
    pool = PagePool(2)
    first, second = kept(pool, b"a", b"a")
    assert pool.find(b"a") == first
    pool.drop(second)
    assert pool.available == 1 and pool.take() == second


def test_mistakes() -> None:
    pool = PagePool(1)
    with pytest.raises(AssertionError, match="cannot be held"):
        pool.hold(0)
    pool.drop(pool.take())
    with pytest.raises(AssertionError, match="more often than held"):
        pool.drop(0)
