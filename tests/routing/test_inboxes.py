"""Which way an exchange goes: whole or in parts through inboxes, or to the library. The ranks are processes, their
kernels interpreted."""

from typing import Any

import pytest
import torch
from interpreted import INTERPRETED, run_interpreted
from torch import multiprocessing

from moe_nvfp4.kernels.exchange import Inboxes
from moe_nvfp4.routing import collectives
from moe_nvfp4.routing.collectives import INBOX_BYTES, GroupCollectives, InboxCollectives, bytes_at_once

SIZE, CAPACITY = 3, 2000  # words
WHOLE = 1000  # bytes of a sum; more is added up in parts
COLUMNS = (100, 248, 250, 1500, 2998, 4500)  # float32; 250 and 2998 are no multiple of three


class Group(InboxCollectives):
    """Without processes that know each other."""

    def __init__(self, rank: int, memory: torch.Tensor):
        self.size = SIZE
        self._inboxes = Inboxes.at([part.data_ptr() for part in memory], rank, CAPACITY, torch.device("cpu"))
        self._once = WHOLE


def given(rank: int, columns: int) -> torch.Tensor:
    return torch.randn(1, columns, generator=torch.Generator().manual_seed(columns + rank))


def _rank(rank: int, memory: torch.Tensor, results: Any) -> None:
    ways: list[str] = []
    for name in ("sum_over_peers", "scatter_sum_over_peers", "gather_from_peers"):
        function = getattr(collectives, name)
        setattr(collectives, name, lambda x, boxes, f=function, n=name: (ways.append(n.split("_")[0]), f(x, boxes))[1])
    GroupCollectives.all_reduce = lambda self, x: (ways.append("library"), x)[1]  # type: ignore[method-assign]
    group = Group(rank, memory)
    for columns in COLUMNS:
        found = group.all_reduce(given(rank, columns))
        results.put((columns, list(ways), found.numpy()))
        ways.clear()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs here already")
def test_ways_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_interpreted() -> None:
    torch.set_num_threads(1)
    memory = torch.zeros(SIZE, Inboxes.nbytes(SIZE, CAPACITY) // 8, dtype=torch.int64).share_memory_()
    context = multiprocessing.get_context("fork")  # which keeps the addresses
    results = context.SimpleQueue()
    processes = [context.Process(target=_rank, args=(rank, memory, results), daemon=True) for rank in range(SIZE)]
    for process in processes:
        process.start()
    ways: dict[int, list[str]] = {}
    for _ in range(SIZE * len(COLUMNS)):
        columns, way, found = results.get()
        assert ways.setdefault(columns, way) == way, "ranks went different ways"
        if way != ["library"]:
            wanted = sum((given(rank, columns) for rank in range(SIZE)), start=torch.zeros(1, columns))
            assert torch.equal(torch.from_numpy(found), wanted), (columns, way)
    for process in processes:
        process.join(10)
        assert process.exitcode == 0
    parts = ["scatter", "gather"]
    assert ways == {100: ["sum"], 248: ["sum"], 250: ["sum"], 1500: parts, 2998: ["library"], 4500: parts}


def test_what_is_exchanged_whole() -> None:
    """Parts spare two ranks nothing; the more ranks, the smaller the sum from which on they do."""
    assert bytes_at_once(2) == INBOX_BYTES
    assert INBOX_BYTES > bytes_at_once(3) > bytes_at_once(4) > bytes_at_once(8) > 32 << 10
