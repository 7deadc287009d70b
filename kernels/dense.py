"""Dense linears whose weight is bfloat16, FP8 or NVFP4 in fragments: y[m, n] = sum_k x[m, k] w[n, k], in bfloat16.

Activations are never quantised: with one E4M3 scale for x, `torch._scaled_mm` is off by 2.6 % (random values,
8192 x 2048), more than the 1 % allowed, and that is the whole argument against it for FP8 weights here. So up to some
rows the weight is decoded in registers on its way to the tensor cores (`dense_rows.py`; on sm_90 `dense_tiles.py`
for more rows), and above it is decoded in blocks to bfloat16, for cuBLAS.
"""

from collections.abc import Sequence
from typing import Final, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_nvfp4.kernels.dense_plain import decode_rows, decode_rows_torch, dense_plain
from moe_nvfp4.kernels.dense_rows import DenseWeight, dense_rows, fits, kind_of
from moe_nvfp4.kernels.dense_tiles import MAX_ROWS, Tiling, dense_tiles, spreads, tiling_for
from moe_nvfp4.kernels.fragments import FragmentTensor
from moe_nvfp4.kernels.nvfp4 import FP8Tensor
from moe_nvfp4.kernels.sizes import capability

# Up to so many rows of x dense_rows reads the weight, once for every sixteen. On one H200, 8192 x 2048, µs: nvfp4 14.6
# against 22.1 of decoding at 64 rows, 20.2 against 22.2 at 96, 25.8 against 22.9 at 128; fp8 18.9 against 22.2 at 64,
# 26.0 against 22.9 at 96; of 59 at 1024 rows 12 are decoding, of 187 at 4096 13.
_FEW_ROWS: Final = {"nvfp4": 80, "fp8": 64}
# Where dense_tiles is beside it, and for bfloat16, it may read so many bytes, for up to 256 rows. µs of dense_rows and
# dense_tiles: fp8 2048 x 2048 4.1 and 5.5 at 32 rows (8.4 MB), 7.6 and 6.8 at 64; nvfp4 2816 x 2112 6.2 and 6.2 at 32
# (6.7 MB), 10.3 and 8.3 at 64; nvfp4 2048 x 512 2.6 and 3.7 at 64. Of dense_rows and cuBLAS, bfloat16: 64 x 2048 2.4
# and 5.0 at 64 rows, 2.7 and 5.0 at 256; 2816 x 2112 7.1 and 6.6 at 32 (24 MB).
_READ_BYTES: Final = 9 << 20
# Above so many rows, weights with fewer outputs are decoded for cuBLAS. µs of dense_tiles and of decoding at 256 rows:
# fp8 2048 x 4096 20 and 17.6, 9216 x 2048 37.7 and 37.7, 12288 x 2048 38.6 and 43.9; nvfp4 2816 x 2112 16.1 and 13.5,
# 8192 x 2816 27.8 and 43; at 128 rows fp8 2048 x 2048 8.8 and 10.3, 2048 x 4096 13.8 and 15.9.
_TILE_ROWS: Final = 128
_TILE_OUTPUTS: Final = {"nvfp4": 8192, "fp8": 12288}
# Bytes of a block decoded to bfloat16: half of an H200's L2 (60 MB), on its way to cuBLAS. Other sizes not measured.
_BLOCK_BYTES: Final = 32 << 20


