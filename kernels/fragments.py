"""The layout of NVFP4 weights for tensor cores: every lane's operands lie together, ready to be decoded in place.

A tile is 16 rows by 64 columns, the A operands of four `mma.m16n8k16`. Lane (r, c), r < 8, c < 4, reads four words
of eight codes and two scales; nothing moves between lanes, and 32 lanes read 512 adjacent bytes.

    words  [..., N/16, K/64, 8 r, 4 c, 4 j]  int32   rows n = 16 s + 8 i1 + r, columns k = 64 t + 16 c + 4 j + 2 i2 + i0
    scales [..., N/16, K/64, 8 r, 4 c, 2 i1] uint8   of row n and column group 4 t + c

Within a tile the operand's k index is (j, i2, c, i0) while the weight's column is (c, j, i2, i0): sums over k do not
mind as long as the activations are read the same way (`fragment_columns`), and each lane needs only the scales of
one group, and 32 adjacent bytes of a bfloat16 row.

A word is two halves, i0 = 0 low. A half holds the four codes (i1, i2), sign and magnitude apart, so that the
bfloat16 pair of each comes out with one to four instructions; a magnitude in bits 8..6 is its value times 2^-126.

    bit   15 | 14 | 13 | 12 | 11..9   | 8..6    | 5..3    | 2..0
    code  s0 | s3 | s2 | s1 | m3      | m0      | m1      | m2      with 0 = (0, 0), 1 = (1, 0), 2 = (0, 1), 3 = (1, 1)

A scale is eight bits, exponent + 10 in the upper five and the three bits of the mantissa: E4M3 without its subnormals,
so that it becomes a float by a shift and an addition. A block whose scale is zero gets codes of zero instead.
"""

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_nvfp4.kernels.compiling import CompileCase
from moe_nvfp4.kernels.nvfp4 import NVFP4Tensor, decode_e4m3, encode_e4m3, pack, unpack
from moe_nvfp4.kernels.sizes import next_power_of_2

ROWS: Final = 16
COLUMNS: Final = 64
SCALE_BIAS: Final = 10
_SIGN_BITS: Final = (15, 12, 13, 14)
_MAGNITUDE_BITS: Final = (6, 3, 0, 9)


class FragmentTensor(NamedTuple):
    """An NVFP4 weight [..., N, K] in fragments; N is a multiple of 16 and K of 64, padded with zeros."""

    words: Tensor  # int32 [..., N/16, K/64, 8, 4, 4]
    scales: Tensor  # uint8 [..., N/16, K/64, 8, 4, 2]
    global_scale: Tensor  # float32 [...]

    @property
    def shape(self) -> torch.Size:
        *batch, strips, tiles = self.words.shape[:-3]
        return torch.Size((*batch, ROWS * strips, COLUMNS * tiles))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self)


def fits_in_place(rows: int, columns: int) -> bool:
    """Whether a weight can be re-ordered in the memory it has, without padding."""
    return rows % ROWS == 0 and columns % COLUMNS == 0


