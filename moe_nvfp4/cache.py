"""What sequences keep between steps: pages of keys and values, and recurrent states. A slot for each sequence.

Either a slot's pages are fixed - then, where a layer sees only a window, its table repeats a ring of pages that holds
the window and the rows of one step - or pages are shared, and tables say from step to step whose they are. One slot
and one page more than asked for take the padding rows of graphs; further lines of states hold snapshots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from moe_nvfp4.kernels.delta_state import DeltaState, Heads
from moe_nvfp4.kernels.paged_kv import PagedKV
from moe_nvfp4.kernels.rows import upload

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

    @property
    def heads(self) -> Heads:
        key_heads = (self.channels - self.value_heads * self.value_dim) // (2 * self.key_dim)
        return Heads(key_heads, self.value_heads, self.key_dim, self.value_dim)

    def states(self, lines: int, dtype: torch.dtype, device: torch.device | str) -> DeltaState:
        """Of all layers: each part begins with a dimension for them."""
        return DeltaState.empty((len(self.layers), lines), self.heads, self.kernel, dtype, device)


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSettings:
    slots: int
    max_seq_len: int
    chunk: int  # most rows of one sequence in a step
    dtype: torch.dtype
    fp8: bool = False  # keys and values as E4M3
    scales: Mapping[int, tuple[float, float]] = field(default_factory=dict)  # of K and V, by layer, for fp8
    batch_invariant: bool = False  # see PagedKV

    @property
    def kv_dtype(self) -> torch.dtype:
        return torch.uint8 if self.fp8 else self.dtype


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """What a model keeps for a sequence."""

    attention: tuple[AttentionSpec, ...]
    delta: DeltaSpec | None = None

    def page_bytes(self, settings: CacheSettings, pages: Sequence[int]) -> int:
        """Of so many pages of each group of attention layers."""
        token = [2 * len(spec.layers) * spec.kv_heads * spec.head_dim for spec in self.attention]
        return sum(PAGE * settings.kv_dtype.itemsize * n * count for n, count in zip(token, pages, strict=True))

    def state_bytes(self, settings: CacheSettings) -> int:
        """Of one line of recurrent states."""
        if (delta := self.delta) is None:
            return 0
        return sum(part.nbytes for part in delta.states(1, settings.dtype, "meta"))


class SequenceCache:
    """Allocated once. `kv` and `states` go by layer, `tables` by group of attention layers."""

    def __init__(
        self,
        spec: CacheSpec,
        settings: CacheSettings,
        device: torch.device,
        *,
        shared_pages: Sequence[int] | None = None,
        snapshots: int = 0,
    ):
        """`shared_pages` of each group of attention layers; without it every slot has pages of its own."""
        self.settings, self.slots, self.spare_slot = settings, settings.slots, settings.slots
        self.kv: dict[int, PagedKV] = {}
        self.states: dict[int, DeltaState] = {}
        self.tables: list[torch.Tensor] = []
        self.first_snapshot = self.slots + 1
        self._device = device
        for group, attention in enumerate(spec.attention):
            shared = None if shared_pages is None else shared_pages[group]
            self._add_pages(attention, settings, shared)
        self._all_states: DeltaState | None = None
        if (delta := spec.delta) is not None:
            self._all_states = delta.states(self.slots + 1 + snapshots, settings.dtype, device)
            for index, layer in enumerate(delta.layers):
                self.states[layer] = DeltaState(*(part[index] for part in self._all_states))

    def _add_pages(self, spec: AttentionSpec, settings: CacheSettings, shared: int | None) -> None:
        logical = -(-settings.max_seq_len // PAGE)
        if shared is None:
            ring = spec.pages(settings)
            spare = self.slots * ring
            slot, page = torch.arange(self.slots + 1)[:, None], torch.arange(logical)[None, :]
            table = torch.where(slot < self.slots, slot * ring + page % ring, spare)
        else:
            spare = shared
            table = torch.full((self.slots + 1, logical), spare)
        self.tables.append(table.int().to(self._device))
        shape = (spare + 1, PAGE, spec.kv_heads, spec.head_dim)
        for layer in spec.layers:
            keys, values = (torch.empty(shape, dtype=settings.kv_dtype, device=self._device) for _ in range(2))
            scales = settings.scales.get(layer, (1.0, 1.0))
            self.kv[layer] = PagedKV(keys, values, self.tables[-1], *scales, settings.batch_invariant)

    def set_pages(self, changes: Sequence[tuple[int, int, int, int]]) -> None:
        """(group, slot, logical page, page), in the order of the stream."""
        for group, table in enumerate(self.tables):
            chosen = [(slot * table.shape[1] + index, page) for g, slot, index, page in changes if g == group]
            if chosen:
                places, pages = upload(list(zip(*chosen, strict=True)), self._device)
                table.view(-1).index_copy_(0, places.long(), pages)

    def copy_states(self, source: int, target: int) -> None:
        """All states of one line to another."""
        for part in self._all_states or ():
            part[:, target].copy_(part[:, source])

    @property
    def most_rows(self) -> int:
        """Of one sequence in a step."""
        return min(self.settings.chunk, self.settings.max_seq_len)

    @property
    def nbytes(self) -> int:
        pages = sum(kv.keys.nbytes + kv.values.nbytes for kv in self.kv.values())
        return pages + sum(part.nbytes for part in self._all_states or ())
