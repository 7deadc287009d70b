"""The two products of `many_rows` on sm_90: wgmma, its first operand decoded from fragments into registers.

A program is one tile of up to BN pairs of one expert and two sets of 16 W rows of weights. The fragments of 16 rows
of the four warps of a warpgroup are the registers of 64 rows of one wgmma. Rows of x come gathered, by cp.async.
"""

from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_nvfp4.kernels.activation import activate_gl
from moe_nvfp4.kernels.fragment_mma import only_dim, operand, word_layout


@gluon.jit
def _pair_offsets(strip, STRIPS: gl.constexpr, TILES: gl.constexpr, W: gl.constexpr):
    """Where a lane's scales of the first tile lie; its words lie at four times that."""
    S: gl.constexpr = gl.SliceLayout(4, word_layout(W, 1))
    w = gl.arange(0, W, only_dim(S, 4, 0))
    r = gl.arange(0, 8, only_dim(S, 4, 2))
    c = gl.arange(0, 4, only_dim(S, 4, 3))
    at = (gl.minimum(strip + w, STRIPS - 1) * (TILES * 32))[:, None, None, None]
    return at + (r * 4)[None, None, :, None] + c[None, None, None, :]


@gluon.jit
def _load_tile(words_ptr, pairs_ptr, at, W: gl.constexpr):
    j = gl.arange(0, 4, only_dim(word_layout(W, 1), 5, 4))
    words = gl.load(words_ptr + (gl.expand_dims(at, 4) * 4 + j[None, None, None, None, :]))
    return words, gl.load(pairs_ptr + at)


@constexpr_function
def _row_layout(W):
    """Of rows [N, 64]: sixteen bytes a lane."""
    return gl.BlockedLayout([1, 8], [4, 8], [W, 1], [1, 0])


