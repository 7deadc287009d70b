"""Attention of one row a sequence: splits of each sequence's positions, then their weighted sum.

The grid depends on shapes only. Every program reads its sequence's length and takes an equal share of the tiles that
there are, so short sequences in a long table use few splits; programs without a share leave. A sequence that one
split covers is written at once, and the second launch, which adds splits up in a fixed order, passes over it.

On sm_90 and later a program reads lengths, slots and table while its predecessor in the stream still runs. So that
predecessor may write pages, but not those three.

Letters: B sequences, N heads, G key-value heads with M heads each, D head size, S splits.
"""

from dataclasses import replace
from functools import cache
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_nvfp4.kernels.compiling import ARCHITECTURES, CompileCase
from moe_nvfp4.kernels.paged_kv import PagedKV, operand, page_of, place_of
from moe_nvfp4.kernels.rows import Rows
from moe_nvfp4.kernels.sort_pairs import launch_options, pdl_cases

LOG2E: Final = 1.4426950408889634
_MAX_SPLITS: Final = 128
_GRAPH_SEQUENCES: Final = 16  # as for so many, where there may be few among many, and long ones
_INVARIANT_SEQUENCES: Final = 4  # as for so many, where splits must not depend on how many there are
_SUM_BLOCKS: Final = ((8, 256), (32, 64), (_MAX_SPLITS, 32))  # splits, columns of a program


class Tile(NamedTuple):
    positions: int
    warps: int
    stages: int
    chunk: int  # columns of keys at a time


def decode_tile(head: int, fp8: bool, architecture: int) -> Tile:
    """On an H200, Qwen3.6's layer: 32 positions take 4.5 us for one sequence of 128 and 262 for 64 of 8192, 64 take 5.9
    and 261, 16 take 4.9 and 393. Chunks cost 0.2 us, but leave registers for decoding FP8: 20 against 25 us for 256 of
    128."""
    chunk = min(head, 64 if head <= 256 else 128) if fp8 else head
    if head <= 128:
        return Tile(64, 4, 3, chunk)
    if head > 256 and not fp8 and architecture not in (90, 100):
        return Tile(16, 4, 3, chunk)  # 32 positions want 145 KB of shared memory, and spill on sm_80
    return Tile(32, 4, 3, chunk)


