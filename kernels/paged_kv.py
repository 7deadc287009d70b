"""Keys and values in pages: position p of a slot's sequence lies in page table[slot, p // page], at place p % page.

A layer with a sliding window repeats its pages in the table as a ring, long enough that nothing inside the window of
any row of a step is overwritten by that step. FP8 pages hold E4M3 bits in uint8, and a value is bits * scale: sm_80
and sm_86 have no FP8 types.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_nvfp4.kernels.nvfp4 import decode_e4m3, encode_e4m3


class PagedKV(NamedTuple):
    keys: Tensor  # [pages, page, G, D], the dtype of activations, or uint8
    values: Tensor  # the same
    table: Tensor  # int32 [slots, logical pages]
    k_scale: float = 1.0
    v_scale: float = 1.0

    @property
    def page(self) -> int:
        return self.keys.shape[1]

    @property
    def is_fp8(self) -> bool:
        return self.keys.dtype == torch.uint8


def store_twin(kv: PagedKV, positions_T: Tensor, row_slots_T: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> None:
    pages = kv.table[row_slots_T.long(), positions_T.long() // kv.page].long()
    places = positions_T.long() % kv.page
    for target, rows, scale in ((kv.keys, k_TGD, kv.k_scale), (kv.values, v_TGD, kv.v_scale)):
        target[pages, places] = encode_e4m3(rows.float() / scale) if kv.is_fp8 else rows.to(target.dtype)


def gather_twin(kv: PagedKV, slot: int, first: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """K and V [S, G, D] of the positions `first` to `length` of a slot."""
    positions = torch.arange(first, length, device=kv.table.device)
    pages, places = kv.table[slot, positions // kv.page].long(), positions % kv.page
    keys, values = kv.keys[pages, places], kv.values[pages, places]
    if kv.is_fp8:
        keys, values = decode_e4m3(keys) * kv.k_scale, decode_e4m3(values) * kv.v_scale
    return keys.to(dtype), values.to(dtype)
