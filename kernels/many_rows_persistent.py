"""The two products of `many_rows` on sm_90 when experts have many rows: programs that stay, two warp groups each.

A job is a tile of up to BN pairs of one expert and 256 rows of weights (128 of gate and the same 128 of up). A program
takes every n-th job, one program on each multiprocessor. Its two warp groups have half of the weights each and share
the rows of x, since smaller jobs are bound by what L2 delivers: 128 by 128 needs 6.9 TB/s at the speed of the tensor
cores. Each group fetches half of the rows by cp.async into a ring of steps, 64 columns of K each, past the end of a job
as well. A group decodes one product's operand while the tensor cores work on the other; words come to registers some
steps before.
"""

from typing import Final

from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_nvfp4.kernels.activation import activate_gl
from moe_nvfp4.kernels.fragment_mma import only_dim, operand, word_layout
from moe_nvfp4.kernels.many_rows_wgmma import row_layout, store_h, store_layout

FEWEST_TILES: Final = 4  # of K: what is fetched ahead reaches into the next job, not further
# Pairs of a tile: steps in the ring (a power of two), steps of x ahead, steps of words ahead for gate and up, for down.
RING: Final = {128: (8, 4, 2, 1), 64: (16, 4, 3, 3)}


def ring_for(bn: int, down: bool) -> dict[str, int]:
    stages, ahead, first, second = RING[bn]
    return {"STAGES": stages, "AHEAD": ahead, "DEPTH": second if down else first}


W = gl.constexpr(4)


@constexpr_function
def _mma(n):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, n, 16])


@gluon.jit
def _turn(step, STAGES: gl.constexpr):
    """Slot and parity of a step; STAGES is a power of two."""
    return step & (STAGES - 1), gl.where((step & STAGES) == 0, 0, 1)


