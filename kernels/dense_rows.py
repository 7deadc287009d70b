"""Dense linears of 1 to 16 rows on tensor cores, y[m, n] = sum_k x[m, k] w[n, k]; memory bound.

A strip is 16 rows of the weight, the first operand of `mma.m16n8k16`; eight rows of x are the second. All formats
share one order of k in the operands, which makes a lane's bytes adjacent, in the weight and in x: lane (r, c) holds
of a tile the columns (c, j, i2, i0) as operand index (j; i2, c, i0), see `fragments.py`.

    nvfp4  tile of 64 columns: 16 bytes of words, a pair of scales
    fp8    tile of 64 columns: 16 bytes of row r and 16 of row r + 8, row-major [N, K]
    bf16   tile of 32 columns: likewise

The warps of a program share the tiles of K between them and meet in shared memory once, at the end; every sum has a
fixed order. Decoding costs 1.4 (nvfp4) and 2 (fp8) integer operations a weight, whatever the number of rows.
"""

from dataclasses import replace
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor
from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_nvfp4.kernels.compiling import ARCHITECTURES, CompileCase
from moe_nvfp4.kernels.fragments import FragmentTensor
from moe_nvfp4.kernels.nvfp4 import FP8Tensor
from moe_nvfp4.kernels.sizes import capability

Kind = Literal["nvfp4", "fp8", "bf16"]
DenseWeight = Tensor | FP8Tensor | FragmentTensor
TILE_COLUMNS: Final = {"nvfp4": 64, "fp8": 64, "bf16": 32}


class Tiling(NamedTuple):
    """How a program works: `span` strips, their tiles shared by its warps; tiles ahead, of weight and of x."""

    warps: int
    span: int
    depth: int
    x_depth: int


@constexpr_function
def tile_asm(kind, groups):
    """One tile: decode the lane's part of the weight and multiply it by `groups` times eight rows of x."""
    words, xs = {"nvfp4": 2, "fp8": 4, "bf16": 4}[kind], (2 if kind == "bf16" else 4)
    operand = 4 * groups
    lines = [".reg .b32 w<8>, x<8>, a<4>, t, u, lo, hi, z;"]
    for i in range(words):
        lines.append(f"mov.b64 {{w{2 * i}, w{2 * i + 1}}}, ${operand + i};")
    operand += words
    if kind == "nvfp4":
        # Bytes to the low halves of both scales of a pair, then E4M3 bits + 10 * 8 to bfloat16 times 2^118.
        lines += [f"prmt.b32 lo, ${operand}, 0, 0x4040; mad.lo.u32 lo, lo, 16, 0x75807580;"]
        lines += [f"prmt.b32 hi, ${operand}, 0, 0x4141; mad.lo.u32 hi, hi, 16, 0x75807580;"]
        operand += 1
    lines += ["mov.b32 z, 0x80008000;"]
    for g in range(groups):
        lines += [f".reg .b32 x{g}_<8>; .reg .f32 d{g}_<4>;"]
        lines += [f"mov.b64 {{x{g}_{2 * i}, x{g}_{2 * i + 1}}}, ${operand + g * xs + i};" for i in range(xs)]
    operand += groups * xs
    lines += [f"mov.b32 d{g}_{i}, ${operand + 4 * g + i};" for g in range(groups) for i in range(4)]
    for j in range(xs):
        lines += decode_lines(kind, j)
        for g in range(groups):
            d = ", ".join(f"d{g}_{i}" for i in range(4))
            lines += [
                f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{{d}}}, {{a0, a1, a2, a3}}, "
                f"{{x{g}_{2 * j}, x{g}_{2 * j + 1}}}, {{{d}}};"
            ]
    lines += [f"mov.b32 ${4 * g + i}, d{g}_{i};" for g in range(groups) for i in range(4)]
    return "{\n" + "\n".join(lines) + "\n}"


