"""Which way an exchange goes: whole or in parts through inboxes, or to the library. The ranks are processes, their
kernels interpreted."""

from typing import Any

import pytest
import torch
from interpreted import INTERPRETED, run_interpreted
from peers import from_peers

from moe_nvfp4.kernels.exchange import Inboxes
from moe_nvfp4.routing import collectives
from moe_nvfp4.routing.collectives import INBOX_BYTES, GroupCollectives, InboxCollectives, bytes_at_once

SIZE, CAPACITY = 3, 2000  # words
WHOLE = 1000  # bytes of a sum; more is added up in parts
COLUMNS = (100, 248, 250, 1500, 2998, 4500)  # float32; 250 and 2998 are no multiple of three


class Group(InboxCollectives):
    """Without processes that know each other."""

    def __init__(self, inboxes: Inboxes):
        self.size, self._inboxes, self._once = SIZE, inboxes, WHOLE


def given(rank: int, columns: int) -> torch.Tensor:
    return torch.randn(1, columns, generator=torch.Generator().manual_seed(columns + rank))


def _rank(inboxes: Inboxes, results: Any) -> None:
    ways: list[str] = []
    for name in ("sum_over_peers", "scatter_sum_over_peers", "gather_from_peers"):
        function = getattr(collectives, name)
        setattr(collectives, name, lambda x, boxes, f=function, n=name: (ways.append(n.split("_")[0]), f(x, boxes))[1])
    GroupCollectives.all_reduce = lambda self, x: (ways.append("library"), x)[1]  # type: ignore[method-assign]
    group = Group(inboxes)
    for columns in COLUMNS:
        found = group.all_reduce(given(inboxes.rank, columns))
        results.put((columns, list(ways), found.numpy()))
        ways.clear()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs here already")
def test_ways_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_interpreted() -> None:
    ways: dict[int, list[str]] = {}
    for columns, way, found in from_peers(_rank, SIZE, CAPACITY, SIZE * len(COLUMNS)):
        assert ways.setdefault(columns, way) == way, "ranks went different ways"
        if way != ["library"]:
            wanted = sum((given(rank, columns) for rank in range(SIZE)), start=torch.zeros(1, columns))
            assert torch.equal(torch.from_numpy(found), wanted), (columns, way)
    parts = ["scatter", "gather"]
    assert ways == {100: ["sum"], 248: ["sum"], 250: ["sum"], 1500: parts, 2998: ["library"], 4500: parts}


def test_what_is_exchanged_whole() -> None:
    """Parts spare two ranks nothing; the more ranks, the smaller the sum from which on they do."""
    assert bytes_at_once(2) == INBOX_BYTES
    assert INBOX_BYTES > bytes_at_once(3) > bytes_at_once(4) > bytes_at_once(8) > 32 << 10
