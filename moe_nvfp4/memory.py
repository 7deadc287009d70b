"""Memory planned in closed form from the config and the tensors present, before anything is allocated."""

import os
from dataclasses import dataclass

import torch

from moe_nvfp4.cache import CacheSettings, CacheSpec
from moe_nvfp4.dense_weights import dense_bytes
from moe_nvfp4.errors import MemoryPlanError
from moe_nvfp4.expert_buffers import expert_bytes
from moe_nvfp4.routing.placement import Placement
from moe_nvfp4.survey import Survey

RESERVE = 0.03  # of what is free: fragmentation, and what the driver and the libraries take


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    device: str
    experts: int
    dense: int
    cache: int
    workspace: int
    available: int
    max_batch_size: int
    max_seq_len: int
    sequence_bytes: int  # cache of one slot

    @property
    def total(self) -> int:
        return self.experts + self.dense + self.cache + self.workspace

    def table(self) -> str:
        cache = f"{self.max_batch_size} sequences of {self.max_seq_len:,} tokens"
        rows = [
            ("expert buffers", self.experts, ""),
            ("dense weights", self.dense, ""),
            ("cache", self.cache, cache),
            ("workspace", self.workspace, ""),
            ("planned", self.total, ""),
            ("free", self.available, f"on {self.device}"),
        ]
        return "\n".join(f"  {name:<15}{_size(nbytes):>12}  {note}".rstrip() for name, nbytes, note in rows)

    def require_fit(self) -> None:
        budget = int(self.available * (1 - RESERVE))
        if self.total <= budget:
            return
        fixed = self.experts + self.dense + self.workspace
        fitting = max(0, (budget - fixed) // max(self.sequence_bytes, 1))
        remedy = (
            f"Lower max_batch_size to {fitting} or less, or max_seq_len."
            if fitting
            else "Lower max_seq_len, or use a device with more memory: weights and workspace alone take "
            f"{_size(fixed)}."
        )
        raise MemoryPlanError(
            f"{self.device}: the plan needs {_size(self.total)} and {_size(budget)} can be used:\n"
            f"{self.table()}\n{remedy}"
        )


def plan_memory(
    found: Survey,
    placement: Placement,
    rank: int,
    *,
    device: torch.device,
    cache: CacheSpec,
    settings: CacheSettings,
    workspace: int,
) -> MemoryPlan:
    return MemoryPlan(
        device=str(device),
        experts=sum(expert_bytes(b) * len(placement.local(b.layer, rank)) for b in found.layout.experts),
        dense=sum(dense_bytes(source, settings.dtype) for source in found.dense.values()),
        cache=cache.bytes(settings),
        workspace=workspace,
        available=available_bytes(device),
        max_batch_size=settings.slots,
        max_seq_len=settings.max_seq_len,
        sequence_bytes=cache.slot_bytes(settings),
    )


def available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.3f} GB" if nbytes >= 1e7 else f"{nbytes / 1e6:,.3f} MB"