@gluon.jit
def _products_narrow(
    p_w, p_s, p_strip, q_w, q_s, q_strip, x_ptr, rows,
    STRIPS: gl.constexpr, TILES: gl.constexpr, W: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """_products_gl for N up to 64: few registers, so that four programs share a multiprocessor.

    The next tile is decoded while this one multiplies; words are loaded three tiles before their product.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, N, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, N, 64], gl.NVMMASharedLayout(128, 16, 2))
    k = gl.arange(0, 64, gl.SliceLayout(0, _row_layout(W)))
    x = x_ptr + (rows * (TILES * 64))[:, None] + k[None, :]
    for s in gl.static_range(STAGES - 1):
        if s < TILES:
            async_copy.async_copy_global_to_shared(smem.index(s), x + s * 64)
        async_copy.commit_group()
    p_at = _pair_offsets(p_strip, STRIPS, TILES, W)
    q_at = _pair_offsets(q_strip, STRIPS, TILES, W)
    p_words, p_pairs = _load_tile(p_w, p_s, p_at, W)
    q_words, q_pairs = _load_tile(q_w, q_s, q_at, W)
    p_a = operand(p_words, p_pairs, W, 1, A)
    q_a = operand(q_words, q_pairs, W, 1, A)
    second: gl.constexpr = 32 if TILES > 1 else 0
    p_words, p_pairs = _load_tile(p_w, p_s, p_at + second, W)
    q_words, q_pairs = _load_tile(q_w, q_s, q_at + second, W)
    third: gl.constexpr = min(2, TILES - 1) * 32
    p_words2, p_pairs2 = _load_tile(p_w, p_s, p_at + third, W)
    q_words2, q_pairs2 = _load_tile(q_w, q_s, q_at + third, W)
    p = warpgroup_mma_init(gl.zeros((16 * W, N), gl.float32, MMA))
    q = warpgroup_mma_init(gl.zeros((16 * W, N), gl.float32, MMA))
    for tile in range(TILES):
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        b = smem.index(tile % STAGES).permute((1, 0))
        p = warpgroup_mma(p_a, b, p, is_async=True)
        q = warpgroup_mma(q_a, b, q, is_async=True)
        p_next = operand(p_words, p_pairs, W, 1, A)
        q_next = operand(q_words, q_pairs, W, 1, A)
        p_words, p_pairs, q_words, q_pairs = p_words2, p_pairs2, q_words2, q_pairs2
        ahead = gl.minimum(tile + 3, TILES - 1) * 32
        p_words2, p_pairs2 = _load_tile(p_w, p_s, p_at + ahead, W)
        q_words2, q_pairs2 = _load_tile(q_w, q_s, q_at + ahead, W)
        p, q, p_a, q_a = warpgroup_mma_wait(0, deps=(p, q, p_a, q_a))
        p, q = warpgroup_mma_init(p), warpgroup_mma_init(q)
        p_a, q_a = p_next, q_next
        ahead = gl.minimum(tile + STAGES - 1, TILES - 1) * 64
        async_copy.async_copy_global_to_shared(smem.index((tile + STAGES - 1) % STAGES), x + ahead)
        async_copy.commit_group()
    async_copy.wait_group(0)
    return warpgroup_mma_wait(0, deps=(p, q))


@gluon.jit
def _await_rows(smem, x, tile, TILES: gl.constexpr, STAGES: gl.constexpr):
    """Rows of `tile` as a second operand; starts the copy of those STAGES - 2 tiles ahead."""
    async_copy.wait_group(STAGES - 3)
    fence_async_shared()
    ahead = gl.minimum(tile + STAGES - 2, TILES - 1) * 64
    async_copy.async_copy_global_to_shared(smem.index((tile + STAGES - 2) % STAGES), x + ahead)
    async_copy.commit_group()
    return smem.index(tile % STAGES).permute((1, 0))


@gluon.jit
def _products_wide(
    p_w, p_s, p_strip, q_w, q_s, q_strip, x_ptr, rows,
    STRIPS: gl.constexpr, TILES: gl.constexpr, W: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """_products_gl for N = 128: products follow each other without a gap, each with operand registers of its own.

    2 to 4 % faster at 128 rows than the narrow loop when that loaded words two tiles ahead; 10 % slower at 16 rows,
    where its registers leave room for fewer programs.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, N, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    LAST: gl.constexpr = TILES - 1
    smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, N, 64], gl.NVMMASharedLayout(128, 16, 2))
    k = gl.arange(0, 64, gl.SliceLayout(0, _row_layout(W)))
    x = x_ptr + (rows * (TILES * 64))[:, None] + k[None, :]
    p_at = _pair_offsets(p_strip, STRIPS, TILES, W)
    q_at = _pair_offsets(q_strip, STRIPS, TILES, W)
    p_words, p_pairs = _load_tile(p_w, p_s, p_at, W)
    q_words, q_pairs = _load_tile(q_w, q_s, q_at, W)
    for s in gl.static_range(STAGES - 2):
        async_copy.async_copy_global_to_shared(smem.index(s), x + min(s, LAST) * 64)
        async_copy.commit_group()
    p_odd, p_odd_pairs = _load_tile(p_w, p_s, p_at + min(1, LAST) * 32, W)
    q_odd, q_odd_pairs = _load_tile(q_w, q_s, q_at + min(1, LAST) * 32, W)
    p0 = operand(p_words, p_pairs, W, 1, A)
    q0 = operand(q_words, q_pairs, W, 1, A)
    p_words, p_pairs = _load_tile(p_w, p_s, p_at + min(2, LAST) * 32, W)
    q_words, q_pairs = _load_tile(q_w, q_s, q_at + min(2, LAST) * 32, W)
    p = warpgroup_mma_init(gl.zeros((16 * W, N), gl.float32, MMA))
    q = warpgroup_mma_init(gl.zeros((16 * W, N), gl.float32, MMA))
    p1, q1 = p0, q0
    for tile in range(0, TILES - 1, 2):
        b = _await_rows(smem, x, tile, TILES, STAGES)
        p = warpgroup_mma(p0, b, p, is_async=True)
        q = warpgroup_mma(q0, b, q, is_async=True)
        warpgroup_mma_wait(2, deps=(p1, q1))
        p1 = operand(p_odd, p_odd_pairs, W, 1, A)
        q1 = operand(q_odd, q_odd_pairs, W, 1, A)
        ahead = gl.minimum(tile + 3, LAST) * 32
        p_odd, p_odd_pairs = _load_tile(p_w, p_s, p_at + ahead, W)
        q_odd, q_odd_pairs = _load_tile(q_w, q_s, q_at + ahead, W)
        b = _await_rows(smem, x, tile + 1, TILES, STAGES)
        p = warpgroup_mma(p1, b, p, is_async=True)
        q = warpgroup_mma(q1, b, q, is_async=True)
        warpgroup_mma_wait(2, deps=(p0, q0))
        p0 = operand(p_words, p_pairs, W, 1, A)
        q0 = operand(q_words, q_pairs, W, 1, A)
        ahead = gl.minimum(tile + 4, LAST) * 32
        p_words, p_pairs = _load_tile(p_w, p_s, p_at + ahead, W)
        q_words, q_pairs = _load_tile(q_w, q_s, q_at + ahead, W)
    if TILES % 2 == 1:
        # ptxas makes every product of the loop wait for its own end if the tail's may overlap with it.
        p, q, p1, q1 = warpgroup_mma_wait(0, deps=(p, q, p1, q1))
        p, q = warpgroup_mma_init(p), warpgroup_mma_init(q)
        b = _await_rows(smem, x, LAST, TILES, STAGES)
        p = warpgroup_mma(p0, b, p, is_async=True)
        q = warpgroup_mma(q0, b, q, is_async=True)
    p, q, p0, q0, p1, q1 = warpgroup_mma_wait(0, deps=(p, q, p0, q0, p1, q1))
    async_copy.wait_group(0)
    return p, q


