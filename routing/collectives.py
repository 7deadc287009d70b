"""Sums and exchanges between the ranks of a group: gloo on CPUs, on GPUs NCCL and, for sums, symmetric memory.

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

# Up to here all-reduces go through symmetric memory: up to 256 rows of 8192 bytes, what a decode step has. Beyond it
# NCCL, which keeps more of the links busy.
SYMMETRIC_BYTES: Final = 2 << 20
# A rank reads size - 1 times the bytes in one shot, and 2 - 2 / size times in two, with one barrier more, some 3 us, in
# which a link of 450 GB/s moves 1.3 MB. Arithmetic, not measured. Other sizes than these add up in an order that
# depends on the rank when they do it in one shot.
ONE_SHOT_BYTES: Final = {2: SYMMETRIC_BYTES, 4: 768 << 10, 8: 192 << 10}


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


class SymmetricCollectives(GroupCollectives):
    """Small sums read the other GPUs' memory over NVLink: a few us where NCCL takes some ten. No multicast."""

    def __init__(self, group: dist.ProcessGroup, buffer: torch.Tensor):
        """`buffer`: symmetric memory, SYMMETRIC_BYTES of it."""
        super().__init__(group)
        self._buffer = buffer

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        nbytes = x.nbytes
        # The kernels add float32 and bfloat16, in vectors of 16 bytes.
        if nbytes > SYMMETRIC_BYTES or nbytes % 16 or x.dtype not in (torch.float32, torch.bfloat16) or not nbytes:
            return super().all_reduce(x)
        x, name, ops = x.contiguous(), self.group.group_name, torch.ops.symm_mem
        shared, out = self._buffer[:nbytes].view(x.dtype).view(x.shape), torch.empty_like(x)
        if nbytes <= ONE_SHOT_BYTES.get(self.size, 0):
            ops.one_shot_all_reduce_copy_out(shared, x, "sum", name, out)
        else:
            shared.copy_(x)
            ops.two_shot_all_reduce_out(shared, "sum", name, out)
        return out


def collectives_of(group: dist.ProcessGroup, device: torch.device, *, symmetric: bool = True) -> GroupCollectives:
    """What is best for the group. All ranks call it together."""
    if device.type != "cuda" or group.size() == 1:
        return GroupCollectives(group)
    buffer = _symmetric_buffer(group, device) if symmetric and _on_one_host(group, device) else None
    works = buffer is not None and _adds_up(SymmetricCollectives(group, buffer), device)
    if not _all_agree(works, group, device):
        if symmetric and group.rank() == 0:
            warnings.warn("symmetric memory cannot be had between these GPUs; all sums go through NCCL", stacklevel=2)
        return GroupCollectives(group)
    assert buffer is not None
    return SymmetricCollectives(group, buffer)


def least(value: int, group: dist.ProcessGroup, device: torch.device) -> int:
    """The smallest of all ranks' values."""
    smallest = torch.tensor([value], dtype=torch.int64, device=device)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=group)
    return int(smallest)


def _on_one_host(group: dist.ProcessGroup, device: torch.device) -> bool:
    name = zlib.crc32(socket.gethostname().encode())
    return least(name, group, device) == -least(-name, group, device)


def _symmetric_buffer(group: dist.ProcessGroup, device: torch.device) -> torch.Tensor | None:
    # Read by torch when it first maps memory: multicast is not used, and each process may see its GPU as number 0.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    try:
        import torch.distributed._symmetric_memory as symmetric_memory

        empty: Callable[..., torch.Tensor] = symmetric_memory.empty
        rendezvous: Callable[..., Any] = symmetric_memory.rendezvous
        buffer = empty(SYMMETRIC_BYTES, dtype=torch.uint8, device=device)
        rendezvous(buffer, group=group.group_name)
    except (ImportError, RuntimeError):
        return None
    return buffer


def _adds_up(collectives: SymmetricCollectives, device: torch.device) -> bool:
    """Both ways to add, tried once before a graph relies on them."""
    size, rank = collectives.size, collectives.group.rank()
    try:
        for count in (1024, SYMMETRIC_BYTES // 4):
            x = torch.full((count,), float(rank + 1), device=device)
            if not bool((collectives.all_reduce(x) == size * (size + 1) / 2).all()):
                return False
    except (AttributeError, RuntimeError):  # a torch without these operations, or GPUs that cannot run them
        return False
    return True


def _all_agree(flag: bool, group: dist.ProcessGroup, device: torch.device) -> bool:
    return least(int(flag), group, device) == 1
