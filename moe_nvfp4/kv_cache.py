"""Keys and values of every sequence: one slot of `max_seq_len` tokens for each."""

import torch

from moe_nvfp4.batch import Batch, Span
from moe_nvfp4.errors import RequestError


class KVCache:
    """Per attention layer K and V of shape [slots, max_seq_len, kv heads, head_dim], allocated once."""

    def __init__(
        self,
        layers: int,
        slots: int,
        max_seq_len: int,
        heads: int,
        head_dim: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ):
        shape = (slots, max_seq_len, heads, head_dim)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.max_seq_len, self.slots = max_seq_len, slots
        self._free = list(range(slots))[::-1]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

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

    def append(self, layer: int, batch: Batch, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> None:
        for span in batch.spans:
            self.keys[layer][span.slot, span.start : span.length] = k_TGD[span.begin : span.end]
            self.values[layer][span.slot, span.start : span.length] = v_TGD[span.begin : span.end]

    def read(self, layer: int, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [S, G, D] of a sequence up to and including this step."""
        return self.keys[layer][span.slot, : span.length], self.values[layer][span.slot, : span.length]
