"""Memory planned in closed form from the config and the tensors present, before anything is allocated."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from moe_nvfp4.cache import CacheSettings, CacheSpec
from moe_nvfp4.dense_weights import dense_bytes
from moe_nvfp4.errors import MemoryPlanError
from moe_nvfp4.expert_buffers import expert_bytes
from moe_nvfp4.routing.placement import Placement
from moe_nvfp4.sharding import Cut, sharded_sources
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
    snapshots: int  # of recurrent states, for the reuse of prefixes
    full_sequences: int  # of max_seq_len tokens, for which there are pages; 0: not even for one
    pages: Sequence[int]  # of each group of attention layers
    whole_dense: int  # while they are loaded, before a rank lets go of what others keep

    @property
    def total(self) -> int:
        return self.experts + self.dense + self.cache + self.workspace

    def table(self) -> str:
        cache = f"{self.max_batch_size} sequences, pages for {self.full_sequences} of {self.max_seq_len:,} tokens"
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
        if self.total <= budget and self.experts + self.whole_dense <= budget:
            if self.full_sequences:
                return
            raise MemoryPlanError(
                f"another rank has no room for one sequence of {self.max_seq_len:,} tokens; its own message says more"
            )
        fixed = self.experts + self.dense + self.workspace
        raise MemoryPlanError(
            f"{self.device}: {_size(budget)} can be used, and there is no room for one sequence of "
            f"{self.max_seq_len:,} tokens beside weights and workspace ({_size(fixed)}):\n{self.table()}\n"
            "Lower max_seq_len or max_batch_size, or use a device with more memory."
        )


def plan_memory(
    found: Survey,
    placement: Placement,
    rank: int,
    *,
    device: torch.device,
    cache: CacheSpec,
    settings: CacheSettings,
    snapshots: int,
    workspace: int,
    cuts: Mapping[str, Cut] | None = None,
    agree: Callable[[int], int] | None = None,
) -> MemoryPlan:
    """Pages for every slot at full length, or for as many as there is room for. `cuts`: of dense weights the rank keeps
    only so much, after they have been loaded whole. `agree`: from the number of sequences that this rank has room for
    to the one that all ranks plan with."""
    experts = sum(expert_bytes(b) * len(placement.local(b.layer, rank)) for b in found.layout.experts)
    dense = sum(dense_bytes(source, settings.dtype) for source in sharded_sources(found.dense, cuts or {}))
    whole = sum(dense_bytes(source, settings.dtype) for source in found.dense.values())
    available = available_bytes(device)
    each = [spec.pages(settings) for spec in cache.attention]
    spare = cache.page_bytes(settings, [1] * len(each))
    fixed = spare + (settings.slots + 1 + snapshots) * cache.state_bytes(settings)
    room = int(available * (1 - RESERVE)) - experts - dense - workspace - fixed
    sequences = max(0, min(settings.slots, room // max(1, cache.page_bytes(settings, each))))
    if agree is not None:
        sequences = agree(sequences)
    pages = [count * max(1, sequences) for count in each]
    return MemoryPlan(
        device=str(device),
        experts=experts,
        dense=dense,
        cache=fixed + cache.page_bytes(settings, pages),
        workspace=workspace,
        available=available,
        max_batch_size=settings.slots,
        max_seq_len=settings.max_seq_len,
        snapshots=snapshots,
        full_sequences=sequences,
        pages=pages,
        whole_dense=whole,
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
