"""Sums have the same bits everywhere; what is gathered lies in the order of ranks."""

from pathlib import Path

import torch
import torch.distributed as dist
from ranks import RankPool

from moe_nvfp4.routing.collectives import GroupCollectives, collectives_of, least

SIZE = 3


def exchange(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """This rank's x, and what each exchange makes of it."""
    assert dist.group.WORLD is not None
    group = collectives_of(dist.group.WORLD, torch.device("cpu"))
    assert type(group) is GroupCollectives and group.size == SIZE
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(SIZE * rows, 7, generator=generator).to(dtype)
    turned = x.T.contiguous().T  # not contiguous
    return x, group.all_reduce(turned.clone()), group.all_gather(turned), group.reduce_scatter(turned.clone())


def smallest() -> int:
    assert dist.group.WORLD is not None
    return least(5 - dist.get_rank(), dist.group.WORLD, torch.device("cpu"))


def test_exchanges(tmp_path: Path) -> None:
    pool = RankPool(SIZE, tmp_path)
    try:
        for rows, dtype in ((1, torch.float32), (50, torch.float32), (0, torch.float32), (4, torch.bfloat16)):
            results, near = pool.run(exchange, rows, dtype), 1e-5 if dtype == torch.float32 else 3e-2
            total = torch.stack([x.double() for x, *_ in results]).sum(0)
            for rank, (_, reduced, gathered, scattered) in enumerate(results):
                own = slice(rank * rows, (rank + 1) * rows)
                assert torch.equal(reduced, results[0][1])
                assert torch.allclose(reduced.double(), total, rtol=near, atol=near)
                assert torch.allclose(scattered.double(), total[own], rtol=near, atol=near)
                assert torch.equal(gathered, torch.cat([x for x, *_ in results]))
        assert pool.run(smallest) == [3] * SIZE
    finally:
        pool.close()
