"""Weights as operands of matrix products: fragments decoded in registers."""

import torch
from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moe_nvfp4.kernels.fragments import FragmentTensor


def pairs_of(weight: FragmentTensor) -> torch.Tensor:
    """The two scales of a lane as one value to load; sign is of no meaning."""
    return weight.scales.view(torch.int16)


@gluon.jit
def decode(word, scale_lo, scale_hi):
    """The eight codes of a word times their scales, 2^-8 times the weight, as bf16: e[4 i2 + 2 i1 + i0]."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 t, u, a, b, c, d;
        and.b32 a, $8, 0x81C081C0;
        shl.b32 t, $8, 3; and.b32 b, t, 0x81C081C0;
        shl.b32 t, $8, 6; shl.b32 u, $8, 2; and.b32 u, u, 0x80008000; lop3.b32 c, t, 0x01C001C0, u, 0xEA;
        shr.u32 t, $8, 3; shl.b32 u, $8, 1; and.b32 u, u, 0x80008000; lop3.b32 d, t, 0x01C001C0, u, 0xEA;
        mov.b32 u, 0x80008000;
        fma.rn.bf16x2 a, a, $9, u; fma.rn.bf16x2 b, b, $10, u;
        fma.rn.bf16x2 c, c, $9, u; fma.rn.bf16x2 d, d, $10, u;
        mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b; mov.b32 {$4, $5}, c; mov.b32 {$6, $7}, d;
        }""",
        "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r",
        [word, scale_lo, scale_hi],
        dtype=(gl.bfloat16,) * 8,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def operand(words, pairs, W: gl.constexpr, KT: gl.constexpr, A: gl.constexpr):
    """A [16 W, 64 KT] in the registers of a dot operand, from words [W, KT, 8, 4, 4] and scale pairs [W, KT, 8, 4]."""
    pairs = pairs.to(gl.int32)
    lo = gl.expand_dims((pairs & 0xFF) * 0x00100010 + 0x75807580, 4)
    hi = gl.expand_dims(((pairs >> 8) & 0xFF) * 0x00100010 + 0x75807580, 4)
    words, lo = gl.broadcast(words, lo)
    words, hi = gl.broadcast(words, hi)
    return arranged(decode(words, lo, hi), W, KT, A)


@gluon.jit
def arranged(e, W: gl.constexpr, KT: gl.constexpr, A: gl.constexpr):
    """A [16 W, 64 KT] from e[4 i2 + 2 i1 + i0] of [W, KT, 8, 4, 4]."""
    e0, e1, e2, e3, e4, e5, e6, e7 = e
    x = gl.join(gl.join(gl.join(e0, e1), gl.join(e2, e3)), gl.join(gl.join(e4, e5), gl.join(e6, e7)))
    x = gl.permute(x, (0, 6, 2, 1, 4, 7, 3, 5))  # w, i1, r, kt, j, i2, c, i0
    return gl.convert_layout(gl.reshape(x, (16 * W, 64 * KT)), A, assert_trivial=True)


@constexpr_function
def word_layout(W, KT):
    """Of words [W, KT, 8, 4, 4]: a lane of warp w holds its four words of KT tiles."""
    return gl.BlockedLayout([1, KT, 1, 1, 4], [1, 1, 8, 4, 1], [W, 1, 1, 1, 1], [4, 3, 2, 1, 0])


@constexpr_function
def only_dim(layout, rank, dim):
    """The layout of one dimension of a tensor."""
    for other in reversed([d for d in range(rank) if d != dim]):
        layout = gl.SliceLayout(other, layout)
    return layout
