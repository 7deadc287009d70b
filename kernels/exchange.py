"""Small exchanges between GPUs that can write into each other's memory: sums, gathers and scattered sums in one launch.

A word is 4 bytes of data and the number of the round in 4 more, stored at once. Who reads the number has the data, so
nobody asks whether another is ready, and nothing is fenced. Twice the bytes travel, one way and once: of 4 KB over
NVLink that is nothing beside a barrier.

Every rank has an inbox, which all map: two halves, in turns, with a part for each rank. Program p of a launch moves the
same words of every part and counts its own rounds, in memory, so that graphs can be replayed. The half of a round is
written again two rounds later: by a rank that has the round between from all others, who sent it after they had read
this one. All ranks launch the same in the same order, one after the other. A rank that is gone leaves the others
waiting for ever: ending them is up to whoever watches them.

One H200 of two, sums, us: 4 KB 2.2, 64 KB 2.7, 256 KB 3.9, 1 MB 9.6, 2 MB 17.8; NCCL 10.8 to 31, torch's one-shot
6.3 to 21. Programs of 256 words with 2 warps or 128 with 1 take 42 and 52 for 2 MB.

Sums are taken in float32 in the order of ranks and rounded once: the same bits on every rank.

Letters: G ranks, P programs.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_nvfp4.kernels.compiling import CompileCase
from moe_nvfp4.kernels.sizes import cdiv
from moe_nvfp4.kernels.sort_pairs import launch_options, pdl_cases

_BLOCK: Final = 512  # words of a program
_WARPS: Final = 8
ADDED: Final = (torch.bfloat16, torch.float32)


class Inboxes(NamedTuple):
    addresses_G: Tensor  # int64: of every rank's inbox, as this process has it mapped
    rounds_P: Tensor  # int32: that each program has had
    rank: int
    capacity: int  # words that a rank may send to another in one exchange

    @classmethod
    def at(cls, addresses: Sequence[int], rank: int, capacity: int, device: torch.device) -> "Inboxes":
        """All zeros, and known to be by all ranks, before the first exchange."""
        rounds_P = torch.zeros(cdiv(capacity, _BLOCK), dtype=torch.int32, device=device)
        return cls(torch.tensor(list(addresses), dtype=torch.int64, device=device), rounds_P, rank, capacity)

    @staticmethod
    def nbytes(size: int, capacity: int) -> int:
        """Of each rank's."""
        return 2 * size * capacity * 8


def sum_over_peers(x: Tensor, inboxes: Inboxes) -> Tensor:
    """The sum of all ranks' x, bfloat16 or float32, contiguous and of whole words."""
    return _exchange(x, x.new_empty(x.shape), inboxes, parts=1, adds=True)


def gather_from_peers(x: Tensor, inboxes: Inboxes) -> Tensor:
    """All ranks' x, one below the other; of any dtype."""
    size = inboxes.addresses_G.numel()
    return _exchange(x, x.new_empty(size * x.shape[0], *x.shape[1:]), inboxes, parts=1, adds=False)


def scatter_sum_over_peers(x: Tensor, inboxes: Inboxes) -> Tensor:
    """Of the sum of all ranks' x this rank's part of the rows."""
    size = inboxes.addresses_G.numel()
    return _exchange(x, x.new_empty(x.shape[0] // size, *x.shape[1:]), inboxes, parts=size, adds=True)


def takes(x: Tensor, inboxes: Inboxes, *, parts: int = 1) -> bool:
    """Whether x, or each of so many parts of it, is whole words, and few enough."""
    return x.is_contiguous() and x.nbytes % (4 * parts) == 0 and 0 < x.nbytes <= 4 * parts * inboxes.capacity


def _exchange(x: Tensor, out: Tensor, inboxes: Inboxes, *, parts: int, adds: bool) -> Tensor:
    assert takes(x, inboxes, parts=parts) and (not adds or x.dtype in ADDED), (x.shape, x.dtype, parts)
    words = x.nbytes // (4 * parts)
    exchange_words[(cdiv(words, _BLOCK),)](
        x.view(-1).view(torch.int32), out.view(-1).view(torch.int32), *inboxes, words, words if parts > 1 else 0,
        G=inboxes.addresses_G.numel(), ADDS=x.element_size() if adds else 0, B=_BLOCK, ASM=x.is_cuda,
        num_warps=_WARPS, **launch_options(x),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rank", "words", "stride"])
def exchange_words(
    x_ptr, out_ptr, addresses_ptr, rounds_ptr, rank, capacity, words, stride,
    G: tl.constexpr, ADDS: tl.constexpr, B: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`stride`: words from what one rank gets of x to what the next one gets. `ADDS`: bytes of a number; 0: gather."""
    p = tl.program_id(0)
    n = p * B + tl.arange(0, B)
    live = n < words
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    now = tl.load(rounds_ptr + p) + 1
    tag = now.to(tl.int64) << 32
    half = (now % 2 * G).to(tl.int64) * capacity
    for step in tl.static_range(G):  # to itself last, which is nearest
        to = (rank + 1 + step) % G
        data = tl.load(x_ptr + to.to(tl.int64) * stride + n, mask=live, other=0)
        part = _inbox(addresses_ptr, to) + half + rank.to(tl.int64) * capacity
        _send(part + n, (data.to(tl.int64) & 0xFFFFFFFF) | tag, live, ASM)
    low = tl.zeros((B,), tl.float32)
    high = tl.zeros((B,), tl.float32)
    for source in tl.static_range(G):
        part = _inbox(addresses_ptr, rank) + half + source * capacity
        word = tl.load(part + n, mask=live, other=tag, volatile=True)
        while tl.min(((word >> 32) == now).to(tl.int32), 0) == 0:
            word = tl.load(part + n, mask=live, other=tag, volatile=True)
        data = word.to(tl.int32)
        if ADDS == 0:
            tl.store(out_ptr + source * words + n, data, mask=live)
        elif ADDS == 2:
            low += (data << 16).to(tl.float32, bitcast=True)
            high += (data & -65536).to(tl.float32, bitcast=True)
        else:
            low += data.to(tl.float32, bitcast=True)
    if ADDS == 2:
        tl.store(out_ptr + n, (_half_word(low) & 65535) | (_half_word(high) << 16), mask=live)
    elif ADDS == 4:
        tl.store(out_ptr + n, low.to(tl.int32, bitcast=True), mask=live)
    tl.store(rounds_ptr + p, now)


@triton.jit
def _inbox(addresses_ptr, rank):
    return tl.load(addresses_ptr + rank).to(tl.pointer_type(tl.int64))


@triton.jit
def _half_word(x):
    return x.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
def _send(at, word, live, ASM: tl.constexpr):
    """One store of 8 bytes that the whole system sees."""
    if ASM:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.relaxed.sys.global.b64 [$1], $2; mov.b32 $0, 0; }",
            "=r,l,l,r", [at, word, live.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.store(at, word, mask=live)


def compile_cases() -> list[CompileCase]:
    signature = {"x_ptr": "*i32", "out_ptr": "*i32", "addresses_ptr": "*i64", "rounds_ptr": "*i32"}
    signature |= dict.fromkeys(("rank", "capacity", "words", "stride"), "i32")
    cases = []
    for size in (2, 8):
        for name, adds in (("gather", 0), ("bfloat16", 2), ("float32", 4)):
            constants = {"G": size, "ADDS": adds, "B": _BLOCK, "ASM": True}
            options = {"num_warps": _WARPS}
            cases += pdl_cases(f"exchange_words {name} of {size}", exchange_words, signature, options, **constants)
    return cases
