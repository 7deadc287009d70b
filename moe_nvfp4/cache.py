"""What sequences keep between steps: pages of keys and values, and recurrent states. A slot for each sequence.

A slot's pages are fixed. Where a layer sees only a window, its table repeats a ring of pages that holds the window and
the rows of one step. One slot more than asked for takes the padding rows of graphs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from moe_nvfp4.errors import RequestError
from moe_nvfp4.kernels.delta_net import DeltaState
from moe_nvfp4.kernels.paged_kv import PagedKV

PAGE = 64  # tokens: a tile of keys of the attention kernels


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Attention layers of one shape. With a window of 0 every token is kept."""

    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    window: int = 0

    def pages(self, settings: "CacheSettings") -> int:
        """Of one slot and layer."""
        every = -(-settings.max_seq_len // PAGE)
        if not self.window:
            return every
        # The window of a step's first row and the step's rows, wherever in a page they begin.
        return min(every, -(-(self.window + settings.chunk) // PAGE) + 1)


@dataclass(frozen=True, slots=True)
class DeltaSpec:
    """Gated delta nets."""

    layers: tuple[int, ...]
    channels: int
    kernel: int
    value_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSettings:
    slots: int
    max_seq_len: int
    chunk: int  # most rows of one sequence in a step
    dtype: torch.dtype
    fp8: bool = False  # keys and values as E4M3
    scales: Mapping[int, tuple[float, float]] = field(default_factory=dict)  # of K and V, by layer, for fp8

    @property
    def kv_dtype(self) -> torch.dtype:
        return torch.uint8 if self.fp8 else self.dtype


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """What a model keeps for a sequence."""

    attention: tuple[AttentionSpec, ...]
    delta: DeltaSpec | None = None

    def slot_bytes(self, settings: CacheSettings) -> int:
        return self._bytes(settings, [spec.pages(settings) for spec in self.attention])

    def bytes(self, settings: CacheSettings) -> int:
        """Of all slots, and of the spare one, which has a page for a layer."""
        return settings.slots * self.slot_bytes(settings) + self._bytes(settings, [1] * len(self.attention))

    def _bytes(self, settings: CacheSettings, pages: Sequence[int]) -> int:
        total = 0
        for spec, count in zip(self.attention, pages, strict=True):
            page = 2 * PAGE * spec.kv_heads * spec.head_dim * settings.kv_dtype.itemsize
            total += len(spec.layers) * page * count
        if delta := self.delta:
            recurrent = 4 * delta.value_heads * delta.key_dim * delta.value_dim
            total += len(delta.layers) * (recurrent + delta.kernel * delta.channels * settings.dtype.itemsize)
        return total


class SequenceCache:
    """Allocated once. `kv` and `states` go by layer."""

    def __init__(self, spec: CacheSpec, settings: CacheSettings, device: torch.device):
        self.settings, self.slots, self.spare_slot = settings, settings.slots, settings.slots
        self.kv: dict[int, PagedKV] = {}
        self.states: dict[int, DeltaState] = {}
        self._free = list(range(self.slots))[::-1]
        for attention in spec.attention:
            self._add_pages(attention, settings, device)
        if (delta := spec.delta) is not None:
            lines = self.slots + 1
            for layer in delta.layers:
                self.states[layer] = DeltaState(
                    torch.empty(lines, delta.kernel, delta.channels, dtype=settings.dtype, device=device),
                    torch.empty(lines, delta.value_heads, delta.key_dim, delta.value_dim, device=device),
                )

    def _add_pages(self, spec: AttentionSpec, settings: CacheSettings, device: torch.device) -> None:
        ring, logical = spec.pages(settings), -(-settings.max_seq_len // PAGE)
        slot, page = torch.arange(self.slots + 1)[:, None], torch.arange(logical)[None, :]
        table = slot * ring + torch.where(slot < self.slots, page % ring, 0)  # the spare slot has one page
        table = table.int().to(device)
        shape = (self.slots * ring + 1, PAGE, spec.kv_heads, spec.head_dim)
        for layer in spec.layers:
            keys, values = (torch.empty(shape, dtype=settings.kv_dtype, device=device) for _ in range(2))
            self.kv[layer] = PagedKV(keys, values, table, *settings.scales.get(layer, (1.0, 1.0)))

    @property
    def nbytes(self) -> int:
        pages = sum(kv.keys.nbytes + kv.values.nbytes for kv in self.kv.values())
        return pages + sum(state.conv.nbytes + state.recurrent.nbytes for state in self.states.values())

    @property
    def free_slots(self) -> int:
        return len(self._free)

    def acquire(self) -> int:
        if not self._free:
            raise RequestError(
                f"all {self.slots} sequences of the cache are in use; close an open stream, or raise max_batch_size"
            )
        return self._free.pop()

    def release(self, slot: int) -> None:
        assert slot not in self._free, f"slot {slot} was released twice"
        self._free.append(slot)
