"""Sums and exchanges between the ranks of a group: gloo on CPUs, NCCL on GPUs and, for what is small, inboxes in each
other's memory (kernels/exchange.py).

A sum has the same bits on every rank, or ranks that sample from it would not agree. Ring and tree sums of gloo and NCCL
have one order for each element, and one rank computes it or all do in that order.
"""

import os
import socket
import warnings
import zlib
from collections.abc import Callable
from typing import Any, Final, Protocol

import torch
import torch.distributed as dist

from moe_nvfp4.kernels.exchange import (
    ADDED,
    Inboxes,
    gather_from_peers,
    scatter_sum_over_peers,
    sum_over_peers,
    takes,
)

# Up to here sums are exchanged through inboxes: 256 rows of 8192 bytes, more than decode steps have. Beyond it NCCL,
# which moves each byte once.
INBOX_BYTES: Final = 2 << 20
# A rank writes 2 (size - 1) times the bytes of a sum at once, and 2 / size of that when each rank adds up its part and
# all gather the parts. That is a launch more, some 3 us, in which a link of 450 GB/s moves 1.3 MB (arithmetic).
LAUNCH_BYTES: Final = 1_300_000


# torch 2.13 renamed them and warns of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Collectives(Protocol):
    """All ranks call the same methods in the same order, with equal shapes. All of them may be captured in a graph."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, the same bits on each; may overwrite x."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """All ranks' x, one below the other: [size * n, ...]."""

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """Of the sum over ranks this rank's part: [n / size, ...]."""


class GroupCollectives:
    """torch.distributed as it is."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.size = group, group.size()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        _all_gather(out, x.contiguous(), group=self.group)
        return out

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        _reduce_scatter(out, x.contiguous(), group=self.group)
        return out


class InboxCollectives(GroupCollectives):
    """Small exchanges are writes into the other GPUs' memory: a few us where NCCL takes some ten."""

    def __init__(self, group: dist.ProcessGroup, inboxes: Inboxes, memory: torch.Tensor):
        """`memory`: this rank's inbox, which lives as long as this object."""
        super().__init__(group)
        self._inboxes, self._memory, self._once = inboxes, memory, bytes_at_once(self.size)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        if x.dtype in ADDED:
            if x.nbytes <= self._once and takes(x, self._inboxes):
                return sum_over_peers(x, self._inboxes)
            flat = x.view(-1)
            if flat.numel() % self.size == 0 and takes(flat, self._inboxes, parts=self.size):
                part = scatter_sum_over_peers(flat, self._inboxes)
                return gather_from_peers(part, self._inboxes).view(x.shape)
        return super().all_reduce(x)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        return gather_from_peers(x, self._inboxes) if takes(x, self._inboxes) else super().all_gather(x)

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        if x.dtype in ADDED and takes(x, self._inboxes, parts=self.size):
            return scatter_sum_over_peers(x, self._inboxes)
        return super().reduce_scatter(x)


def bytes_at_once(size: int) -> int:
    """Largest sum that is exchanged whole."""
    spared = 2 * (size - 1) * (1 - 2 / size)  # bytes that parts would spare, of each byte of the sum
    return INBOX_BYTES if spared == 0 else min(INBOX_BYTES, int(LAUNCH_BYTES / spared))


def collectives_of(group: dist.ProcessGroup, device: torch.device, *, symmetric: bool = True) -> GroupCollectives:
    """What is best for the group. All ranks call it together."""
    if device.type != "cuda" or group.size() == 1:
        return GroupCollectives(group)
    inboxes = _inboxes(group, device) if symmetric and _on_one_host(group, device) else None
    # Who has none must not leave the others waiting; and before the first word all inboxes are empty.
    there = _all_agree(inboxes is not None, group, device)
    if inboxes is None or not there or not _all_agree(_works(inboxes, device), group, device):
        if symmetric and group.rank() == 0:
            warnings.warn("symmetric memory cannot be had between these GPUs; all sums go through NCCL", stacklevel=2)
        return GroupCollectives(group)
    return inboxes


def least(value: int, group: dist.ProcessGroup, device: torch.device) -> int:
    """The smallest of all ranks' values."""
    smallest = torch.tensor([value], dtype=torch.int64, device=device)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=group)
    return int(smallest)


def _on_one_host(group: dist.ProcessGroup, device: torch.device) -> bool:
    name = zlib.crc32(socket.gethostname().encode())
    return least(name, group, device) == -least(-name, group, device)


def _inboxes(group: dist.ProcessGroup, device: torch.device) -> InboxCollectives | None:
    """None where this rank cannot map the others' memory; `_all_agree` settles what all do."""
    # Read by torch when it first maps memory: multicast is not used, and each process may see its GPU as number 0.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    size = group.size()
    capacity = max(bytes_at_once(size), INBOX_BYTES // size) // 4
    try:
        import torch.distributed._symmetric_memory as symmetric_memory

        empty: Callable[..., torch.Tensor] = symmetric_memory.empty
        rendezvous: Callable[..., Any] = symmetric_memory.rendezvous
        memory = empty(Inboxes.nbytes(size, capacity), dtype=torch.uint8, device=device)
        memory.zero_()
        handle = rendezvous(memory, group=group.group_name)
        addresses = [handle.get_buffer(rank, (1,), torch.int64).data_ptr() for rank in range(size)]
    except (ImportError, RuntimeError):
        return None
    return InboxCollectives(group, Inboxes.at(addresses, group.rank(), capacity, device), memory)


def _works(collectives: InboxCollectives, device: torch.device) -> bool:
    """Each exchange, tried once before a graph relies on it."""
    size, rank = collectives.size, collectives.group.rank()
    try:
        for count in (size, 1024 * size):
            x = torch.full((count,), float(rank + 1), device=device)
            total = size * (size + 1) / 2
            added, scattered = collectives.all_reduce(x.clone()), collectives.reduce_scatter(x)
            gathered = collectives.all_gather(x).view(size, count)
            wanted = torch.arange(1, size + 1, device=device)[:, None]
            if not bool((added == total).all() & (scattered == total).all() & (gathered == wanted).all()):
                return False
    except RuntimeError:  # GPUs that cannot do it
        return False
    return True


def _all_agree(flag: bool, group: dist.ProcessGroup, device: torch.device) -> bool:
    return least(int(flag), group, device) == 1