@constexpr_function
def decode_lines(kind, j):
    """The operand a0..a3 = (row r, k low), (r + 8, low), (r, high), (r + 8, high) of step j of a tile."""
    if kind == "bf16":
        return [f"mov.b32 a{2 * i2 + i1}, w{4 * i1 + 2 * j + i2};" for i2 in range(2) for i1 in range(2)]
    if kind == "nvfp4":
        w = f"w{j}"
        return [
            f"and.b32 a0, {w}, 0x81C081C0;",
            f"shl.b32 t, {w}, 3; and.b32 a1, t, 0x81C081C0;",
            f"shl.b32 t, {w}, 6; shl.b32 u, {w}, 2; and.b32 u, u, 0x80008000; lop3.b32 a2, t, 0x01C001C0, u, 0xEA;",
            f"shr.u32 t, {w}, 3; shl.b32 u, {w}, 1; and.b32 u, u, 0x80008000; lop3.b32 a3, t, 0x01C001C0, u, 0xEA;",
            *(f"fma.rn.bf16x2 a{i}, a{i}, {('lo', 'hi')[i % 2]}, z;" for i in range(4)),
        ]
    lines = ["mov.b32 u, 0x7B807B80; "]  # 2^120 twice: E4M3 bits moved to bfloat16's place are that much too small
    for i2, select in enumerate(("0x1404", "0x3424")):
        for i1 in range(2):
            a = f"a{2 * i2 + i1}"
            lines += [
                f"prmt.b32 {a}, w{4 * i1 + j}, 0, {select}; shr.u32 t, {a}, 4; and.b32 t, t, 0x07F007F0;",
                f"lop3.b32 {a}, {a}, 0x80008000, t, 0xEA; fma.rn.bf16x2 {a}, {a}, u, z;",
            ]
    return lines


@constexpr_function
def tile_constraints(kind, groups):
    words, xs = {"nvfp4": 2, "fp8": 4, "bf16": 4}[kind], (2 if kind == "bf16" else 4)
    inputs = ["l"] * words + ["r"] * (kind == "nvfp4") + ["l"] * (groups * xs) + ["f"] * (4 * groups)
    return ",".join(["=f"] * (4 * groups) + inputs)


@constexpr_function
def tile_types(groups):
    return (gl.float32,) * (4 * groups)


@constexpr_function
def pair_layout(warps):
    """Of [warps, 32 lanes, 2]: 16 bytes of int64 to a lane."""
    return gl.BlockedLayout([1, 1, 2], [1, 32, 1], [warps, 1, 1], [2, 1, 0])


@gluon.jit
def halves(pairs, W: gl.constexpr):
    """[W, 32, 2] int64 -> two of [W, 32]."""
    LANES: gl.constexpr = gl.SliceLayout(2, pair_layout(W))
    low, high = gl.split(pairs)
    return gl.convert_layout(low, LANES, assert_trivial=True), gl.convert_layout(high, LANES, assert_trivial=True)


@gluon.jit
def adjacent(ptr, at, W: gl.constexpr):
    """Pointers [W, 32, 2] to two int64 for each lane."""
    return ptr + (at[:, :, None] + gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, pair_layout(W))))[None, None, :])


