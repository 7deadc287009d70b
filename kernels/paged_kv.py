"""Keys and values in pages: position p of a slot's sequence lies in page table[slot, p // page], at place p % page.

A layer with a sliding window repeats its pages in the table as a ring, long enough that nothing inside the window of
any row of a step is overwritten by that step. FP8 pages hold E4M3 bits in uint8, and a value is bits * scale: sm_80
and sm_86 have no FP8 types.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_nvfp4.kernels.nvfp4 import decode_e4m3, encode_e4m3


class PagedKV(NamedTuple):
    keys: Tensor  # [pages, page, G, D], the dtype of activations, or uint8
    values: Tensor  # the same
    table: Tensor  # int32 [slots, logical pages]
    k_scale: float = 1.0
    v_scale: float = 1.0
    batch_invariant: bool = False  # kernels are cut by a sequence's own length, and not by how many rows there are

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


@triton.jit
def page_of(row_ptr, t, live, PAGE: tl.constexpr):
    """The pages of a sequence's positions t; row_ptr is its line of the table."""
    return tl.load(row_ptr + t // PAGE, mask=live, other=0)


@triton.jit
def place_of(page, t, head, PAGE: tl.constexpr, G: tl.constexpr, D: tl.constexpr):
    """Where in `keys` and `values` the positions t begin, for one head."""
    return (page.to(tl.int64) * PAGE + t % PAGE) * (G * D) + head * D


@triton.jit
def operand(x, KIND: tl.constexpr):
    """Loaded keys or values as operands of a product: E4M3 bits without their scale, exact also in bfloat16."""
    if x.dtype != tl.uint8:
        return x.to(KIND)
    elif KIND.primitive_bitwidth == 16:
        # E4M3 bits where bfloat16 keeps exponent and mantissa are 2^-120 of the value, subnormals included. Four bytes
        # in ten instructions: at full bandwidth there is time for about six a byte.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, s, t, u, z;
            mov.b32 u, 0x7B807B80; mov.b32 z, 0x80008000;
            prmt.b32 a, $2, 0, 0x1404; prmt.b32 b, $2, 0, 0x3424;
            shr.u32 s, a, 4; and.b32 s, s, 0x07F007F0; and.b32 a, a, z; or.b32 a, a, s;
            shr.u32 t, b, 4; and.b32 t, t, 0x07F007F0; and.b32 b, b, z; or.b32 b, b, t;
            fma.rn.bf16x2 $0, a, u, z; fma.rn.bf16x2 $1, b, u, z;
            }""",
            "=r,=r,r",
            [x],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    else:
        moved = (x.to(tl.int32) << 24) >> 4
        return (moved & -0x78100000).to(tl.float32, bitcast=True) * 1.329227995784916e36