@gluon.jit
def _job(table_ptr, max_tiles, job, jobs, BLOCKS: gl.constexpr):
    """Expert, first pair, pairs (0 past the last job), and block of weight rows."""
    live = job < jobs
    tile = gl.where(live, job // BLOCKS, 0)
    expert = gl.load(table_ptr + tile)
    begin = gl.load(table_ptr + max_tiles + tile)
    count = gl.where(live, gl.load(table_ptr + 2 * max_tiles + tile), 0)
    return expert, begin, count, job % BLOCKS


@gluon.jit
def _rows(order_ptr, begin, count, TOP: gl.constexpr, BN: gl.constexpr, PARTS: gl.constexpr, PART: gl.constexpr):
    """Rows of x that this group fetches; -1 past the tile's end. TOP 0: they lie in the order of pairs."""
    n = PART * (BN // PARTS) + gl.arange(0, BN // PARTS, gl.SliceLayout(1, row_layout(W)))
    if TOP == 0:
        rows = begin + n
    else:
        rows = gl.load(order_ptr + begin + n, mask=n < count, other=0) // TOP
    return gl.where(n < count, rows, -1)


@gluon.jit
def _strips(expert, block, STRIPS: gl.constexpr, TILES: gl.constexpr, SPAN: gl.constexpr, SECOND: gl.constexpr,
            PARTS: gl.constexpr, PART: gl.constexpr):  # fmt: skip
    """Where a lane's scales of the first tile lie; its words lie at four times that."""
    S: gl.constexpr = gl.SliceLayout(4, word_layout(W, 1))
    w = gl.arange(0, W, only_dim(S, 4, 0))
    r = gl.arange(0, 8, only_dim(S, 4, 2))
    c = gl.arange(0, 4, only_dim(S, 4, 3))
    strip = gl.minimum((block * PARTS + PART) * SPAN + SECOND + w, STRIPS - 1)
    at = ((expert * STRIPS + strip) * (TILES * 32))[:, None, None, None]
    return at + (r * 4)[None, None, :, None] + c[None, None, None, :]


@gluon.jit
def _load(words_ptr, pairs_ptr, at):
    j = gl.arange(0, 4, only_dim(word_layout(W, 1), 5, 4))
    words = gl.load(words_ptr + (gl.expand_dims(at, 4).to(gl.int64) * 4 + j[None, None, None, None, :]))
    return words, gl.load(pairs_ptr + at)


@gluon.jit
def _copy(x_ptr, rows, following, i, ring, full, empty, step, TILES: gl.constexpr, STAGES: gl.constexpr,
          RP: gl.constexpr, PART: gl.constexpr):  # fmt: skip
    """Tile i of this job's rows, or of the next one's beyond its last."""
    inside = i < TILES
    rows = gl.where(inside, rows, following)
    k = gl.where(inside, i, i - TILES) * 64 + gl.arange(0, 64, gl.SliceLayout(0, row_layout(W)))
    at = x_ptr + (gl.maximum(rows, 0).to(gl.int64) * (TILES * 64))[:, None] + k[None, :]
    slot, phase = _turn(step, STAGES)
    mbarrier.wait(empty.index(slot), phase ^ 1)
    live = (rows >= 0)[:, None] & (k >= 0)[None, :]
    async_copy.async_copy_global_to_shared(ring.index(slot).slice(PART * RP, RP, 0), at, mask=live)
    async_copy.mbarrier_arrive(full.index(slot), increment_count=False)


@gluon.jit
def _store_y(v, strip, order_ptr, out_ptr, begin, count, COLUMNS: gl.constexpr, N: gl.constexpr):
    L: gl.constexpr = store_layout(W)
    n = gl.arange(0, N, gl.SliceLayout(0, L))
    pair = gl.load(order_ptr + begin + gl.minimum(n, count - 1)).to(gl.int64)
    m = strip * 16 + gl.arange(0, 16 * W, gl.SliceLayout(1, L))[:, None]
    gl.store(out_ptr + (pair * COLUMNS)[None, :] + m, gl.convert_layout(v.to(gl.bfloat16), L),
             mask=(n < count)[None, :] & (m < COLUMNS))  # fmt: skip


@gluon.jit
def _store(p, q, p_scale, q_scale, strip, order_ptr, out_ptr, begin, count, STRIPS: gl.constexpr,
           COLUMNS: gl.constexpr, GATED: gl.constexpr, KIND: gl.constexpr, N: gl.constexpr):  # fmt: skip
    p *= p_scale
    q *= q_scale
    if KIND == "none":
        _store_y(p, strip, order_ptr, out_ptr, begin, count, COLUMNS, N)
        _store_y(q, strip + W, order_ptr, out_ptr, begin, count, COLUMNS, N)
    elif GATED:
        store_h(activate_gl(p, q, KIND), strip, out_ptr, begin, count, STRIPS, COLUMNS, W, N)
    else:
        store_h(activate_gl(p, p, KIND), strip, out_ptr, begin, count, STRIPS, COLUMNS, W, N)
        store_h(activate_gl(q, q, KIND), strip + W, out_ptr, begin, count, STRIPS, COLUMNS, W, N)


@gluon.jit
def _tile(
    p_w, p_s, q_w, q_s, x_ptr, ring, full, empty, p_at, q_at, p_next, q_next, rows, following,
    pa, p_words, q_words, step,
    TILES: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr, DEPTH: gl.constexpr,
    RP: gl.constexpr, PART: gl.constexpr,
    p_scale, q_scale, strip, order_ptr, out_ptr, begin, count, STRIPS: gl.constexpr, COLUMNS: gl.constexpr,
    GATED: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    """The two products of a job; starts what the next job needs first."""
    MMA: gl.constexpr = _mma(N)
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    A0: gl.constexpr = gl.DotOperandLayout(0, _mma(16), 2)
    p = warpgroup_mma_init(gl.zeros((16 * W, N), gl.float32, MMA))
    q = warpgroup_mma_init(gl.zeros((16 * W, N), gl.float32, MMA))
    pa = gl.convert_layout(pa, A, assert_trivial=True)
    qa = pa
    for t in range(TILES):
        slot, phase = _turn(step + t, STAGES)
        mbarrier.wait(full.index(slot), phase)
        fence_async_shared()
        b = ring.index(slot).slice(0, N, 0).permute((1, 0))
        p = warpgroup_mma(pa, b, p, is_async=True)
        warpgroup_mma_wait(1, deps=(qa,))
        mbarrier.arrive(empty.index((step + t - 1) & (STAGES - 1)), pred=t > 0)
        qa = operand(q_words[0][0], q_words[0][1], W, 1, A)
        inside = t + DEPTH < TILES
        here = gl.where(inside, q_at + (t + DEPTH) * 32, q_next + (t + DEPTH - TILES) * 32)
        ring_words = ()
        for i in gl.static_range(DEPTH - 1):
            ring_words = ring_words + (q_words[i + 1],)  # noqa: RUF005
        q_words = ring_words + (_load(q_w, q_s, here),)  # noqa: RUF005
        q = warpgroup_mma(qa, b, q, is_async=True)
        warpgroup_mma_wait(1, deps=(pa,))
        pa = operand(p_words[0][0], p_words[0][1], W, 1, A)
        inside = t + DEPTH + 1 < TILES
        here = gl.where(inside, p_at + (t + DEPTH + 1) * 32, p_next + (t + DEPTH + 1 - TILES) * 32)
        ring_words = ()
        for i in gl.static_range(DEPTH - 1):
            ring_words = ring_words + (p_words[i + 1],)  # noqa: RUF005
        p_words = ring_words + (_load(p_w, p_s, here),)  # noqa: RUF005
        _copy(x_ptr, rows, following, t + AHEAD, ring, full, empty, step + t + AHEAD, TILES, STAGES, RP, PART)
    p, q, qa = warpgroup_mma_wait(0, deps=(p, q, qa))
    mbarrier.arrive(empty.index((step + TILES - 1) & (STAGES - 1)))
    _store(p, q, p_scale, q_scale, strip, order_ptr, out_ptr, begin, count, STRIPS, COLUMNS, GATED, KIND, N)
    return gl.convert_layout(pa, A0, assert_trivial=True), p_words, q_words


@gluon.jit
def _group(
    x_ptr, p_w, p_s, p_g, q_w, q_s, q_g, order_ptr, table_ptr, out_ptr, max_tiles, ring, full, empty,
    TOP: gl.constexpr, STRIPS: gl.constexpr, TILES: gl.constexpr, COLUMNS: gl.constexpr, GATED: gl.constexpr,
    KIND: gl.constexpr, BLOCKS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr,
    DEPTH: gl.constexpr, PDL: gl.constexpr, PARTS: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    if PDL:  # in each group: with both in the first group alone, half of h was read before it was written
        gdc_wait()
        gdc_launch_dependents()
    SPAN: gl.constexpr = W if GATED else 2 * W
    SECOND: gl.constexpr = 0 if GATED else W
    RP: gl.constexpr = BN // PARTS
    A0: gl.constexpr = gl.DotOperandLayout(0, _mma(16), 2)
    jobs = gl.load(table_ptr + 3 * max_tiles) * BLOCKS
    first = gl.program_id(0)
    if first < jobs:
        expert, begin, count, block = _job(table_ptr, max_tiles, first, jobs, BLOCKS)
        rows = _rows(order_ptr, begin, count, TOP, BN, PARTS, PART)
        step = 0
        for t in range(AHEAD):
            _copy(x_ptr, rows, rows, t, ring, full, empty, t, TILES, STAGES, RP, PART)
        p_at = _strips(expert, block, STRIPS, TILES, SPAN, 0, PARTS, PART)
        q_at = _strips(expert, block, STRIPS, TILES, SPAN, SECOND, PARTS, PART)
        w, s = _load(p_w, p_s, p_at)
        p_words, q_words = (), ()
        for i in gl.static_range(DEPTH):
            p_words = p_words + (_load(p_w, p_s, p_at + (i + 1) * 32),)  # noqa: RUF005
            q_words = q_words + (_load(q_w, q_s, q_at + i * 32),)  # noqa: RUF005
        pa = operand(w, s, W, 1, A0)
        for job in range(first, jobs, gl.num_programs(0)):
            expert2, begin2, count2, block2 = _job(table_ptr, max_tiles, job + gl.num_programs(0), jobs, BLOCKS)
            following = _rows(order_ptr, begin2, count2, TOP, BN, PARTS, PART)
            p_next = _strips(expert2, block2, STRIPS, TILES, SPAN, 0, PARTS, PART)
            q_next = _strips(expert2, block2, STRIPS, TILES, SPAN, SECOND, PARTS, PART)
            p_scale, q_scale = gl.load(p_g + expert) * 256.0, gl.load(q_g + expert) * 256.0
            strip = (block * PARTS + PART) * SPAN
            if count > BN // 2:
                pa, p_words, q_words = _tile(
                    p_w, p_s, q_w, q_s, x_ptr, ring, full, empty, p_at, q_at, p_next, q_next, rows, following,
                    pa, p_words, q_words, step, TILES, BN, STAGES, AHEAD, DEPTH, RP, PART,
                    p_scale, q_scale, strip, order_ptr, out_ptr, begin, count, STRIPS, COLUMNS, GATED, KIND,
                )  # fmt: skip
            elif count > BN // 4:
                pa, p_words, q_words = _tile(
                    p_w, p_s, q_w, q_s, x_ptr, ring, full, empty, p_at, q_at, p_next, q_next, rows, following,
                    pa, p_words, q_words, step, TILES, BN // 2, STAGES, AHEAD, DEPTH, RP, PART,
                    p_scale, q_scale, strip, order_ptr, out_ptr, begin, count, STRIPS, COLUMNS, GATED, KIND,
                )  # fmt: skip
            else:
                pa, p_words, q_words = _tile(
                    p_w, p_s, q_w, q_s, x_ptr, ring, full, empty, p_at, q_at, p_next, q_next, rows, following,
                    pa, p_words, q_words, step, TILES, BN // 4, STAGES, AHEAD, DEPTH, RP, PART,
                    p_scale, q_scale, strip, order_ptr, out_ptr, begin, count, STRIPS, COLUMNS, GATED, KIND,
                )  # fmt: skip
            step += TILES
            expert, begin, count, block, rows, p_at, q_at = expert2, begin2, count2, block2, following, p_next, q_next
        async_copy.commit_group()  # no copy may arrive after the program has ended
        async_copy.wait_group(0)


@gluon.jit(do_not_specialize=["max_tiles"])
def products_persistent(
    x_ptr, p_w, p_s, p_g, q_w, q_s, q_g, order_ptr, table_ptr, out_ptr, max_tiles,
    TOP: gl.constexpr, STRIPS: gl.constexpr, TILES: gl.constexpr, COLUMNS: gl.constexpr, GATED: gl.constexpr,
    KIND: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr, DEPTH: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """Gate and up with the activation, in the order of the sorted pairs; KIND = "none": one product, by pair.

    GATED: p is gate and q is up. Otherwise they are the same weights, and a group has two sets of strips.
    """
    PARTS: gl.constexpr = 2
    ROWS: gl.constexpr = 128 if GATED else 256
    BLOCKS: gl.constexpr = (STRIPS * 16 + ROWS - 1) // ROWS
    ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, 64], gl.NVMMASharedLayout(128, 16, 2))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=128 * PARTS)
        mbarrier.init(empty.index(s), count=PARTS)
    gl.warp_specialize([
        (_group, (x_ptr, p_w, p_s, p_g, q_w, q_s, q_g, order_ptr, table_ptr, out_ptr, max_tiles, ring, full, empty,
                  TOP, STRIPS, TILES, COLUMNS, GATED, KIND, BLOCKS, BN, STAGES, AHEAD, DEPTH, PDL, PARTS, 0)),
        (_group, (x_ptr, p_w, p_s, p_g, q_w, q_s, q_g, order_ptr, table_ptr, out_ptr, max_tiles, ring, full, empty,
                  TOP, STRIPS, TILES, COLUMNS, GATED, KIND, BLOCKS, BN, STAGES, AHEAD, DEPTH, PDL, PARTS, 1)),
    ], [4], [256])  # fmt: skip