def num_splits(sequences: int, kv_heads: int, positions: int, tile: int, multiprocessors: int) -> int:
    """A program for each multiprocessor, and no more than tiles of the longest sequence.

    Two for each take 42 against 38 us for 64 sequences of 1024 positions of Qwen3.6, 13 against 8 for 64 of 128 (where
    one makes the second launch unnecessary), and 9.5 against 11.9 for one of 8192.
    """
    return max(1, min(multiprocessors // (sequences * kv_heads), -(-positions // tile), _MAX_SPLITS))


@cache
def device_of(index: int) -> tuple[int, int]:
    """Architecture and multiprocessors; of a small GPU for Triton's interpreter."""
    if index < 0:
        return 80, 4
    properties = torch.cuda.get_device_properties(index)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def decode_attention(
    q_TND: Tensor, kv: PagedKV, rows: Rows, scale: float, window: int, gate_TND: Tensor | None, out_TND: Tensor
) -> None:
    """Writes the first rows.decodes rows of `out_TND`, contiguous; see paged_attention."""
    (_, heads, head), kv_heads, batch = q_TND.shape, kv.keys.shape[2], rows.decodes
    architecture, multiprocessors = device_of(q_TND.get_device())
    tile = decode_tile(head, kv.is_fp8, architecture)
    width = kv.table.shape[1]
    positions = min(width * kv.page, window + tile.positions - 1) if window else width * kv.page
    sharing = min(batch, _GRAPH_SEQUENCES) if rows.in_graph else batch
    if kv.batch_invariant:
        sharing = _INVARIANT_SEQUENCES
    splits = num_splits(sharing, kv_heads, positions, tile.positions, multiprocessors)
    sums_BNSD = q_TND.new_empty(batch, heads, splits, head, dtype=torch.float32) if splits > 1 else out_TND
    tops_BN2S = q_TND.new_empty(batch, heads, 2, splits, dtype=torch.float32) if splits > 1 else out_TND
    gate = q_TND if gate_TND is None else gate_TND
    options = launch_options(q_TND)
    shared: dict[str, Any] = {
        "D": head, "BT": tile.positions, "WINDOW": window, "GATED": gate_TND is not None,
    }  # fmt: skip
    decode_splits[(splits, kv_heads, batch)](
        q_TND, kv.keys, kv.values, kv.table, rows.slots, rows.lengths, gate, out_TND, sums_BNSD, tops_BN2S,
        scale * kv.k_scale * LOG2E, kv.v_scale, q_TND.stride(0), q_TND.stride(1), gate.stride(0), gate.stride(1),
        width, splits, G=kv_heads, M=heads // kv_heads, PAGE=kv.page, DC=tile.chunk,
        OPERAND=tl.bfloat16 if q_TND.is_cuda else tl.float32,  # Triton's interpreter has no bfloat16 dot
        num_warps=tile.warps, num_stages=tile.stages, **shared, **options,
    )  # fmt: skip
    if splits > 1:
        block, columns = sum_block(splits, head)
        sum_splits[(head // columns, heads, batch)](
            sums_BNSD, tops_BN2S, rows.lengths, gate, out_TND, gate.stride(0), gate.stride(1), splits,
            N=heads, BS=block, BD=columns, num_warps=4, **shared, **options,
        )  # fmt: skip


def sum_block(splits: int, head: int) -> tuple[int, int]:
    """Splits and columns of one program: all splits, so that no load waits for another."""
    block, columns = next(pair for pair in _SUM_BLOCKS if splits <= pair[0])
    return block, min(columns, head)


@triton.jit
def share_of(length, S, BT: tl.constexpr, WINDOW: tl.constexpr):
    """First position, first tile, end of tiles, and tiles of a split."""
    first = tl.maximum(length - WINDOW, 0) if WINDOW else 0
    first_tile = first // BT
    end = tl.cdiv(length, BT)
    return first, first_tile, end, tl.cdiv(end - first_tile, S)


@triton.jit(do_not_specialize=["S"])  # which differs from batch size to batch size
def decode_splits(
    q_ptr, k_ptr, v_ptr, table_ptr, slots_ptr, lengths_ptr, gate_ptr, out_ptr, sums_ptr, tops_ptr,
    scale, v_scale, q_row, q_head, gate_row, gate_head, width, S,
    G: tl.constexpr, M: tl.constexpr, PAGE: tl.constexpr, OPERAND: tl.constexpr, DC: tl.constexpr,
    D: tl.constexpr, BT: tl.constexpr, WINDOW: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One split: the heads of a group are the rows of a product, at least 16."""
    split, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    BM: tl.constexpr = max(16, triton.next_power_of_2(M))
    length = tl.load(lengths_ptr + b)
    row_ptr = table_ptr + tl.load(slots_ptr + b).to(tl.int64) * width
    first, first_tile, end_tile, share = share_of(length, S, BT, WINDOW)
    begin = first_tile + split * share
    end = tl.minimum(begin + share, end_tile)
    last = tl.minimum(end * BT, length)
    t = begin * BT + tl.arange(0, BT)
    page = page_of(row_ptr, t, t < last, PAGE)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if begin < end:
        h = tl.arange(0, BM)
        d = tl.arange(0, D)
        live_h = (h < M)[:, None]
        head = group * M + h
        dc = tl.arange(0, DC)
        q_at = q_ptr + b * q_row + head.to(tl.int64)[:, None] * q_head + dc[None, :]
        q = ()
        for c in tl.static_range(D // DC):
            q += (tl.load(q_at + c * DC, mask=live_h, other=0.0).to(OPERAND),)
        top = tl.full((BM,), -1e30, tl.float32)
        totals = tl.zeros((BM, BT), tl.float32)  # added up at the end: a sum over warps costs two barriers
        acc = tl.zeros((BM, D), tl.float32)
        for tile in range(begin, end):
            t = tile * BT + tl.arange(0, BT)
            live = t < length
            at = place_of(page, t, group, PAGE, G, D)[:, None]
            page = page_of(row_ptr, t + BT, t + BT < last, PAGE)  # a tile ahead: its latency hides
            scores = tl.zeros((BM, BT), tl.float32)
            for c in tl.static_range(D // DC):
                k = operand(tl.load(k_ptr + at + (c * DC + dc)[None, :], mask=live[:, None], other=0), OPERAND)
                scores += tl.dot(q[c], tl.trans(k)) * scale
            if WINDOW:
                live &= t >= first
            scores = tl.where(live[None, :], scores, -1e30)
            new_top = tl.maximum(top, tl.max(scores, 1))
            p = tl.exp2(scores - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            totals = totals * shrink[:, None] + p
            top = new_top
            v = operand(tl.load(v_ptr + at + d[None, :], mask=(t < length)[:, None], other=0), OPERAND)
            acc = tl.dot(p.to(OPERAND), v, acc * shrink[:, None])
        acc *= v_scale
        total = tl.sum(totals, 1)
        if share >= end_tile - first_tile:
            y = acc / total[:, None]
            if GATED:
                at = b * gate_row + head.to(tl.int64)[:, None] * gate_head + d[None, :]
                y *= tl.sigmoid(tl.load(gate_ptr + at, mask=live_h, other=0.0).to(tl.float32))
            tl.store(out_ptr + (b * (G * M) + head[:, None]) * D + d[None, :], y.to(tl.bfloat16), mask=live_h)
        else:
            line = b * (G * M) + head
            tl.store(sums_ptr + (line[:, None] * S + split) * D + d[None, :], acc, mask=live_h)
            tl.store(tops_ptr + line * 2 * S + split, top, mask=h < M)
            tl.store(tops_ptr + (line * 2 + 1) * S + split, total, mask=h < M)


@triton.jit(do_not_specialize=["S"])
def sum_splits(
    sums_ptr, tops_ptr, lengths_ptr, gate_ptr, out_ptr, gate_row, gate_head, S,
    N: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
    D: tl.constexpr, BT: tl.constexpr, WINDOW: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BD columns of one head of one sequence."""
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    line = b * N + head
    _, first_tile, end_tile, share = share_of(tl.load(lengths_ptr + b), S, BT, WINDOW)
    splits = tl.cdiv(end_tile - first_tile, tl.maximum(share, 1))  # none of a sequence without a row
    gate = tl.zeros((BD,), tl.float32)
    if GATED:
        # Older than the launch before this one, which has waited for it.
        gate = tl.load(gate_ptr + b * gate_row + head.to(tl.int64) * gate_head + d).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if splits > 1:
        s = tl.arange(0, BS)
        live = s < splits
        tops = tl.load(tops_ptr + line * 2 * S + s, mask=live, other=-1e30)
        totals = tl.load(tops_ptr + (line * 2 + 1) * S + s, mask=live, other=0.0)
        at = (line * S + s[:, None]) * D + d[None, :]
        parts = tl.load(sums_ptr + at, mask=live[:, None], other=0.0)
        weights = tl.exp2(tops - tl.max(tops, 0))
        y = tl.sum(parts * weights[:, None], 0) / tl.sum(totals * weights, 0)
        if GATED:
            y *= tl.sigmoid(gate)
        tl.store(out_ptr + line * D + d, y.to(tl.bfloat16))


def compile_cases() -> list[CompileCase]:
    sums = dict.fromkeys(("sums_ptr", "tops_ptr"), "*fp32") | dict.fromkeys(("gate_ptr", "out_ptr"), "*bf16")
    sums |= {"lengths_ptr": "*i32"} | dict.fromkeys(("gate_row", "gate_head", "S"), "i32")
    scalars = {"scale": "fp32", "v_scale": "fp32", "q_row": "i32", "q_head": "i32", "width": "i32"}
    pages = {"q_ptr": "*bf16", "table_ptr": "*i32", "slots_ptr": "*i32"}
    cases = []
    shapes = ((2, 8, 256, 16, 0, True), (8, 2, 256, 32, 1024, False), (2, 8, 512, 16, 0, False))
    for groups, each, head, page, window, gated in (*shapes, (4, 8, 128, 64, 0, False), (4, 16, 64, 16, 0, False)):
        for kind in ("bf16", "u8"):
            tiles = {a: decode_tile(head, kind == "u8", a) for a in ARCHITECTURES}
            for tile in dict.fromkeys(tiles.values()):
                shared = {"D": head, "BT": tile.positions, "WINDOW": window, "GATED": gated}
                both = pdl_cases(
                    f"decode_splits {kind} {head}, {tile.positions}", decode_splits,
                    {**pages, **sums, **scalars, "k_ptr": f"*{kind}", "v_ptr": f"*{kind}"},
                    {"num_warps": tile.warps, "num_stages": tile.stages},
                    G=groups, M=each, PAGE=page, OPERAND=tl.bfloat16, DC=tile.chunk, **shared,
                )  # fmt: skip
                for case in both:
                    architectures = tuple(a for a in case.architectures if tiles[a] == tile)
                    cases += [replace(case, architectures=architectures)] if architectures else []
        for splits in (3, 17, 128):
            block, columns = sum_block(splits, head)
            cases += pdl_cases(
                f"sum_splits {head}, {block}", sum_splits, sums, {"num_warps": 4},
                N=groups * each, BS=block, BD=columns, **shared,
            )  # fmt: skip
    return cases
