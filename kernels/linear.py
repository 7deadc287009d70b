"""Dense linear layers whose weight is plain, FP8 or NVFP4: y = x_TK @ weight_NK.T, accumulated in float32.

bfloat16 on a GPU goes to the kernels of dense.py. Everything else is decoded in blocks, for torch: the backend of
CPUs, and of float32 and float16 anywhere.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from moe_nvfp4.kernels.dense import concatenate, dense_linear
from moe_nvfp4.kernels.fragments import ROWS, FragmentTensor, fits_in_place, from_fragments, repack_in_place
from moe_nvfp4.kernels.nvfp4 import FP8Tensor, NVFP4Tensor

DenseWeight = torch.Tensor | FP8Tensor | NVFP4Tensor | FragmentTensor


class Stacked(NamedTuple):
    """Weights of different kinds that share x, rows one below the other."""

    parts: tuple[DenseWeight, ...]


class Invariant(NamedTuple):
    """A weight by which each row is multiplied alike, to the last bit, whatever the other rows and their number."""

    weight: DenseWeight | Stacked


Projection = DenseWeight | Stacked | Invariant


class Summed(NamedTuple):
    """Some columns of a weight; other ranks have the others, and `sum_over_ranks` adds up what they give."""

    weight: Projection
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]


# Rows of a weight dequantised at a time: bounds the scratch to about 64 MB for K = 4096 in float32.
_ROWS = 4096


def linear(x_TK: torch.Tensor, weight: Projection | Summed) -> torch.Tensor:
    """Weight-only: activations keep their dtype, quantised weights are decoded to it."""
    if isinstance(weight, Summed):
        return weight.sum_over_ranks(linear(x_TK, weight.weight))
    if isinstance(weight, Invariant):
        return _invariant(x_TK, weight.weight)
    if isinstance(weight, Stacked):
        return torch.cat([linear(x_TK, part) for part in weight.parts], dim=-1)
    fast = x_TK.is_cuda and x_TK.dtype == torch.bfloat16
    if fast and not isinstance(weight, NVFP4Tensor) and _is_bfloat16(weight):
        return dense_linear(x_TK, weight, dependent=True)  # no kernel of a step writes weights
    if isinstance(weight, torch.Tensor):
        return F.linear(x_TK, weight.to(x_TK.dtype))
    starts = range(0, weight.shape[0], _ROWS)
    return torch.cat([F.linear(x_TK, _decoded(weight, start, x_TK.dtype)) for start in starts], dim=-1)


def _invariant(x_TK: torch.Tensor, weight: DenseWeight | Stacked) -> torch.Tensor:
    """Of bfloat16 on a GPU, without the matrix library, which chooses by the number of rows."""
    if isinstance(weight, Stacked):
        return torch.cat([_invariant(x_TK, part) for part in weight.parts], dim=-1)
    if not isinstance(weight, NVFP4Tensor) and _is_bfloat16(weight):
        return dense_linear(x_TK, weight, dependent=True, batch_invariant=True)
    if isinstance(weight, torch.Tensor):
        return dense_linear(x_TK, weight.to(x_TK.dtype), batch_invariant=True)
    starts = range(0, weight.shape[0], _ROWS)
    parts = [dense_linear(x_TK, _decoded(weight, start, x_TK.dtype), batch_invariant=True) for start in starts]
    return torch.cat(parts, dim=-1)


def stack(weights: Sequence[DenseWeight | Invariant], *, fast: bool) -> Projection:
    """Weights that share x as one, each with its own scales; `fast` asks for one launch, which copies them."""
    plain = [weight.weight if isinstance(weight, Invariant) else weight for weight in weights]
    together = _stacked([weight for weight in plain if not isinstance(weight, Stacked)], fast)
    return Invariant(together) if isinstance(weights[0], Invariant) else together


def _stacked(weights: Sequence[DenseWeight], fast: bool) -> DenseWeight | Stacked:
    one_kind = len({type(weight) for weight in weights}) == 1 and not isinstance(weights[0], NVFP4Tensor)
    if len(weights) == 1:
        return weights[0]
    if not (fast and one_kind and all(map(_is_bfloat16, weights))):
        return Stacked(tuple(weights))
    return concatenate([weight for weight in weights if not isinstance(weight, NVFP4Tensor)])


def in_fragments(weight: DenseWeight) -> DenseWeight:
    """NVFP4 in the order of the tensor-core kernels, in the memory it has; other weights as they are."""
    if isinstance(weight, NVFP4Tensor) and fits_in_place(*weight.shape[-2:]):
        return repack_in_place(weight)
    return weight


def embedding(token_ids_T: torch.Tensor, table: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return F.embedding(token_ids_T, table).to(dtype)


def _is_bfloat16(weight: DenseWeight) -> bool:
    return not isinstance(weight, torch.Tensor) or weight.dtype == torch.bfloat16


def _decoded(weight: FP8Tensor | NVFP4Tensor | FragmentTensor, start: int, dtype: torch.dtype) -> torch.Tensor:
    """`_ROWS` rows of a weight."""
    rows = slice(start, start + _ROWS)
    if isinstance(weight, FP8Tensor):
        return FP8Tensor(weight.values[rows], weight.scale[rows] if weight.scale.ndim else weight.scale).dequantize(
            dtype
        )
    if isinstance(weight, NVFP4Tensor):
        return NVFP4Tensor(weight.codes[rows], weight.block_scales[rows], weight.global_scale).dequantize(dtype)
    strips = slice(start // ROWS, (start + _ROWS) // ROWS)
    unscaled = FragmentTensor(weight.words[strips], weight.scales[strips], weight.global_scale.new_ones(()))
    # Stacked weights have a global scale for every strip.
    per_strip = weight.global_scale.expand(weight.words.shape[0])[strips]
    return (from_fragments(unscaled).dequantize() * per_strip.repeat_interleave(ROWS)[:, None]).to(dtype)