def dense_linear(
    x_MK: Tensor,
    weight: DenseWeight,
    *,
    dependent: bool = False,
    plain: bool = False,
    batch_invariant: bool = False,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """[M, N]; N is what the weight has, for fragments a multiple of 16, K likewise at least x's.

    `dependent`: launch while the kernel before it on the stream still runs, and fetch weights meanwhile (sm_90 and
    later, up to 256 rows); that kernel must not write the weight. `plain` asks for plain Triton where others win.
    `batch_invariant`: the bits of a row of y depend on that row of x alone, not on how many there are.
    `out_dtype` float32 (logits) saves few rows the rounding to bfloat16; many rows are rounded, then widened.
    """
    rows, columns = x_MK.shape
    if rows == 0:
        return x_MK.new_empty(0, weight.shape[0], dtype=out_dtype)
    if columns < weight.shape[1]:
        x_MK = F.pad(x_MK, (0, weight.shape[1] - columns))
    x_MK = x_MK.contiguous()
    if not x_MK.is_cuda:
        return dense_linear_torch(x_MK, weight, out_dtype)
    if batch_invariant:
        return _invariant(x_MK, weight, dependent, out_dtype)
    kind = kind_of(weight)
    if plain and (rows <= 16 or kind != "bf16"):
        return dense_plain(x_MK, weight).to(out_dtype)
    if fits(x_MK, weight):
        tiling = _tiling(x_MK, weight)
        if _few_rows(rows, weight, tiling is not None):
            return dense_rows(x_MK, weight, dependent=dependent, out_dtype=out_dtype)
        if tiling is not None and not isinstance(weight, Tensor):
            return dense_tiles(x_MK, weight, dependent=dependent, tiling=tiling, out_dtype=out_dtype)
    if isinstance(weight, Tensor):
        return F.linear(x_MK, weight).to(out_dtype)
    y_MN = torch.empty(rows, weight.shape[0], dtype=torch.bfloat16, device=x_MK.device)
    step = max(16, _BLOCK_BYTES // (2 * weight.shape[1]) // 16 * 16)
    for start in range(0, weight.shape[0], step):
        stop = min(start + step, weight.shape[0])
        torch.mm(x_MK, decode_rows(weight, start, stop).T, out=y_MN[:, start:stop])
    return y_MN.to(out_dtype)


def _invariant(x_MK: Tensor, weight: DenseWeight, dependent: bool, out_dtype: torch.dtype) -> Tensor:
    """One kernel and one tiling for any number of rows: what shares K between warps, and so the order of each sum,
    depends on the weight alone. Sixteen rows at a time read the weight again, from L2 at best."""
    x_MK = x_MK if x_MK.data_ptr() % 16 == 0 else x_MK.clone()  # else its address would choose the kernel
    if fits(x_MK, weight):
        return dense_rows(x_MK, weight, dependent=dependent, groups=2, out_dtype=out_dtype)
    return dense_plain(x_MK, weight, block_m=64).to(out_dtype)


def _few_rows(rows: int, weight: DenseWeight, tiles: bool) -> bool:
    if tiles or isinstance(weight, Tensor):
        return rows <= 16 or (rows <= MAX_ROWS and -(-rows // 16) * weight.nbytes <= _READ_BYTES)
    return rows <= _FEW_ROWS[kind_of(weight)]


def _tiling(x_MK: Tensor, weight: DenseWeight) -> Tiling | None:
    """Of dense_tiles, where that is made for the rows and the GPU."""
    rows, num_out, kind = x_MK.shape[0], weight.shape[0], kind_of(weight)
    if kind == "bf16" or capability(x_MK.device)[0] != 9:
        return None
    if rows > MAX_ROWS or (rows > _TILE_ROWS and num_out < _TILE_OUTPUTS[kind]):
        return None
    fragments = kind == "nvfp4"
    tiling = tiling_for(fragments, num_out, x_MK.shape[1], rows)
    return tiling if spreads(tiling, fragments, num_out, rows) else None


def dense_linear_torch(x_MK: Tensor, weight: DenseWeight, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The torch twin: float32 sums over weights rounded once to bfloat16."""
    x_MK = F.pad(x_MK, (0, weight.shape[1] - x_MK.shape[1]))
    rows = weight if isinstance(weight, Tensor) else decode_rows_torch(weight, 0, weight.shape[0])
    return F.linear(x_MK.float(), rows.float()).to(out_dtype)


def concatenate(weights: Sequence[DenseWeight]) -> DenseWeight:
    """Weights that share x as one, for one launch: rows one below the other, each with the scale it had.

    The scale becomes float32 [N/16] (fragments: one for every 16 rows) or [N] (FP8).
    """
    first = weights[0]
    if isinstance(first, FragmentTensor):
        parts = cast(Sequence[FragmentTensor], weights)
        scales = [part.global_scale.expand(part.words.shape[0]) for part in parts]
        return FragmentTensor(
            torch.cat([part.words for part in parts]), torch.cat([part.scales for part in parts]), torch.cat(scales)
        )
    if isinstance(first, FP8Tensor):
        values = cast(Sequence[FP8Tensor], weights)
        scales = [part.scale.expand(part.shape[0]) for part in values]
        return FP8Tensor(torch.cat([part.values for part in values]), torch.cat(scales))
    return torch.cat(cast(list[Tensor], list(weights)))
