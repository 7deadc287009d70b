"""Exchanges through inboxes: ranks that are processes in the interpreter, and streams of one GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpreted import INTERPRETED, run_interpreted
from peers import from_peers

from moe_nvfp4.kernels.exchange import Inboxes, gather_from_peers, scatter_sum_over_peers, sum_over_peers, takes

SIZE, CAPACITY = 3, 1500  # words: six programs
# Rows and columns in one order on all ranks; programs have as many rounds as words have come to them.
CALLS: list[tuple[Callable[[torch.Tensor, Inboxes], torch.Tensor], int, int, torch.dtype]] = [
    (sum_over_peers, 1, 2, torch.bfloat16),
    (gather_from_peers, 5, 600, torch.uint8),
    (sum_over_peers, 3, 1000, torch.bfloat16),
    (sum_over_peers, 1, 7, torch.float32),
    (scatter_sum_over_peers, 6, 514, torch.bfloat16),
    (gather_from_peers, 1, 8, torch.int64),
    (scatter_sum_over_peers, 3, 1500, torch.float32),
    (sum_over_peers, 2, 750, torch.float32),
]


def given(rank: int, call: int, repeat: int, size: int) -> torch.Tensor:
    _, rows, columns, dtype = CALLS[call]
    generator = torch.Generator().manual_seed(1000 * repeat + 100 * call + rank)
    rows = rows // SIZE * size if CALLS[call][0] is scatter_sum_over_peers else rows
    if dtype.is_floating_point:
        return torch.randn(rows, columns, generator=generator).to(dtype)
    return torch.randint(0, 256, (rows, columns), generator=generator).to(dtype)


def expected(rank: int, call: int, repeat: int, size: int) -> torch.Tensor:
    xs = [given(source, call, repeat, size) for source in range(size)]
    if CALLS[call][0] is gather_from_peers:
        return torch.cat(xs)
    total = sum((x.float() for x in xs), start=torch.zeros_like(xs[0], dtype=torch.float32)).to(xs[0].dtype)
    return total if CALLS[call][0] is sum_over_peers else total.chunk(size)[rank]


def _rank(inboxes: Inboxes, results: Any) -> None:
    rank = inboxes.rank
    for repeat in range(3):  # each half is used again
        for call, (function, *_) in enumerate(CALLS):
            found = function(given(rank, call, repeat, SIZE), inboxes)
            results.put((rank, call, repeat, found.double().numpy()))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs here already")
def test_kernel_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_interpreted() -> None:
    for rank, call, repeat, found in from_peers(_rank, SIZE, CAPACITY, SIZE * 3 * len(CALLS)):
        wanted, near = expected(rank, call, repeat, SIZE).double(), 2**-7 * (CALLS[call][3] == torch.bfloat16)
        assert torch.allclose(torch.from_numpy(found), wanted, rtol=near, atol=0)  # bfloat16 is cut there, not rounded


def test_what_is_taken() -> None:
    inboxes = Inboxes.at([0] * SIZE, 0, CAPACITY, torch.device("cpu"))
    assert takes(torch.empty(2, 1500, dtype=torch.bfloat16), inboxes)
    assert not takes(torch.empty(2, 1501, dtype=torch.bfloat16), inboxes)
    assert not takes(torch.empty(1, 3, dtype=torch.bfloat16), inboxes)
    assert not takes(torch.empty(0, 4), inboxes)
    assert not takes(torch.empty(4, 4).T, inboxes)
    assert takes(torch.empty(SIZE, 1500), inboxes, parts=SIZE)
    assert not takes(torch.empty(1, 4), inboxes, parts=SIZE)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 4])
def test_gpu(size: int) -> None:
    """The ranks are streams of one GPU, each launched before the next one."""
    device = torch.device("cuda")
    memory = torch.zeros(size, Inboxes.nbytes(size, CAPACITY) // 8, dtype=torch.int64, device=device)
    inboxes = [Inboxes.at([part.data_ptr() for part in memory], r, CAPACITY, device) for r in range(size)]
    streams = [torch.cuda.Stream() for _ in range(size)]
    repeats = 20
    xs = {
        (rank, call, repeat): given(rank, call, repeat, size).to(device)
        for rank in range(size) for call in range(len(CALLS)) for repeat in range(repeats)
    }  # fmt: skip
    found = {}

    def launch(rank: int, call: int, repeat: int) -> None:
        with torch.cuda.stream(streams[rank]):
            found[rank, call, repeat] = CALLS[call][0](xs[rank, call, repeat], inboxes[rank])

    torch.cuda.synchronize()
    for call in range(len(CALLS)):  # kernels are not loaded while others wait
        for rank in range(size):
            launch(rank, call, 0)
        torch.cuda.synchronize()
    for rank in range(size):
        for repeat in range(1, repeats):
            for call in range(len(CALLS)):
                launch(rank, call, repeat)
    torch.cuda.synchronize()
    for (rank, call, repeat), out in found.items():
        assert torch.equal(out.cpu(), expected(rank, call, repeat, size)), (rank, call, repeat)
