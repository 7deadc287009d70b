"""Ranks that are processes of one machine and share their inboxes, for kernels in triton's interpreter."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import multiprocessing

from moe_nvfp4.kernels.exchange import Inboxes


def from_peers(run: Callable[[Inboxes, Any], None], size: int, capacity: int, count: int) -> Iterator[Any]:
    """So many results in all, as ranks put them into the queue that `run` gets. Each has to end well."""
    torch.set_num_threads(1)
    memory = torch.zeros(size, Inboxes.nbytes(size, capacity) // 8, dtype=torch.int64).share_memory_()
    addresses, context = [part.data_ptr() for part in memory], multiprocessing.get_context("fork")  # which keeps them
    results, processes = context.SimpleQueue(), []
    for rank in range(size):
        inboxes = Inboxes.at(addresses, rank, capacity, torch.device("cpu"))
        processes.append(context.Process(target=run, args=(inboxes, results), daemon=True))
        processes[-1].start()
    for _ in range(count):
        yield results.get()
    for process in processes:
        process.join(10)
        assert process.exitcode == 0
