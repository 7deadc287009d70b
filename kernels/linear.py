"""Dense linear layers whose weight is plain, FP8 or NVFP4: x_TK @ weight_NK.T, accumulated in float32."""

import torch
from torch.nn import functional as F

from moe_nvfp4.kernels.nvfp4 import FP8Tensor, NVFP4Tensor

DenseWeight = torch.Tensor | FP8Tensor | NVFP4Tensor

# Rows of a weight dequantised at a time: bounds the scratch to about 64 MB for K = 4096 in float32.
_ROWS = 4096


def linear(x_TK: torch.Tensor, weight: DenseWeight) -> torch.Tensor:
    """Weight-only: activations keep their dtype, quantised weights are decoded to it."""
    if isinstance(weight, torch.Tensor):
        return F.linear(x_TK, weight.to(x_TK.dtype))
    return torch.cat([F.linear(x_TK, rows.dequantize(x_TK.dtype)) for rows in _row_blocks(weight)], dim=-1)


def embedding(token_ids_T: torch.Tensor, table: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return F.embedding(token_ids_T, table).to(dtype)


def _row_blocks(weight: FP8Tensor | NVFP4Tensor) -> list[FP8Tensor] | list[NVFP4Tensor]:
    starts = range(0, weight.shape[0], _ROWS)
    if isinstance(weight, FP8Tensor):
        per_row = weight.scale.ndim > 0
        return [
            FP8Tensor(weight.values[i : i + _ROWS], weight.scale[i : i + _ROWS] if per_row else weight.scale)
            for i in starts
        ]
    return [
        NVFP4Tensor(weight.codes[i : i + _ROWS], weight.block_scales[i : i + _ROWS], weight.global_scale)
        for i in starts
    ]