@gluon.jit
def _products_gl(
    p_w, p_s, p_strip, q_w, q_s, q_strip, x_ptr, rows,
    STRIPS: gl.constexpr, TILES: gl.constexpr, W: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    """[16 W, N] of two sets of W strips with the same rows of x."""
    if N == 128:
        return _products_wide(p_w, p_s, p_strip, q_w, q_s, q_strip, x_ptr, rows, STRIPS, TILES, W, N, 6)
    else:
        return _products_narrow(p_w, p_s, p_strip, q_w, q_s, q_strip, x_ptr, rows, STRIPS, TILES, W, N, 4)


@constexpr_function
def _store_layout(W):
    """Of [16 W, N]: eight adjacent rows a lane."""
    return gl.BlockedLayout([8, 1], [2 * W, 16 // W], [1, W], [0, 1])


@gluon.jit
def _store_h_gl(
    h, strip, h_ptr, begin, count,
    STRIPS: gl.constexpr, COLUMNS: gl.constexpr, W: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    L: gl.constexpr = _store_layout(W)
    row = strip * 16 + gl.arange(0, 16 * W, gl.SliceLayout(1, h.type.layout))
    h = gl.where((row < STRIPS * 16)[:, None], h, 0.0).to(gl.bfloat16)
    h = gl.permute(gl.reshape(h, (W // 4, 4, 8, 2, N)), (0, 2, 1, 3, 4))  # c, (j, i2), i0
    h = gl.convert_layout(gl.reshape(h, (16 * W, N)), L)
    m = strip * 16 + gl.arange(0, 16 * W, gl.SliceLayout(1, L))
    n = gl.arange(0, N, gl.SliceLayout(0, L))
    at = (begin + n).to(gl.int64) * COLUMNS
    gl.store(h_ptr + at[None, :] + m[:, None], h, mask=(n < count)[None, :] & (m < COLUMNS)[:, None])


@gluon.jit
def _gate_up_tile(
    x_ptr, gate_w, gate_s, gate_scale, up_w, up_s, up_scale, order_ptr, h_ptr, begin, count,
    TOP: gl.constexpr, STRIPS: gl.constexpr, TILES: gl.constexpr, COLUMNS: gl.constexpr, GATED: gl.constexpr,
    KIND: gl.constexpr, W: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    n = gl.arange(0, N, gl.SliceLayout(1, _row_layout(W)))
    rows = gl.load(order_ptr + begin + gl.minimum(n, count - 1)).to(gl.int64) // TOP
    p_strip = gl.program_id(0) * (W if GATED else 2 * W)
    q_strip = p_strip if GATED else p_strip + W
    p, q = _products_gl(gate_w, gate_s, p_strip, up_w, up_s, q_strip, x_ptr, rows, STRIPS, TILES, W, N)
    p *= gate_scale
    q *= up_scale
    if GATED:
        _store_h_gl(activate_gl(p, q, KIND), p_strip, h_ptr, begin, count, STRIPS, COLUMNS, W, N)
    else:
        _store_h_gl(activate_gl(p, p, KIND), p_strip, h_ptr, begin, count, STRIPS, COLUMNS, W, N)
        _store_h_gl(activate_gl(q, q, KIND), q_strip, h_ptr, begin, count, STRIPS, COLUMNS, W, N)


@gluon.jit(do_not_specialize=["max_tiles"])
def gate_up_wgmma(
    x_ptr, gate_w, gate_s, gate_g, up_w, up_s, up_g, order_ptr, table_ptr, h_ptr, max_tiles,
    TOP: gl.constexpr, STRIPS: gl.constexpr, TILES: gl.constexpr, COLUMNS: gl.constexpr, GATED: gl.constexpr,
    KIND: gl.constexpr, W: gl.constexpr, BN: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """As gate_up_plain; a tile with few pairs takes a narrower product."""
    tile = gl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert = gl.load(table_ptr + tile).to(gl.int64)
    if expert >= 0:
        begin = gl.load(table_ptr + max_tiles + tile)
        count = gl.load(table_ptr + 2 * max_tiles + tile)
        base = expert * (STRIPS * TILES * 32)
        gate_w, gate_s, gate_scale = gate_w + base * 4, gate_s + base, gl.load(gate_g + expert) * 256.0
        up_w, up_s, up_scale = up_w + base * 4, up_s + base, gl.load(up_g + expert) * 256.0
        if count > BN // 2:
            _gate_up_tile(
                x_ptr, gate_w, gate_s, gate_scale, up_w, up_s, up_scale, order_ptr, h_ptr, begin, count,
                TOP, STRIPS, TILES, COLUMNS, GATED, KIND, W, BN,
            )  # fmt: skip
        elif count > BN // 4:
            _gate_up_tile(
                x_ptr, gate_w, gate_s, gate_scale, up_w, up_s, up_scale, order_ptr, h_ptr, begin, count,
                TOP, STRIPS, TILES, COLUMNS, GATED, KIND, W, BN // 2,
            )  # fmt: skip
        else:
            _gate_up_tile(
                x_ptr, gate_w, gate_s, gate_scale, up_w, up_s, up_scale, order_ptr, h_ptr, begin, count,
                TOP, STRIPS, TILES, COLUMNS, GATED, KIND, W, max(BN // 4, 16),
            )  # fmt: skip


@gluon.jit
def _down_tile(
    h_ptr, w, s, scale, order_ptr, y_ptr, begin, count,
    STRIPS: gl.constexpr, TILES: gl.constexpr, COLUMNS: gl.constexpr, W: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    L: gl.constexpr = _store_layout(W)
    rows = gl.minimum(gl.arange(0, N, gl.SliceLayout(1, _row_layout(W))), count - 1)
    strip = gl.program_id(0) * (2 * W)
    p, q = _products_gl(w, s, strip, w, s, strip + W, h_ptr, (begin + rows).to(gl.int64), STRIPS, TILES, W, N)
    n = gl.arange(0, N, gl.SliceLayout(0, L))
    live = (n < count)[None, :]
    pair = gl.load(order_ptr + begin + gl.minimum(n, count - 1)).to(gl.int64)
    m = strip * 16 + gl.arange(0, 16 * W, gl.SliceLayout(1, L))[:, None]
    to = y_ptr + (pair * COLUMNS)[None, :] + m
    gl.store(to, gl.convert_layout((p * scale).to(gl.bfloat16), L), mask=live & (m < COLUMNS))
    gl.store(to + 16 * W, gl.convert_layout((q * scale).to(gl.bfloat16), L), mask=live & (m + 16 * W < COLUMNS))


@gluon.jit(do_not_specialize=["max_tiles"])
def down_wgmma(
    h_ptr, down_w, down_s, down_g, order_ptr, table_ptr, y_ptr, max_tiles,
    STRIPS: gl.constexpr, TILES: gl.constexpr, COLUMNS: gl.constexpr, W: gl.constexpr, BN: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """As down_plain; a tile with few pairs takes a narrower product."""
    tile = gl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert = gl.load(table_ptr + tile).to(gl.int64)
    if expert >= 0:
        begin = gl.load(table_ptr + max_tiles + tile)
        count = gl.load(table_ptr + 2 * max_tiles + tile)
        base = expert * (STRIPS * TILES * 32)
        w, s, scale = down_w + base * 4, down_s + base, gl.load(down_g + expert) * 256.0
        if count > BN // 2:
            _down_tile(h_ptr, w, s, scale, order_ptr, y_ptr, begin, count, STRIPS, TILES, COLUMNS, W, BN)
        elif count > BN // 4:
            _down_tile(h_ptr, w, s, scale, order_ptr, y_ptr, begin, count, STRIPS, TILES, COLUMNS, W, BN // 2)
        else:
            _down_tile(h_ptr, w, s, scale, order_ptr, y_ptr, begin, count, STRIPS, TILES, COLUMNS, W, max(BN // 4, 16))
