"""Attention of many rows a sequence over its pages: tiles of rows, all heads of a group in one tile.

A tile's rows are BQ positions times the heads that share keys and values, so few scores above the diagonal or outside
the window are computed. Of the tiles of keys only those at the edges are masked; those outside are not read.

Letters: N heads, G key-value heads with M heads each (padded to MP), D head size.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_nvfp4.kernels.compiling import ARCHITECTURES, CompileCase
from moe_nvfp4.kernels.decode_attention import LOG2E, device_of
from moe_nvfp4.kernels.paged_kv import PagedKV, operand, page_of, place_of
from moe_nvfp4.kernels.rows import CHUNK, Rows
from moe_nvfp4.kernels.sizes import next_power_of_2
from moe_nvfp4.kernels.sort_pairs import launch_options


class Tile(NamedTuple):
    rows: int  # positions times heads
    positions: int
    warps: int
    stages: int
    parts: int = 1  # programs that share the columns of the output, each computing all scores


def prefill_tile(head: int, architecture: int) -> Tile:
    """On an H200, TFLOP/s of eight causal prompts of 2048 tokens: 365 at 128 columns (359 with 64 rows), 386 at 256
    (211 with 64 rows, 320 with 32 keys), 223 at 512 (188 with 64 rows and one part)."""
    small = architecture in (86, 89, 120)  # 99 KB of shared memory
    if head <= 128:
        return Tile(128, 32 if small else 64, 8, 3 if architecture == 90 else 2)
    if head <= 256:
        return Tile(128 if architecture == 90 else 64, 32 if small else 64, 8, 2)
    return Tile(128, 32, 8, 2, parts=2) if architecture == 90 else Tile(32, 32, 8, 2)


def prefill_attention(
    q_TND: Tensor, kv: PagedKV, rows: Rows, scale: float, window: int, gate_TND: Tensor | None, out_TND: Tensor
) -> None:
    """Writes the rows of `out_TND`, contiguous, of the sequences after rows.decodes; see paged_attention."""
    (_, heads, head), kv_heads = q_TND.shape, kv.keys.shape[2]
    tile = prefill_tile(head, device_of(q_TND.get_device())[0])
    gate = q_TND if gate_TND is None else gate_TND
    shape = tile_shape(tile, heads // kv_heads)
    prefill_rows[(rows.chunks.numel() * (CHUNK // shape["BQ"]) * tile.parts, kv_heads)](
        q_TND, kv.keys, kv.values, kv.table, rows.slots, rows.starts, rows.lengths, rows.chunks, gate, out_TND,
        rows.decodes,
        scale * kv.k_scale * LOG2E, kv.v_scale, q_TND.stride(0), q_TND.stride(1), gate.stride(0), gate.stride(1),
        kv.table.shape[1], G=kv_heads, PAGE=kv.page, D=head, DV=head // tile.parts, WINDOW=window,
        GATED=gate_TND is not None, L=CHUNK,
        OPERAND=tl.bfloat16 if q_TND.is_cuda else tl.float32,  # Triton's interpreter has no bfloat16 dot
        num_warps=tile.warps, num_stages=tile.stages, **shape, **launch_options(q_TND),
    )  # fmt: skip


def tile_shape(tile: Tile, each: int) -> dict[str, int]:
    padded = next_power_of_2(each)
    return {"M": each, "MP": padded, "BQ": min(CHUNK, max(1, tile.rows // padded)), "BT": tile.positions}


@triton.jit(do_not_specialize=["decodes"])
def prefill_rows(
    q_ptr, k_ptr, v_ptr, table_ptr, slots_ptr, starts_ptr, lengths_ptr, chunks_ptr, gate_ptr, out_ptr, decodes,
    scale, v_scale, q_row, q_head, gate_row, gate_head, width,
    G: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WINDOW: tl.constexpr, GATED: tl.constexpr,
    OPERAND: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, BQ: tl.constexpr, BT: tl.constexpr, L: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The last tiles of a sequence, which have most to do, come first."""
    group = tl.program_id(1)
    PARTS: tl.constexpr = D // DV
    part = tl.program_id(0) % PARTS
    at_tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // PARTS
    place = at_tile // (L // BQ)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    sequence = tl.load(chunks_ptr + place)
    b = decodes + tl.maximum(sequence, 0)
    first_row = tl.load(starts_ptr + b)
    num_rows = tl.load(starts_ptr + b + 1) - first_row
    length = tl.load(lengths_ptr + b)
    row_ptr = table_ptr + tl.load(slots_ptr + b).to(tl.int64) * width
    tile = at_tile - (first_row // L + sequence) * (L // BQ)
    if (sequence >= 0) & (tile * BQ < num_rows):
        r = tl.arange(0, BQ * MP)
        d = tl.arange(0, D)
        dv = part * DV + tl.arange(0, DV)
        row, head = tile * BQ + r // MP, r % MP
        live = ((row < num_rows) & (head < M))[:, None]
        at_row, head = (first_row + row).to(tl.int64)[:, None], group * M + head[:, None]
        q = tl.load(q_ptr + at_row * q_row + head.to(tl.int64) * q_head + d[None, :], mask=live, other=0.0)
        before = length - num_rows
        lowest = before + tile * BQ
        highest = tl.minimum(lowest + BQ, length) - 1
        diagonal = (lowest + 1) // BT
        end = highest // BT + 1
        begin = 0
        whole = 0  # between it and the diagonal nothing is masked
        if WINDOW:
            begin = tl.maximum(lowest - WINDOW + 1, 0) // BT
            whole = tl.cdiv(tl.maximum(highest - WINDOW + 1, 0), BT)
        own = before + row
        q = q.to(OPERAND)
        top = tl.full((BQ * MP,), -1e30, tl.float32)
        total = tl.zeros((BQ * MP,), tl.float32)
        acc = tl.zeros((BQ * MP, DV), tl.float32)
        t = begin * BT + tl.arange(0, BT)
        page = page_of(row_ptr, t, t < length, PAGE)
        for tile_t in range(begin, end):
            t = tile_t * BT + tl.arange(0, BT)
            inside = (t < length)[:, None]
            at = place_of(page, t, group, PAGE, G, D)[:, None]
            page = page_of(row_ptr, t + BT, t + BT < length, PAGE)  # a tile ahead: its latency hides
            k = operand(tl.load(k_ptr + at + d[None, :], mask=inside, other=0), OPERAND)
            scores = tl.dot(q, tl.trans(k)) * scale
            if (tile_t >= diagonal) | (tile_t < whole):
                seen = t[None, :] <= own[:, None]
                if WINDOW:
                    seen &= own[:, None] - t[None, :] < WINDOW
                # A row that sees nothing of the first tiles is put right by the next: its weights vanish then.
                scores = tl.where(seen, scores, -1e30)
            new_top = tl.maximum(top, tl.max(scores, 1))
            p = tl.exp2(scores - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(p, 1)
            top = new_top
            v = operand(tl.load(v_ptr + at + dv[None, :], mask=inside, other=0), OPERAND)
            acc = tl.dot(p.to(OPERAND), v, acc * shrink[:, None])
        y = acc * (v_scale / total)[:, None]
        if GATED:
            at = at_row * gate_row + head.to(tl.int64) * gate_head + dv[None, :]
            y *= tl.sigmoid(tl.load(gate_ptr + at, mask=live, other=0.0).to(tl.float32))
        tl.store(out_ptr + (at_row * (G * M) + head) * D + dv[None, :], y.to(tl.bfloat16), mask=live)


def compile_cases() -> list[CompileCase]:
    signature = dict.fromkeys(("q_ptr", "gate_ptr", "out_ptr"), "*bf16")
    signature |= dict.fromkeys(("table_ptr", "slots_ptr", "starts_ptr", "lengths_ptr", "chunks_ptr"), "*i32")
    signature |= dict.fromkeys(("decodes", "q_row", "q_head", "gate_row", "gate_head", "width"), "i32")
    signature |= {"scale": "fp32", "v_scale": "fp32"}
    cases = []
    shapes: tuple[tuple[Any, ...], ...] = (
        (2, 8, 256, 16, 0, True), (8, 2, 256, 32, 1024, False), (2, 8, 512, 16, 0, False), (4, 8, 128, 64, 0, False),
    )  # fmt: skip
    for groups, each, head, page, window, gated in shapes:
        for kind in ("bf16", "u8"):
            # With a window there are the same tiles, and a mask more.
            for architecture in (90,) if window else ARCHITECTURES:
                tile = prefill_tile(head, architecture)
                pdl = architecture >= 90
                cases.append(
                    CompileCase(
                        name=f"prefill_rows {kind} {head} sm_{architecture}",
                        function=prefill_rows,
                        signature={**signature, "k_ptr": f"*{kind}", "v_ptr": f"*{kind}"},
                        constexprs={
                            "G": groups, "PAGE": page, "D": head, "DV": head // tile.parts,
                            "WINDOW": window, "GATED": gated, "OPERAND": tl.bfloat16, "L": CHUNK, "PDL": pdl,
                            **tile_shape(tile, each),
                        },
                        divisible=("q_row", "q_head", "gate_row", "gate_head"),
                        options={
                            "num_warps": tile.warps, "num_stages": tile.stages, **({"launch_pdl": True} if pdl else {}),
                        },
                        architectures=(architecture,),
                        # Of pointers that are used after the loop; the accumulator alone takes half of the registers.
                        allowed_spill=48 if architecture == 90 and head >= 256 else 0,
                    )
                )  # fmt: skip
    return cases