def to_fragments(weight: NVFP4Tensor) -> FragmentTensor:
    """The torch twin of the repack. Block scales are not negative and not NaN, which loading makes sure of."""
    codes, scales = unpack(weight.codes), weight.block_scales & 0x7F
    codes = torch.where((scales == 0).repeat_interleave(16, dim=-1), codes.new_zeros(()), codes)
    codes, scales = _pad(codes, ROWS, COLUMNS, 0), _pad(scales, ROWS, COLUMNS // 16, 0)
    *batch, rows, columns = codes.shape
    tiled = codes.reshape(*batch, rows // 16, 2, 8, columns // 64, 4, 4, 2, 2)  # s, i1, r, t, c, j, i2, i0
    order = [*range(len(batch)), *(len(batch) + d for d in (0, 3, 2, 4, 5, 7, 6, 1))]  # s, t, r, c, j, i0, i2, i1
    fields = tiled.permute(order).flatten(-2).long()  # [..., i0, code]: code = 2 i2 + i1
    halves = torch.zeros_like(fields[..., 0])
    for code in range(4):
        halves |= (fields[..., code] >> 3) << _SIGN_BITS[code]
        halves |= (fields[..., code] & 7) << _MAGNITUDE_BITS[code]
    words = halves[..., 0] | (halves[..., 1] << 16)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    blocks = _encode_scales(scales).reshape(*batch, rows // 16, 2, 8, columns // 64, 4)  # s, i1, r, t, c
    order = [*range(len(batch)), *(len(batch) + d for d in (0, 3, 2, 4, 1))]
    return FragmentTensor(words.contiguous(), blocks.permute(order).contiguous(), weight.global_scale)


def from_fragments(weight: FragmentTensor) -> NVFP4Tensor:
    """The inverse, up to padding, and up to codes of blocks whose scale was zero."""
    *batch, strips, tiles = weight.words.shape[:-3]
    words = weight.words.long() & 0xFFFFFFFF
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1)
    codes = torch.stack(
        [((halves >> _SIGN_BITS[code] & 1) << 3) | (halves >> _MAGNITUDE_BITS[code] & 7) for code in range(4)],
        dim=-1,
    )  # s, t, r, c, j, i0, (i2, i1)
    codes = codes.unflatten(-1, (2, 2))
    b = len(batch)
    order = [*range(b), *(b + d for d in (0, 7, 2, 1, 3, 4, 6, 5))]  # s, i1, r, t, c, j, i2, i0
    codes = codes.permute(order).reshape(*batch, strips * ROWS, tiles * COLUMNS).to(torch.uint8)
    order = [*range(b), *(b + d for d in (0, 4, 2, 1, 3))]
    scales = weight.scales.permute(order).reshape(*batch, strips * ROWS, tiles * 4)
    return NVFP4Tensor(pack(codes), encode_e4m3(decode_scales(scales)), weight.global_scale)


def decode_scales(scales: Tensor) -> Tensor:
    """float32 values of re-encoded scales; the byte 0, which padding has, is taken for zero's stand-in 2^-10."""
    return ((scales.int() << 20) + ((127 - SCALE_BIAS) << 23)).view(torch.float32)


def fragment_columns(columns: int, device: torch.device | str = "cpu") -> Tensor:
    """Weight column of each operand position: x[:, fragment_columns(K)] matches the k index of the fragments."""
    t, j, i2, c, i0 = torch.meshgrid(
        *(torch.arange(n, device=device) for n in (columns // COLUMNS, 4, 2, 4, 2)), indexing="ij"
    )
    return (64 * t + 16 * c + 4 * j + 2 * i2 + i0).flatten()


def _encode_scales(bits: Tensor) -> Tensor:
    value = decode_e4m3(bits)
    raw = value.view(torch.int32) >> 20  # sign 0, exponent, three bits of mantissa
    return torch.where(bits == 0, 0, raw - ((127 - SCALE_BIAS) << 3)).to(torch.uint8)


def _pad(x: Tensor, rows: int, columns: int, value: int) -> Tensor:
    *_, n, k = x.shape
    return torch.nn.functional.pad(x, (0, -k % columns, 0, -n % rows), value=value)


def repack_in_place(weight: NVFP4Tensor) -> FragmentTensor:
    """The same weight in fragments, in the memory it had: each strip of 16 rows is read whole, then written.

    N must be a multiple of 16 and K of 64; others need the padding of `to_fragments`.
    """
    *batch, rows, half = weight.codes.shape
    columns = 2 * half
    if not fits_in_place(rows, columns):
        raise ValueError(f"weight [{rows}, {columns}]: in place needs rows in 16s and columns in 64s")
    tiles, strips = columns // COLUMNS, weight.codes.numel() // (8 * columns)
    if strips:
        block = next_power_of_2(tiles)
        _repack[(strips,)](weight.codes, weight.block_scales, TILES=tiles, BLOCK=block, num_warps=8)
    words = weight.codes.view(torch.int32).view(*batch, rows // ROWS, tiles, 8, 4, 4)
    return FragmentTensor(words, weight.block_scales.view(*batch, rows // ROWS, tiles, 8, 4, 2), weight.global_scale)


@triton.jit
def _repack(codes, scales, TILES: tl.constexpr, BLOCK: tl.constexpr):
    """One strip: 16 rows of 32 TILES bytes of codes and 4 TILES of scales, each strip in its own memory."""
    codes += tl.program_id(0).to(tl.int64) * (512 * TILES)
    scales += tl.program_id(0).to(tl.int64) * (64 * TILES)
    # Dims t, r, c, j. A byte has the codes of i0 = 0 and 1; its neighbour those of i2 = 1.
    word = tl.arange(0, BLOCK * 128)
    t, r, c, j = word // 128, word // 16 % 8, word // 4 % 4, word % 4
    live = t < TILES
    source = r * (32 * TILES) + t * 32 + c * 8 + j * 2
    scale = r * (4 * TILES) + t * 4 + c
    upper = tl.load(scales + scale, mask=live, other=0)
    lower = tl.load(scales + scale + 32 * TILES, mask=live, other=0)
    byte0 = tl.load(codes + source, mask=live, other=0).to(tl.uint32)
    byte2 = tl.load(codes + source + 1, mask=live, other=0).to(tl.uint32)
    byte1 = tl.load(codes + source + 256 * TILES, mask=live, other=0).to(tl.uint32)
    byte3 = tl.load(codes + source + 256 * TILES + 1, mask=live, other=0).to(tl.uint32)
    tl.debug_barrier()  # every thread has read the strip
    alive0, alive1 = (upper & 0x7F) != 0, (lower & 0x7F) != 0
    byte0, byte2 = tl.where(alive0, byte0, 0), tl.where(alive0, byte2, 0)
    byte1, byte3 = tl.where(alive1, byte1, 0), tl.where(alive1, byte3, 0)
    packed = _field(byte0, 15, 6) | _field(byte1, 12, 3) | _field(byte2, 13, 0) | _field(byte3, 14, 9)
    tl.store(codes.to(tl.pointer_type(tl.int32)) + word, packed.to(tl.int32, bitcast=True), mask=live)
    first = live & (j == 0)
    place = scales + (t * 32 + r * 4 + c) * 2
    tl.store(place, _scale_byte(upper), mask=first)
    tl.store(place + 1, _scale_byte(lower), mask=first)


@triton.jit
def _field(byte, SIGN: tl.constexpr, MAGNITUDE: tl.constexpr):
    """Sign and magnitude of a byte's two codes at their places in the two halves of a word."""
    low = ((byte >> 3 & 1) << SIGN) | ((byte & 7) << MAGNITUDE)
    high = ((byte >> 7 & 1) << SIGN) | ((byte >> 4 & 7) << MAGNITUDE)
    return low | (high << 16)


@triton.jit
def _scale_byte(bits):
    """E4M3 bits, sign ignored, to exponent + 10 and three bits of mantissa."""
    magnitude = (bits & 0x7F).to(tl.int32)
    # Subnormals count 2^-9: as floats they are normal.
    value = tl.where(
        magnitude < 8, magnitude * 0.001953125, ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    )
    raw = (value.to(tl.int32, bitcast=True) >> 20) - 936
    return tl.where(magnitude == 0, 0, raw).to(tl.uint8)


def compile_cases() -> list[CompileCase]:
    signature = {"codes": "*u8", "scales": "*u8"}
    return [
        CompileCase(
            name=f"repack {columns}",
            function=_repack,
            signature=signature,
            constexprs={"TILES": columns // 64, "BLOCK": triton.next_power_of_2(columns // 64)},
            options={"num_warps": 8},
        )
        for columns in (512, 704, 1856, 2816, 4096)
    ]