@gluon.jit
def tile_pointers(
    w_ptr, N, strip, tile, lane, KIND: gl.constexpr, TILES: gl.constexpr, W: gl.constexpr
):  # fmt: skip
    """The lanes' 16 bytes of tile[w] of a strip, for row-major weights of rows r and r + 8; rows stop at the last."""
    first = strip.to(gl.int64) * TILES
    if KIND == "nvfp4":
        return (adjacent(w_ptr + first * 64, (tile * 32 + lane) * 2, W),)
    else:
        last, at = N - 1 - strip * 16, tile * 8 + (lane % 4) * 2
        w_ptr += first * 128
        low = adjacent(w_ptr, at + gl.minimum(lane // 4, last) * (TILES * 8), W)
        return low, adjacent(w_ptr, at + gl.minimum(lane // 4 + 8, last) * (TILES * 8), W)


@gluon.jit
def start_step(
    ring, w_ptr, s_ptr, N, strip, warp, lane, STEP: gl.constexpr,
    KIND: gl.constexpr, TILES: gl.constexpr, W: gl.constexpr, SPAN: gl.constexpr,
    DEPTH: gl.constexpr,
):  # fmt: skip
    """Start the copies of a step's tiles to the ring; return the scale pairs. What is past the end repeats the end."""
    COPIES: gl.constexpr = 1 if KIND == "nvfp4" else 2
    tile = gl.minimum(STEP * W + warp, TILES - 1)
    pairs = ()
    for s in gl.static_range(SPAN):
        at = gl.minimum(strip + s, (N - 1) // 16)
        pointers = tile_pointers(w_ptr, N, at, tile, lane, KIND, TILES, W)
        for i in gl.static_range(COPIES):
            async_copy.async_copy_global_to_shared(ring[(STEP % DEPTH * SPAN + s) * COPIES + i], pointers[i])
        if KIND == "nvfp4":
            pair = gl.load(s_ptr + at.to(gl.int64) * (TILES * 32) + (tile * 32 + lane))
            pairs = pairs + ((pair.to(gl.int32),),)  # noqa: RUF005
        else:
            pairs = pairs + ((),)  # noqa: RUF005
    async_copy.commit_group()
    return pairs


@gluon.jit
def finish_step(
    ring, pair, STEP: gl.constexpr, S: gl.constexpr,
    KIND: gl.constexpr, W: gl.constexpr, SPAN: gl.constexpr, DEPTH: gl.constexpr,
):  # fmt: skip
    """The operands of one strip of a step whose copies have arrived."""
    COPIES: gl.constexpr = 1 if KIND == "nvfp4" else 2
    out = ()
    for i in gl.static_range(COPIES):
        out = out + halves(ring[(STEP % DEPTH * SPAN + S) * COPIES + i].load(pair_layout(W)), W)
    return out + pair


@gluon.jit
def load_x(x_ptr, tile, lane, rows, KIND: gl.constexpr, TILES: gl.constexpr, GROUPS: gl.constexpr, W: gl.constexpr):
    """The lanes' part of tile[w] of eight rows of x, GROUPS times; zero past the last row and tile."""
    EACH: gl.constexpr = 2 if KIND == "bf16" else 4
    half = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, pair_layout(W))))[None, None, :]
    out = ()
    for g in gl.static_range(GROUPS):
        row = lane // 4 + 8 * g
        at = (row * TILES + tile) * (4 * EACH) + (lane % 4) * EACH
        live = ((row < rows) & (tile < TILES))[:, :, None]
        for i in gl.static_range(EACH // 2):
            out = out + halves(gl.load(adjacent(x_ptr, at + 2 * i, W), mask=live & (half >= 0), other=0), W)
    return out


@gluon.jit
def multiply(weight, x, acc, KIND: gl.constexpr, GROUPS: gl.constexpr):
    ASM: gl.constexpr = tile_asm(KIND, GROUPS)
    CONSTRAINTS: gl.constexpr = tile_constraints(KIND, GROUPS)
    return gl.inline_asm_elementwise(ASM, CONSTRAINTS, weight + x + acc, dtype=tile_types(GROUPS), is_pure=True, pack=1)


@gluon.jit
def block_of(acc, GROUPS: gl.constexpr, W: gl.constexpr):
    """Accumulators [W, 32] of a strip, four for each group of eight rows of x, to [W, GROUPS * 8 m * 16 n]."""
    out = acc[0]
    if GROUPS == 2:
        low = gl.join(gl.join(acc[0], acc[1]), gl.join(acc[2], acc[3]))  # w, lane, i0, i1
        high = gl.join(gl.join(acc[4], acc[5]), gl.join(acc[6], acc[7]))
        both = gl.reshape(gl.join(low, high), (W, 8, 4, 2, 2, 2))  # w, r, c, i0, i1, g
        out = gl.reshape(gl.permute(both, (0, 5, 2, 3, 4, 1)), (W, 256))
    else:
        one = gl.reshape(gl.join(gl.join(acc[0], acc[1]), gl.join(acc[2], acc[3])), (W, 8, 4, 2, 2))
        out = gl.reshape(gl.permute(one, (0, 2, 3, 4, 1)), (W, 128))
    return out


@gluon.jit
def load_scale(g_ptr, N, scale_step, strip, KIND: gl.constexpr, ONE: gl.constexpr, GROUPS: gl.constexpr):
    """The factor of each element of a strip's block of y; one for every strip (nvfp4) or row (fp8), or for all."""
    n = strip * 16 + gl.arange(0, 128 * GROUPS, gl.SliceLayout(0, ONE)) % 16
    if KIND == "nvfp4":
        return 256.0 * gl.load(g_ptr + n // 16 * scale_step, mask=n < N, other=0.0)  # operands are 2^-8 the weights
    elif KIND == "fp8":
        return gl.load(g_ptr + n * scale_step, mask=n < N, other=0.0)
    else:
        return 1.0


@gluon.jit(do_not_specialize=["M"])
def dense_rows_kernel(
    x_ptr, w_ptr, s_ptr, g_ptr, y_ptr, M, N, scale_step,
    K: gl.constexpr, KIND: gl.constexpr, GROUPS: gl.constexpr, W: gl.constexpr, SPAN: gl.constexpr,
    DEPTH: gl.constexpr, X_DEPTH: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    LANES: gl.constexpr = gl.SliceLayout(2, pair_layout(W))
    TILES: gl.constexpr = K // (32 if KIND == "bf16" else 64)
    STEPS: gl.constexpr = (TILES + W - 1) // W
    AHEAD: gl.constexpr = DEPTH if DEPTH < STEPS else STEPS
    X_AHEAD: gl.constexpr = X_DEPTH if X_DEPTH < STEPS else STEPS
    # Of [W, elements of y]: each thread takes a few elements, sums them over W, and no two take the same.
    ONE: gl.constexpr = gl.BlockedLayout([W, 1], [1, 32], [1, W], [1, 0])
    warp = gl.arange(0, W, gl.SliceLayout(1, LANES))[:, None]
    lane = gl.arange(0, 32, gl.SliceLayout(0, LANES))[None, :]
    first_row = gl.program_id(0) * (8 * GROUPS)
    strip = gl.program_id(1) * SPAN
    x_ptr += first_row.to(gl.int64) * (K // 4)
    # One allocation for each copy: two places of one allocation would look dependent and cost a barrier.
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    ring = ()
    for _ in gl.static_range(AHEAD * SPAN * (1 if KIND == "nvfp4" else 2)):
        ring = ring + (gl.allocate_shared_memory(gl.int64, (W, 32, 2), FLAT),)  # noqa: RUF005
    # First whatever does not depend on the kernel before this one.
    pairs = ()
    for i in gl.static_range(AHEAD):
        pairs = pairs + start_step(ring, w_ptr, s_ptr, N, strip, warp, lane, i, KIND, TILES, W, SPAN, AHEAD)
    scales = ()
    for s in gl.static_range(SPAN):
        scales = scales + (load_scale(g_ptr, N, scale_step, strip + s, KIND, ONE, GROUPS),)  # noqa: RUF005
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    accs = ((gl.zeros((W, 32), gl.float32, LANES),) * (4 * GROUPS),) * SPAN
    xs = ()
    for i in gl.static_range(X_AHEAD):
        xs = xs + (load_x(x_ptr, i * W + warp, lane, M - first_row, KIND, TILES, GROUPS, W),)  # noqa: RUF005
    for i in gl.static_range(STEPS):
        if i + X_AHEAD < STEPS:
            tile = (i + X_AHEAD) * W + warp
            xs = xs + (load_x(x_ptr, tile, lane, M - first_row, KIND, TILES, GROUPS, W),)  # noqa: RUF005
        async_copy.wait_group((i + AHEAD if i + AHEAD < STEPS else STEPS) - (i + 1))
        sums = ()
        for s in gl.static_range(SPAN):
            tiles = finish_step(ring, pairs[i * SPAN + s], i, s, KIND, W, SPAN, AHEAD)
            sums = sums + (multiply(tiles, xs[i], accs[s], KIND, GROUPS),)  # noqa: RUF005
        accs = sums
        if i + AHEAD < STEPS:
            pairs = pairs + start_step(ring, w_ptr, s_ptr, N, strip, warp, lane, i + AHEAD, KIND, TILES, W, SPAN, AHEAD)
    for s in gl.static_range(SPAN):
        y = gl.sum(gl.convert_layout(block_of(accs[s], GROUPS, W), ONE), 0) * scales[s]
        index = gl.arange(0, 128 * GROUPS, gl.SliceLayout(0, ONE))
        m, n = first_row + index // 16, (strip + s) * 16 + index % 16
        gl.store(y_ptr + m.to(gl.int64) * N + n, y.to(y_ptr.dtype.element_ty), mask=(m < M) & (n < N))


def fits(x_MK: Tensor, weight: DenseWeight) -> bool:
    """Whether dense_rows takes them: whole tiles, and addresses for loads of 16 bytes."""
    kind, words = kind_of(weight), weight if isinstance(weight, Tensor) else weight[0]
    aligned = all(part.is_contiguous() and part.data_ptr() % 16 == 0 for part in (x_MK, words))
    return aligned and x_MK.dtype == torch.bfloat16 and x_MK.shape[1] % TILE_COLUMNS[kind] == 0


def dense_rows(
    x_MK: Tensor,
    weight: DenseWeight,
    *,
    dependent: bool = False,
    tiling: Tiling | None = None,
    groups: int | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The launcher; its twin is `dense_linear_torch` in dense.py. More than 16 rows read the weight repeatedly.
    `groups`: of eight rows, those of a program, 1 or 2; they choose the tiling, and that the order of sums."""
    (rows, columns), num_out = x_MK.shape, weight.shape[0]
    y_MN = torch.empty(rows, num_out, dtype=out_dtype, device=x_MK.device)
    kind, groups, strips = kind_of(weight), groups or (1 if rows <= 8 else 2), -(-num_out // 16)
    *parts, step = parts_of(weight)
    tiling = tiling or tiling_for(kind, strips, columns // TILE_COLUMNS[kind], groups)
    dependent = dependent and capability(x_MK.device)[0] >= 9
    dense_rows_kernel[(-(-rows // (8 * groups)), -(-strips // tiling.span))](
        x_MK.view(torch.int64), *parts, y_MN, rows, num_out, step,
        K=columns, KIND=kind, GROUPS=groups, W=tiling.warps, SPAN=tiling.span, DEPTH=tiling.depth,
        X_DEPTH=tiling.x_depth, PDL=dependent, num_warps=tiling.warps, launch_pdl=dependent,
    )  # fmt: skip
    return y_MN


def parts_of(weight: DenseWeight) -> tuple[Tensor, Tensor, Tensor, int]:
    """What kernels take: int64 words, scales, global scales, and 1 if there are several of the last, else 0."""
    if isinstance(weight, FragmentTensor):
        scale = weight.global_scale
        return weight.words.view(torch.int64), weight.scales.view(torch.int16), scale, min(scale.ndim, 1)
    if isinstance(weight, FP8Tensor):
        return weight.values.view(torch.int64), weight.values, weight.scale, min(weight.scale.ndim, 1)
    return weight.view(torch.int64), weight, weight, 0  # kernels do not read the last two


def kind_of(weight: DenseWeight) -> Kind:
    if isinstance(weight, FragmentTensor):
        return "nvfp4"
    return "fp8" if isinstance(weight, FP8Tensor) else "bf16"


def tiling_for(kind: Kind, strips: int, tiles: int, groups: int) -> Tiling:
    """Best of a dozen on one H200 with dependent launch; numbers are µs at 1 (then at 16) rows.

    What was seen: from 400 strips on more copies in flight are slower, below that more warps are faster, and two
    strips a program pay from about 600. The causes are guesses: x waiting behind the copies, too few loads, last waves.
    """
    if strips >= 4096 and kind == "nvfp4":  # 248320 x 2048: 75 (100); Tiling(8, 1, 2, 2): 96 (149)
        return Tiling(4, 2, 2 * groups, 2)
    if strips >= 4096:  # bf16 262144 x 2816: 345 (369); Tiling(4, 2, 2, 2): 397
        return Tiling(16, 1, 2, 2) if groups == 1 else Tiling(8, 1, 4, 2)
    if strips >= 600:  # fp8 12288 x 2048: 7.8 (9.8); Tiling(8, 1, 2, 2): 8.8 (12.2)
        return Tiling(8, 2, 2, 2) if groups == 1 else Tiling(4, 2, 4, 2)
    if strips >= 400:  # fp8 8192 x 2048: 5.7 (6.7); Tiling(8, 1, 4, 4): 6.7 (8.6), Tiling(4, 1, 8, 4): 6.2 (8.4)
        return Tiling(8, groups, 4 if kind == "bf16" and groups == 2 else 2, 2)
    if groups == 2 and strips < 160 and tiles >= 48 and kind == "fp8":  # 2048 x 4096: (4.8); Tiling(8, 1, 3, 3): (6.0)
        return Tiling(16, 1, 2, 2)
    if (
        groups == 2
    ):  # nvfp4 4096 x 2816: (4.4) against (4.8) with Tiling(8, 1, 4, 4); bf16 2816 x 8192: (18.2) to (17.5)
        return Tiling(8, 1, 4, 4) if tiles > 128 else Tiling(8, 1, 3, 3)
    if strips >= 200:  # fp8 3712 x 2688: 4.5; Tiling(16, 1, 4, 4): 4.9
        return Tiling(8, 1, 8, 4)
    return Tiling(16, 1, 4, 4)  # nvfp4 2688 x 4096: 3.6, bf16 2112 x 2816: 3.9; Tiling(8, 1, 4, 4): 4.5, 4.2


def compile_cases() -> list[CompileCase]:
    words = {"x_ptr": "*i64", "w_ptr": "*i64", "y_ptr": "*bf16", "M": "i32", "N": "i32", "scale_step": "i32"}
    parts: dict[Kind, tuple[str, str]] = {
        "nvfp4": ("*i16", "*fp32"),
        "fp8": ("*u8", "*fp32"),
        "bf16": ("*bf16", "*bf16"),
    }
    cases = []
    for kind, (s_ptr, g_ptr) in parts.items():
        for num_out, columns in ((248320, 2048), (8192, 2816), (2816, 8192), (512, 2112), (1, 4096)):
            for groups in (1, 2):
                tiling = tiling_for(kind, -(-num_out // 16), columns // TILE_COLUMNS[kind], groups)
                for dependent in (False, True):
                    constexprs = {
                        "K": columns, "KIND": kind, "GROUPS": groups, "W": tiling.warps, "SPAN": tiling.span,
                        "DEPTH": tiling.depth, "X_DEPTH": tiling.x_depth, "PDL": dependent,
                    }  # fmt: skip
                    cases.append(
                        CompileCase(
                            name=f"dense_rows {kind} {num_out} x {columns}, {8 * groups} rows, {dependent}",
                            function=dense_rows_kernel,
                            signature={**words, "s_ptr": s_ptr, "g_ptr": g_ptr},
                            constexprs=constexprs,
                            options={"num_warps": tiling.warps, "launch_pdl": dependent},
                            architectures=(90, 100, 120) if dependent else ARCHITECTURES,
                        )
                    )
    wide = next(case for case in cases if "bf16 248320" in case.name)
    signature = {**wide.signature, "y_ptr": "*fp32"}
    return [*cases, replace(wide, name=f"{wide.name}, float32", signature=signature)]
